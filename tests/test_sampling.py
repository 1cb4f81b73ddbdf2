"""Drawing a token: against transformers' own processors, against exact distributions, and by hand."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alignment.errors import TrainingError
from models.sampling import Sampling, adjusted, before_stop, draw

ENDING = torch.tensor([2, 5])
GRID = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # inverse CDF on a grid is exact


def shares(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """How often each token is drawn from one row of logits."""
    drawn, _ = draw(logits.expand(len(GRID), -1), GRID, sampling)
    return torch.bincount(drawn, minlength=logits.shape[-1]) / len(GRID)


def theirs(logits: torch.Tensor, seen: list[int], drawn: int, sampling: Sampling) -> torch.Tensor:
    """The distribution that transformers' `generate` samples from, in its order of processors."""
    made = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))])
    made.append(MinNewTokensLengthLogitsProcessor(len(seen) - drawn, sampling.min_new_tokens, ENDING))
    made.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        made.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        made.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        made.append(MinPLogitsWarper(sampling.min_p))
    return torch.softmax(made(torch.tensor([seen]), logits), -1)[0]


@given(
    seed=st.integers(0, 10**6),
    seen=st.lists(st.integers(0, 23), min_size=1, max_size=8),
    drawn=st.integers(0, 3),
    min_new_tokens=st.integers(0, 3),
    temperature=st.sampled_from([0.5, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 100]),
    top_p=st.sampled_from([0.1, 0.6, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.4]),
    penalty=st.sampled_from([0.7, 1.0, 1.8]),
)
@settings(deadline=None, max_examples=150)
def test_the_distribution_is_that_of_transformers_generate(
    seed, seen, drawn, min_new_tokens, temperature, top_k, top_p, min_p, penalty
):
    logits = torch.randn(1, 24, generator=torch.Generator().manual_seed(seed)) * 3
    drawn = min(drawn, len(seen))
    sampling = Sampling(9, min_new_tokens, temperature, top_k, top_p, min_p, penalty)
    expected = theirs(logits, seen, drawn, sampling)
    whole = theirs(logits, seen, drawn, Sampling(9, min_new_tokens, temperature, top_k, 1.0, 0.0, penalty))
    ranked = whole.sort(descending=True).values.double()
    assume(bool(((ranked.cumsum(0) - top_p).abs() > 1e-4).all()))  # else rounding decides who belongs to the set
    assume(bool(((ranked / ranked[0] - min_p).abs() > 1e-4).all()))
    wanted = adjusted(logits, sampling, seen=[seen], lengths=[drawn], ending=ENDING)
    torch.testing.assert_close(shares(wanted, sampling), expected, atol=2e-4, rtol=0)


def test_rows_of_a_batch_are_adjusted_each_by_its_own():
    logits = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    sampling, seen = Sampling(9, min_new_tokens=2, repetition_penalty=1.5), [[1, 2], [3], [4, 5, 6, 6]]
    together = adjusted(logits, sampling, seen=seen, lengths=[0, 1, 2], ending=ENDING)
    for i, length in enumerate([0, 1, 2]):
        alone = adjusted(logits[i : i + 1], sampling, seen=[seen[i]], lengths=[length], ending=ENDING)
        assert torch.equal(together[i], alone[0])
    assert together[:, ENDING].isinf().all(-1).tolist() == [True, True, False]


def test_nothing_to_do_changes_nothing():
    logits = torch.randn(2, 24)
    assert adjusted(logits, Sampling(9), seen=[[1], [2]], lengths=[0, 0], ending=ENDING) is logits


def test_draw_follows_the_distribution():
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) * 2
    torch.testing.assert_close(shares(logits, Sampling(1)), torch.softmax(logits[0], -1), atol=1e-4, rtol=0)


def test_draw_at_the_ends_stays_on_tokens_that_may_be_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(3, -1)
    drawn, _ = draw(logits, torch.tensor([0.0, 0.5, 1 - 1e-16], dtype=torch.float64), Sampling(1))
    assert drawn.tolist() == [1, 2, 2]


def test_restrictions_by_hand():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    first_two = torch.tensor([4 / 7, 3 / 7, 0, 0])
    torch.testing.assert_close(shares(logits, Sampling(1, top_k=2)), first_two, atol=1e-4, rtol=0)
    # 0.4 + 0.3 reaches 0.6, so two tokens make the smallest set
    torch.testing.assert_close(shares(logits, Sampling(1, top_p=0.6)), first_two, atol=1e-4, rtol=0)
    torch.testing.assert_close(shares(logits, Sampling(1, min_p=0.7)), first_two, atol=1e-4, rtol=0)
    torch.testing.assert_close(shares(logits, Sampling(1, top_k=1)), torch.tensor([1.0, 0, 0, 0]))


def test_tokens_as_likely_as_the_last_of_top_k_are_kept_as_generate_keeps_them():
    logits = torch.tensor([[4.0, 2.0, 2.0, 1.0]]).log()
    expected = theirs(logits, [0], 0, Sampling(1, top_k=2))
    torch.testing.assert_close(expected, torch.tensor([0.5, 0.25, 0.25, 0]))
    torch.testing.assert_close(shares(logits, Sampling(1, top_k=2)), expected, atol=1e-4, rtol=0)


def test_temperature_zero_takes_the_likeliest_whatever_the_number():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])
    for number in (0.0, 0.99):
        assert draw(logits, torch.full((2,), number), Sampling(1, temperature=0))[0].tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_that_names_the_rate(temperature):
    with pytest.raises(TrainingError, match=r"training\.lr"):
        draw(torch.full((1, 4), float("nan")), torch.tensor([0.5]), Sampling(1, temperature=temperature))


@pytest.mark.parametrize("size", [24, 128, 1000])
@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, temperature=0), Sampling(1, temperature=2.0, top_k=3)])
def test_log_probabilities_are_those_of_the_whole_distribution(size, sampling):
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(2)) * 5 + 100
    numbers = torch.tensor([0.1, 0.5, 0.9, 0.999])
    for wanted in (None, logits - torch.linspace(0, 9, size)):
        tokens, logged = draw(logits, numbers, sampling, wanted=wanted)
        expected = torch.log_softmax(logits.double(), -1)[range(4), tokens]
        torch.testing.assert_close(logged, expected.float(), atol=1e-4, rtol=1e-5)


@given(seed=st.integers(0, 10**6), size=st.sampled_from([1, 5, 128, 129, 1000]), zeros=st.floats(0, 0.99))
@settings(deadline=None, max_examples=60)
def test_a_token_is_where_the_cumulative_distribution_passes_the_number(seed, size, zeros):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, size, generator=generator) * 4
    logits[torch.rand(6, size, generator=generator) < zeros] = -torch.inf
    logits[:, seed % size] = 0.0
    numbers = torch.rand(6, generator=generator, dtype=torch.float64)
    drawn, _ = draw(logits, numbers, Sampling(1))
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    upper = cumulative[range(6), drawn]
    lower = upper - torch.softmax(logits.double(), -1)[range(6), drawn]
    assert bool(((lower - 1e-6 <= numbers) & (numbers <= upper + 1e-6)).all())
    assert bool((logits[range(6), drawn] > -torch.inf).all())


def test_a_text_ends_before_the_first_stop_string():
    assert before_stop("a\n\nHuman: b", ["Human:", "\n\n"]) == "a"
    assert before_stop("a\n\nHuman: b", ["Human:", "b"]) == "a\n\n"
    assert before_stop("stop", ["stop"]) == ""
    assert before_stop("nothing", ["Human:"]) == "nothing"
    assert before_stop("nothing", []) == "nothing"
