"""Sampling against a plain loop without cache or padding, and against exact distributions."""

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from alignment.rollouts import uniforms
from models.batching import response_batch, response_logits
from models.decoding import sample, stream
from models.sampling import Sampling, draw
from tiny import EOS, VOCABULARY, random_rows, tiny_llama

PROMPTS = random_rows([3, 9, 5, 1])


def reference_sample(model, prompt, numbers, sampling):
    """One response by full forward passes: no cache, no padding, no batch; inverse CDF in float64 numpy."""
    ids, response = list(prompt), []
    for u in numbers:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double() / sampling.temperature
        cumulative = np.cumsum(torch.softmax(logits, -1).numpy())
        token = int(np.searchsorted(cumulative / cumulative[-1], u, side="right"))
        ids.append(token)
        response.append(token)
        if token == EOS:
            return tuple(response), "stop"
    return tuple(response), "length"


def numbers_for(prompts, n, tokens):
    return torch.from_numpy(
        np.stack([[uniforms(f"test/{i}/{k}", tokens) for k in range(n)] for i in range(len(prompts))])
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_are_those_of_a_plain_loop(temperature):
    model, sampling = tiny_llama(), Sampling(40, temperature=temperature)
    numbers = numbers_for(PROMPTS, 6, 40)
    got = sample(model, PROMPTS, numbers, sampling, eos_ids=[EOS])
    expected = [
        [reference_sample(model, p, u.tolist(), sampling) for u in us] for p, us in zip(PROMPTS, numbers, strict=True)
    ]
    assert [[(s.token_ids, s.finish_reason) for s in row] for row in got] == expected
    reasons = [s.finish_reason for row in got for s in row]
    assert {"stop", "length"} == set(reasons)  # both ways to end, and rows were dropped on the way


def test_a_stream_gives_the_tokens_of_the_sample():
    model, sampling = tiny_llama(), Sampling(40, temperature=1.5, top_p=0.9)
    numbers = numbers_for(PROMPTS, 2, 40)
    for prompt, rows in zip(PROMPTS, numbers, strict=True):
        (expected,) = sample(model, [prompt], rows[None], sampling, eos_ids=[EOS])
        got = [tuple(stream(model, prompt, row, sampling, eos_ids=[EOS])) for row in rows]
        assert got == [one.token_ids for one in expected]


def test_a_sample_does_not_depend_on_its_batch():
    model, sampling = tiny_llama(), Sampling(20)
    numbers = numbers_for(PROMPTS, 3, 20)
    together = sample(model, PROMPTS, numbers, sampling, eos_ids=[EOS])
    alone = [sample(model, [p], numbers[i : i + 1], sampling, eos_ids=[EOS])[0] for i, p in enumerate(PROMPTS)]
    assert [[s.token_ids for s in row] for row in together] == [[s.token_ids for s in row] for row in alone]


def test_sliding_window_models_keep_their_own_cache():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.3, eos_token_id=EOS,
    )  # fmt: skip
    model, sampling = MistralForCausalLM(config).eval(), Sampling(12)
    prompts, numbers = random_rows([6, 6]), numbers_for(range(2), 2, 12)
    got = sample(model, prompts, numbers, sampling, eos_ids=[EOS])
    expected = [
        [reference_sample(model, p, u.tolist(), sampling) for u in us] for p, us in zip(prompts, numbers, strict=True)
    ]
    assert [[(s.token_ids, s.finish_reason) for s in row] for row in got] == expected


def test_draw_follows_the_distribution():
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) * 2
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000  # inverse CDF on a grid is exact
    drawn = draw(logits.expand(len(grid), -1), grid, Sampling(1))
    frequencies = torch.bincount(drawn, minlength=12) / len(grid)
    torch.testing.assert_close(frequencies, torch.softmax(logits[0], -1), atol=2e-5, rtol=0)


def test_draw_at_the_ends_stays_on_tokens_that_may_be_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(3, -1)
    assert draw(logits, torch.tensor([0.0, 0.5, 1 - 1e-16], dtype=torch.float64), Sampling(1)).tolist() == [1, 2, 2]


def test_top_k_and_top_p_by_hand():
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = probabilities.log()[None].expand(1000, -1)
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000

    def share(**restriction):
        return torch.bincount(draw(logits, grid, Sampling(1, **restriction)), minlength=4) / 1000

    torch.testing.assert_close(share(top_k=2), torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=2e-3, rtol=0)
    # 0.4 + 0.3 reaches 0.6, so two tokens make the smallest set
    torch.testing.assert_close(share(top_p=0.6), torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=2e-3, rtol=0)
    torch.testing.assert_close(share(top_k=1), torch.tensor([1.0, 0, 0, 0]))


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
