"""Decoding against a plain loop without cache, padding or batch, on models of many kinds; and against exact sums."""

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from alignment.errors import ConfigError, ModelError
from alignment.rollouts import uniforms
from models.batching import response_batch, response_logits
from models.decoding import respond, stream
from models.own_rows import OwnRows
from models.prefill import plain_cache
from models.row_kinds import rows_for
from models.rows import Job, Room, longest_first, most_room
from models.sampling import Sampling, adjusted
from models.shared_rows import SharedRows
from side_by_side import half_precision_distances, sample
from tiny import EOS, VOCABULARY, random_rows, tiny_llama

PROMPTS = random_rows([3, 9, 5, 1])
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
KINDS = {
    "llama": ("LlamaConfig", GROUPED, True),
    "llama, one head of keys": ("LlamaConfig", {**SIZES, "num_key_value_heads": 1}, True),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}, True),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}, True),
    "gpt-neox": ("GPTNeoXConfig", SIZES, True),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}, True),
    "mixtral, experts": ("MixtralConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, True),
    "mistral, a wide window": ("MistralConfig", {**GROUPED, "sliding_window": 30}, True),
    "mistral, a narrow window": ("MistralConfig", {**GROUPED, "sliding_window": 4}, False),
    "gemma3, a wide window": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 64}, True),
    "gemma3, a narrow window": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 4}, False),
    "gemma2, a softcap": ("Gemma2Config", {**GROUPED, "head_dim": 8}, False),
    "bloom, positions by distance": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, False),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are too small to divide."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(kind: str):
    """A model of that kind with random weights, and whether its prompts can be shared."""
    name, sizes, shared = KINDS[kind]
    return causal_lm(name, sizes), shared


def causal_lm(name: str, sizes: dict):
    """A model of that config class with random weights."""
    special = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
    config = getattr(transformers, name)(vocab_size=VOCABULARY, initializer_range=0.3, **sizes, **special)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def plain_loop(model, prompt, numbers, sampling):
    """One response by full forward passes: no cache, no padding, no batch; inverse CDF in float64 numpy."""
    ids, response, logged = list(prompt), [], []
    for u in numbers:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        wanted = adjusted(logits[None], sampling, seen=[ids], lengths=[len(response)], ending=torch.tensor([EOS]))[0]
        cumulative = np.cumsum(torch.softmax(wanted / sampling.temperature, -1).numpy())
        token = int(np.searchsorted(cumulative / cumulative[-1], u, side="right"))
        logged.append(float(torch.log_softmax(logits, -1)[token]))
        ids.append(token)
        response.append(token)
        if token == EOS:
            return tuple(response), "stop", logged
    return tuple(response), "length", logged


def numbers_for(prompts, n, tokens):
    return torch.from_numpy(
        np.stack([[uniforms(f"test/{i}/{k}", tokens) for k in range(n)] for i in range(len(prompts))])
    )


def responses(model, prompts, numbers, sampling, batch_tokens):
    """All that `respond` gives, each prompt once."""
    found = {}
    for some in respond(model, prompts, numbers, sampling, eos_ids=[EOS], batch_tokens=batch_tokens):
        assert not found.keys() & some.keys()
        found |= some
    return [found[i] for i in range(len(prompts))]


