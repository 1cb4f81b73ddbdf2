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
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from alignment.errors import ConfigError
from alignment.types import TokenSequence
from models.packing import check_packing, pack, sequence_batch, sequence_logits, sequence_loss_sum
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
        for row_tokens in (None, 12, 16, 34):
            batch = sequence_batch(sequences(), row_tokens=row_tokens)
            assert int(batch.learned.sum()) == tokens
            assert float(sequence_loss_sum(model, batch)) / tokens == pytest.approx(expected / tokens, abs=1e-5)


@MODELS
def test_gradients_are_equal_packed_and_padded(model):
    gradients = []
    for row_tokens in (None, 40):
        model.zero_grad()
        sequence_loss_sum(model, sequence_batch(sequences(), row_tokens=row_tokens)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for padded, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, packed, atol=1e-4, rtol=1e-4)


@MODELS
def test_nothing_leaks_from_one_sequence_to_another(model):
    first, second = sequences((6, 5))
    changed = TokenSequence(tuple((i + 1) % VOCABULARY for i in first.ids), first.learned)
    with torch.no_grad():
        one, other = (sequence_logits(model, sequence_batch([s, second], row_tokens=11)) for s in (first, changed))
    columns = sequence_batch([first, second], row_tokens=11).columns >= 6
    assert torch.equal(one[:, columns], other[:, columns])
    assert not torch.equal(one, other)


def test_the_layout_by_hand():
    a = TokenSequence((10, 11, 12), (False, True, True))
    b = TokenSequence((20, 21), (False, True))
    c = TokenSequence((30, 31, 32, 33), (False, False, False, True))
    batch = sequence_batch([a, b, c], row_tokens=5)  # the longest first, then what fits beside it
    assert batch.input_ids.tolist() == [[30, 31, 32, 33, 0], [10, 11, 12, 20, 21]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert batch.columns.tolist() == [0, 1, 2, 3]
    assert batch.targets[batch.learned].tolist() == [33, 11, 12, 21]
    assert batch.learned.int().tolist() == [[0, 0, 1, 0], [1, 1, 0, 1]]
    padded = sequence_batch([b, a], row_tokens=None)
    assert padded.input_ids.tolist() == [[20, 21, 0], [10, 11, 12]]
    assert padded.position_ids is None
    assert (padded.columns.tolist(), padded.targets[padded.learned].tolist()) == ([0, 1], [21, 11, 12])


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30), row_tokens=st.integers(1, 40))
def test_rows_hold_every_sequence_once_and_no_more_than_they_may(lengths, row_tokens):
    rows = pack(lengths, row_tokens)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert all(total <= row_tokens or len(row) == 1 for total, row in zip(filled, rows, strict=True))
    smallest = [min(lengths[i] for i in row) for row in rows]
    # First fit: what opened a later row had no room in an earlier one.
    assert all(filled[a] + smallest[b] > row_tokens for b in range(len(rows)) for a in range(b))


@MODELS
def test_models_that_keep_sequences_apart_may_pack(model):
    check_packing(model, vocabulary=VOCABULARY)
    check_packing(model.to(torch.bfloat16), vocabulary=VOCABULARY)
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
            check_packing(model.eval(), vocabulary=VOCABULARY)
        batch = sequence_batch(sequences(), row_tokens=None)  # they may train padded
        with torch.no_grad():
            expected = sum(loss_by_hand(model, s) for s in sequences())
            assert float(sequence_loss_sum(model, batch)) == pytest.approx(expected, rel=1e-5)
