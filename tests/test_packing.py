"""The layout of sequences: packed and padded losses are equal, by hand too, and leaking models are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from alignment.errors import ConfigError
from alignment.types import TokenSequence
from models.head import has_plain_head
from models.packing import MOST_PADDING, check_packing, pack, packing_leak, sequence_batch
from models.sequence_loss import SequenceLoss
from tiny import VOCABULARY, random_rows, tiny_llama

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def gpt2():
    """Positions are learned and absolute."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


def mistral():
    """Looks back at 4 tokens only."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3, "sliding_window": 4}
    return MistralForCausalLM(MistralConfig(**SMALL, **sizes)).eval()


MODELS = pytest.mark.parametrize("model", [tiny_llama(), gpt2(), mistral()], ids=["llama", "gpt2", "sliding window"])


def sequences(lengths=(9, 4, 12, 2, 7)):
    """Rows in which, a first stretch apart, every third token is not counted either."""
    rows = random_rows(list(lengths))
    return [TokenSequence(tuple(row), tuple(i > 0 and i % 3 != 2 for i in range(len(row)))) for row in rows]


def loss_by_hand(model, sequence):
    """−Σ log p(token | those before) over counted tokens, one prefix after the other, in float64."""
    total = 0.0
    for i, (token, counts) in enumerate(zip(sequence.ids, sequence.learned, strict=True)):
        if counts:
            logits = model(torch.tensor([sequence.ids[:i]])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[token])
    return total


@MODELS
def test_packed_padded_and_single_losses_are_those_by_hand(model):
    with torch.no_grad():
        expected = sum(loss_by_hand(model, s) for s in sequences())
        tokens = sum(s.num_learned for s in sequences())
        for packed in (False, True):
            assert len(sequence_batch(sequences(), packed=packed).targets) == tokens
            loss = float(SequenceLoss(model, packed=packed)(sequences()))
            assert loss / tokens == pytest.approx(expected / tokens, abs=1e-5)


@MODELS
def test_gradients_are_equal_packed_and_padded(model):
    gradients = []
    for packed in (False, True):
        model.zero_grad()
        SequenceLoss(model, packed=packed)(sequences())[0].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for padded, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, packed, atol=1e-4, rtol=1e-4)


@MODELS
def test_nothing_leaks_from_one_sequence_to_another(model):
    first, second = sequences((6, 5))
    changed = TokenSequence(tuple((i + 1) % VOCABULARY for i in first.ids), first.learned)
    batches = [sequence_batch([s, second], packed=True) for s in (first, changed)]
    assert batches[0].input_ids.shape == (1, 11)
    with torch.no_grad():
        one, other = (
            model(input_ids=b.input_ids, position_ids=b.position_ids, use_cache=False).logits for b in batches
        )
    assert torch.equal(one[:, 6:], other[:, 6:])
    assert not torch.equal(one, other)


def test_the_layout_by_hand():
    a = TokenSequence((10, 11, 12), (False, True, True))
    b = TokenSequence((20, 21), (False, True))
    c = TokenSequence((30, 31, 32, 33, 34), (False, False, False, True, True))
    batch = sequence_batch([a, b, c], packed=True)  # the longest first, each into the shortest row
    assert batch.input_ids.tolist() == [[30, 31, 32, 33, 34], [10, 11, 12, 20, 21]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert (batch.predicts.tolist(), batch.targets.tolist()) == ([2, 3, 5, 6, 8], [33, 34, 11, 12, 21])
    padded = sequence_batch([b, a], packed=False)
    assert padded.input_ids.tolist() == [[20, 21, 0], [10, 11, 12]]
    assert padded.position_ids is None
    assert (padded.predicts.tolist(), padded.targets.tolist()) == ([0, 3, 4], [21, 11, 12])


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_rows_hold_every_sequence_once_and_little_padding(lengths):
    rows = pack(lengths)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    width = max(sum(lengths[i] for i in row) for row in rows)
    assert width >= max(lengths)
    assert sum(lengths) >= (1 - MOST_PADDING) * len(rows) * width


def test_rows_are_as_many_as_fill_up():
    assert pack([8] * 4) == [[0], [1], [2], [3]]
    assert pack([10, 6, 4]) == [[0], [1, 2]]
    assert pack([10, 6]) == [[0, 1]]  # two rows would be a fifth padding
    assert pack([20, 19]) == [[0], [1]]
    assert len(pack([5] * 20)) == 20


def test_padding_stays_within_the_context():
    """GPT-2 has a vector for each of 64 positions; the padding behind a sequence of 64 has none beyond."""
    long = sequences((64, 31, 34))
    batch = sequence_batch(long, packed=True)
    assert batch.input_ids.shape == (2, 65)
    assert int(batch.position_ids.max()) == 63 and batch.position_ids[0, 64] == 0
    with torch.no_grad():
        padded, packed = (float(SequenceLoss(gpt2(), packed=way)(long)) for way in (False, True))
    assert packed == pytest.approx(padded, rel=1e-5)


def test_rows_stay_within_the_context():
    lengths = [2000, *[100] * 7]
    assert [sum(lengths[i] for i in row) for row in pack(lengths)] == [2700]
    assert [sum(lengths[i] for i in row) for row in pack(lengths, 2048)] == [2000, 700]
    assert pack([10, 6, 4], 10) == [[0], [1, 2]]
    assert pack([10, 9, 2], 10) == [[0], [1], [2]]
    assert pack([10, 9], 5) == [[0], [1]]  # which the model cannot read anyway: as few at a time as can be


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), context=st.integers(40, 100))
def test_no_row_is_longer_than_the_context(lengths, context):
    rows = pack(lengths, context)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= context


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), context=st.integers(40, 1200))
def test_within_a_context_padding_is_little_but_where_no_rows_would_hold_less(lengths, context):
    """The promise is kept wherever everything fits into one row, which has no padding.

    The exception: a context shorter than that, into which sequences, longest first, go with more padding in any number
    of rows. Then the rows are the fewest that are within it.
    """

    def laid(count):  # by hand: the longest first, each into the shortest row
        filled = [0] * count
        for length in sorted(lengths, reverse=True):
            filled[filled.index(min(filled))] += length
        return max(filled)

    def keeps(count):
        return laid(count) <= context and sum(lengths) >= (1 - MOST_PADDING) * count * laid(count)

    rows = pack(lengths, context)
    width = max(sum(lengths[i] for i in row) for row in rows)
    little = sum(lengths) >= (1 - MOST_PADDING) * len(rows) * width
    counts = range(1, len(lengths) + 1)
    assert little or (sum(lengths) > context and not any(map(keeps, counts)))
    if not little:
        assert len(rows) == min(count for count in counts if laid(count) <= context)


def test_a_model_that_reads_its_context_only_is_given_no_more():
    """GPT-Neo's mask is as large as its context."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 16}
    layers = {"attention_types": [[["global", "local"], 1]], "initializer_range": 0.3}
    model = GPTNeoForCausalLM(GPTNeoConfig(vocab_size=VOCABULARY, **sizes, **layers)).eval()
    with torch.no_grad():
        padded, packed = (float(SequenceLoss(model, packed=way)(sequences((16, 4)))) for way in (False, True))
    assert packed == pytest.approx(padded, rel=1e-5)


@MODELS
def test_models_that_keep_sequences_apart_may_pack(model):
    check_packing(model)
    check_packing(model.to(torch.bfloat16))
    model.float()


def test_models_that_do_not_are_refused():
    torch.manual_seed(0)
    opt = OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, init_std=0.3)  # counts positions by itself
    bloom = BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3
    )  # knows distances only
    mamba = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, initializer_range=0.3)
    for model in (OPTForCausalLM(opt), BloomForCausalLM(bloom), MambaForCausalLM(mamba)):
        with pytest.raises(ConfigError, match=r"sft\.packing \(rows\): .* set sft\.packing=none"):
            check_packing(model.eval())
        assert packing_leak(model) > 0
        with torch.no_grad():  # they may train padded
            expected = sum(loss_by_hand(model, s) for s in sequences())
            assert float(SequenceLoss(model, packed=False)(sequences())) == pytest.approx(expected, rel=1e-5)
    assert not has_plain_head(model.to(torch.bfloat16))  # Mamba's gives float32