def check(got, model, prompts, numbers, sampling):
    """Samples are those of the plain loop, with its log-probabilities."""
    for samples, prompt, rows in zip(got, prompts, numbers, strict=True):
        for one, row in zip(samples, rows, strict=True):
            tokens, reason, logged = plain_loop(model, prompt, row.tolist(), sampling)
            assert (one.token_ids, one.finish_reason) == (tokens, reason)
            np.testing.assert_allclose(one.log_probs, logged, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_a_plain_loop_for_models_of_many_kinds(kind):
    (model, shared), sampling, numbers = tiny(kind), Sampling(12), numbers_for(PROMPTS, 3, 12)
    with torch.inference_mode():
        rows = rows_for(model, PROMPTS, 3, 12, budget=75, pad_id=EOS)
    assert type(rows) is (SharedRows if shared else OwnRows)
    check(responses(model, PROMPTS, numbers, sampling, 75), model, PROMPTS, numbers, sampling)


def test_rows_with_their_own_prompts_let_their_cache_go_before_the_next_are_read():
    model, shared = tiny(next(kind for kind, (_, _, shared) in KINDS.items() if not shared))
    assert not shared
    waiting = longest_first(PROMPTS, 1)
    with torch.inference_mode():
        rows = OwnRows(model, PROMPTS, Room(rows=2, prompts=2, width=9, tokens=4), pad_id=EOS)
        begun, _ = rows.begin(waiting)
        cache = weakref.ref(rows._cache)
        rows.drop([0])
        assert cache() is not None
        rows.drop(list(range(len(begun) - 1)))
        gc.collect()
        assert cache() is None
        assert rows.begin(waiting)[0]


def test_the_text_part_of_a_model_with_images_is_sampled():
    """Its config has the sizes of the text in a part of their own."""
    special = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
    text = {"vocab_size": VOCABULARY, "head_dim": 8, **GROUPED, **special}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model, numbers = AutoModelForCausalLM.from_config(config).eval(), numbers_for(PROMPTS, 2, 5)
    check(responses(model, PROMPTS, numbers, Sampling(5), 75), model, PROMPTS, numbers, Sampling(5))


def test_in_half_precision_log_probabilities_are_as_near_the_trainers_as_its_rounding():
    found = half_precision_distances("cpu")
    assert found["ours to exact"] < 1.2 * found["trainer to exact"]
    assert found["ours to trainer"] < 0.04


BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "init_std": 0.3}
UNFIT = {
    "bart": ("BartConfig", {**BART, "is_decoder": True, "is_encoder_decoder": False}),
    "roberta": ("RobertaConfig", {**SIZES, "is_decoder": True}),
    "recurrent_gemma": ("RecurrentGemmaConfig", GROUPED),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2}),
    "bamba": ("BambaConfig", {**GROUPED, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8}),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_model_that_counts_positions_by_itself_or_recurs_is_refused_by_its_name(kind):
    name, sizes = UNFIT[kind]
    model = causal_lm(name, sizes)
    numbers = numbers_for(PROMPTS, 3, 12)
    with pytest.raises(ModelError, match=f"a model of type {kind} here: .*reads position_ids"):
        responses(model, PROMPTS, numbers, Sampling(12), 75)


@pytest.mark.parametrize("sampling", [Sampling(30), Sampling(30, 5, temperature=2.0, repetition_penalty=1.3)])
@pytest.mark.parametrize("batch_tokens", [39, 120, 10_000])
def test_samples_are_those_of_a_plain_loop_however_few_fit(sampling, batch_tokens):
    model, numbers = tiny_llama(), numbers_for(PROMPTS, 4, 30)
    got = responses(model, PROMPTS, numbers, sampling, batch_tokens)
    check(got, model, PROMPTS, numbers, sampling)
    reasons = {s.finish_reason for row in got for s in row}
    assert reasons == {"stop", "length"}  # both ways to end, and rows took the place of others on the way


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), n=st.integers(1, 4), extra=st.integers(0, 150))
@settings(deadline=None, max_examples=12)
def test_a_sample_does_not_depend_on_its_batch(lengths, n, extra):
    model, sampling, prompts = tiny_llama(), Sampling(10, temperature=1.5), random_rows(lengths)
    numbers = numbers_for(prompts, n, 10)
    got = responses(model, prompts, numbers, sampling, max(lengths) + 10 + extra)
    alone = [sample(model, [p], numbers[i : i + 1], sampling, eos_ids=[EOS])[0] for i, p in enumerate(prompts)]
    assert [[s.token_ids for s in row] for row in got] == [[s.token_ids for s in row] for row in alone]


def test_a_policy_with_lora_is_sampled_as_it_is():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    sampling, numbers = Sampling(12), numbers_for(PROMPTS, 3, 12)
    got = responses(model.eval(), PROMPTS, numbers, sampling, 100)
    check(got, model, PROMPTS, numbers, sampling)
    base = responses(tiny_llama(), PROMPTS, numbers, sampling, 100)
    assert [[s.token_ids for s in row] for row in got] != [[s.token_ids for s in row] for row in base]


def test_the_sampled_sequences_have_the_probabilities_of_the_model():
    """Chi-square over all sequences of at most three tokens, those expected fewer than five times as one."""
    torch.manual_seed(1)
    config = LlamaConfig(**GROUPED, vocab_size=5, initializer_range=0.4, bos_token_id=1, eos_token_id=EOS)
    model, prompt, n = LlamaForCausalLM(config).eval(), [1, 3], 4000
    sequences = [
        s for size in (1, 2, 3) for s in itertools.product(range(5), repeat=size)
        if EOS not in s[:-1] and (s[-1] == EOS or size == 3)
    ]  # fmt: skip
    exact = []
    for sequence in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *sequence]])).logits[0].double()
        steps = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
        exact.append(float(steps[range(len(sequence)), list(sequence)].sum().exp()))
    assert sum(exact) == pytest.approx(1, abs=1e-6)
    (drawn,) = responses(model, [prompt], numbers_for([prompt], n, 3), Sampling(3), 9_000)
    counts = {sequence: 0 for sequence in sequences}
    for one in drawn:
        counts[one.token_ids] += 1
    often = [i for i, p in enumerate(exact) if n * p >= 5]
    observed = [counts[sequences[i]] for i in often]
    expected = [n * exact[i] for i in often]
    test = stats.chisquare([*observed, n - sum(observed)], [*expected, n - sum(expected)])
    assert len(often) > 20 and test.pvalue > 0.01
    for one in drawn[:50]:
        assert sum(one.log_probs) == pytest.approx(np.log(exact[sequences.index(one.token_ids)]), abs=1e-4)


def test_greedy_decoding_takes_the_likeliest_and_gives_its_probability():
    model, numbers = tiny_llama(), numbers_for(PROMPTS, 2, 8)
    for prompt, samples in zip(
        PROMPTS, sample(model, PROMPTS, numbers, Sampling(8, temperature=0), eos_ids=[EOS]), strict=True
    ):
        generated = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=EOS)
        assert [list(s.token_ids) for s in samples] == [generated[0, len(prompt) :].tolist()] * 2
        with torch.no_grad():
            logits = model(generated).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1).amax(-1)
        np.testing.assert_allclose(samples[0].log_probs, expected, atol=1e-4)


def test_no_response_ends_before_its_least_length():
    numbers = numbers_for(PROMPTS, 8, 40)
    free, held = (sample(tiny_llama(), PROMPTS, numbers, Sampling(40, least), eos_ids=[EOS]) for least in (0, 12))
    assert min(len(s.token_ids) for row in free for s in row) < 12
    # The ending token is the one beyond the least length.
    assert min(len(s.token_ids) for row in held for s in row if s.finish_reason == "stop") >= 13
    assert min(len(s.token_ids) for row in held for s in row) >= 13


def test_a_response_ends_with_the_token_that_completes_a_stop_string():
    def letters(_, ids):
        return "".join(chr(ord("0") + i) for i in ids)

    model, numbers = tiny_llama(), numbers_for(PROMPTS, 4, 20)
    free = sample(model, PROMPTS, numbers, Sampling(20), eos_ids=[EOS])
    text = letters(None, free[0][0].token_ids)
    stop = (text[4:6], text[9])
    stopped = sample(model, PROMPTS, numbers, Sampling(20, stop=stop), eos_ids=[EOS], decode=letters)
    for whole, one in zip(itertools.chain(*free), itertools.chain(*stopped), strict=True):
        length, said = len(one.token_ids), letters(None, one.token_ids)
        assert one.token_ids == whole.token_ids[:length]
        ends = [i for i in range(1, length + 1) if any(s in said[:i] for s in stop)]
        assert ends in ([], [length])
        assert one.finish_reason == ("stop" if ends else whole.finish_reason)
        assert len(one.log_probs) == length
    assert len(stopped[0][0].token_ids) <= 6
    with pytest.raises(ValueError, match="decode"):
        sample(model, PROMPTS, numbers, Sampling(20, stop=stop), eos_ids=[EOS])


def test_a_stream_gives_the_tokens_of_the_sample():
    model, sampling = tiny_llama(), Sampling(40, temperature=1.5, top_p=0.9)
    numbers = numbers_for(PROMPTS, 2, 40)
    for prompt, rows in zip(PROMPTS, numbers, strict=True):
        (expected,) = sample(model, [prompt], rows[None], sampling, eos_ids=[EOS])
        got = [tuple(stream(model, prompt, row, sampling, eos_ids=[EOS])) for row in rows]
        assert got == [one.token_ids for one in expected]


def test_prompts_are_given_as_soon_as_all_their_responses_are_done():
    prompts = random_rows([4] * 6)
    numbers = numbers_for(prompts, 2, 10)
    lists = list(respond(tiny_llama(), prompts, numbers, Sampling(10), eos_ids=[EOS], batch_tokens=60))
    assert len(lists) > 2
    assert all(len(samples) == 2 for some in lists for samples in some.values())
    assert sorted(prompt for some in lists for prompt in some) == list(range(6))


def test_room_is_the_most_rows_that_the_budget_holds():
    # Rows of 10 tokens, 4 samples a prompt: 6 rows need 3 slots of 5 columns, 7 rows need 4.
    assert most_room([5, 3, 2, 2, 1], 4, 10, budget=75, shared=True) == Room(6, 10, 3, 5)
    assert most_room([5, 3, 2, 2, 1], 4, 10, budget=89, shared=True) == Room(6, 10, 3, 5)
    assert most_room([5, 3, 2, 2, 1], 4, 10, budget=90, shared=True) == Room(7, 10, 4, 5)
    assert most_room([5, 3], 4, 10, budget=10**9, shared=True) == Room(8, 10, 2, 5)
    assert most_room([5, 3], 4, 10, budget=75, shared=False) == Room(5, 10, 5, 5)
    assert most_room([5], 4, 10, budget=15, shared=True).rows == 1
    # With one sample a prompt never has fewer rows than one: no slot beyond the rows.
    assert most_room([5] * 9, 1, 10, budget=60, shared=True) == Room(4, 10, 4, 5)
    with pytest.raises(ConfigError, match=r"rollouts\.batch_tokens \(14\) must be >= 15"):
        most_room([5], 4, 10, budget=14, shared=True)


def test_the_cache_takes_what_the_room_says():
    model = tiny_llama()
    with torch.inference_mode():
        like = plain_cache(model, EOS, tokens=50)
    room = most_room(list(map(len, PROMPTS)), 4, 10, budget=100, shared=True)
    rows = SharedRows(model, PROMPTS, like, room, samples=4, pad_id=EOS)
    kept = [t for layer in rows._own for t in (layer.all_keys, layer.all_values)]
    kept += [t for pair in rows._shared for t in pair]
    bytes_per_token = 2 * 2 * 2 * 8 * 4  # layers × (keys, values) × key heads × head size × float32
    assert sum(t.nbytes for t in kept) == room.cached_tokens * bytes_per_token <= 100 * bytes_per_token


def test_a_cache_is_freed_with_its_last_response_and_without_the_garbage_collector(monkeypatch):
    made, real = [], SharedRows.__init__

    def noted(self, *args, **how):
        made.append(weakref.ref(self))
        real(self, *args, **how)

    monkeypatch.setattr(SharedRows, "__init__", noted)
    gc.disable()
    try:
        responses(tiny_llama(), PROMPTS, numbers_for(PROMPTS, 3, 12), Sampling(12), 200)
        assert made and all(rows() is None for rows in made)
    finally:
        gc.enable()


def test_jobs_begin_with_the_longest_prompt():
    jobs = longest_first([[1] * n for n in (2, 5, 2)], 2)
    assert list(jobs) == [Job(1, 0), Job(1, 1), Job(0, 0), Job(0, 1), Job(2, 0), Job(2, 1)]


def test_uniforms_depend_on_the_name_alone():
    assert uniforms("a/b", 4).tolist() == uniforms("a/b", 4).tolist()
    assert uniforms("a/b", 4).tolist() != uniforms("a/c", 4).tolist()
    assert uniforms("a/b", 8)[:4].tolist() == uniforms("a/b", 4).tolist()
    assert abs(uniforms("mean", 10_000).mean() - 0.5) < 0.02


def test_response_logits_are_those_without_padding():
    model = tiny_llama()
    responses = random_rows([4, 2, 7, 1], seed=1)
    batch = response_batch(PROMPTS, responses, pad_id=EOS)
    with torch.no_grad():
        padded = response_logits(model, batch)
        for i, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True)):
            alone = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(padded[i, : len(response)], alone, atol=1e-5, rtol=1e-4)
    assert batch.response_mask.sum(-1).tolist() == [4, 2, 7, 1]
