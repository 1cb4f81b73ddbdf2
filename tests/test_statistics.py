"""Statistics: values computed by hand, intervals against SciPy's bootstrap."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from alignment.errors import DataError
from alignment.statistics import (
    best_of_n_kl_bound,
    best_of_n_win_rate,
    distinct_n,
    expected_best,
    mean_difference,
    paired_bootstrap,
    ratio_of_means,
    spread,
    win_rate,
)


def scipy_interval(values: np.ndarray) -> tuple[float, float]:
    result = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", random_state=1, batch=1000)
    return result.confidence_interval.low, result.confidence_interval.high


@pytest.mark.parametrize("size", [5, 96, 400])
def test_the_interval_agrees_with_scipy(size: int) -> None:
    values = np.random.default_rng(size).gamma(1.0, size=size)  # skewed
    width = values.std() / math.sqrt(size)
    # Two bootstraps of 10,000 draws differ by Monte-Carlo noise alone: about 0.03 standard errors at an end.
    assert paired_bootstrap(values) == pytest.approx(scipy_interval(values), abs=0.15 * width)


def test_the_interval_of_two_values_by_hand() -> None:
    # Means of two draws of {0, 1}: 0 and 1 with probability 1/4 each, 1/2 with 1/2.
    assert paired_bootstrap([0.0, 1.0]) == (0.0, 1.0)
    # Of 0 and three times 4: mean 0 has probability 1/256, below 2.5 %; mean <= 1 has 13/256 = 5.1 %, above it.
    assert paired_bootstrap([0.0, 4.0, 4.0, 4.0]) == (1.0, 4.0)


def test_the_interval_of_equal_values_has_no_width() -> None:
    assert paired_bootstrap([0.25]) == (0.25, 0.25)
    assert paired_bootstrap([0.25] * 50) == (0.25, 0.25)


def test_the_interval_is_reproducible_and_depends_on_the_seed() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert paired_bootstrap(values) == paired_bootstrap(list(values))
    assert paired_bootstrap(values, seed=1) != paired_bootstrap(values)
    assert paired_bootstrap(values, draws=10) != paired_bootstrap(values)


def test_the_interval_covers_the_mean_at_its_rate() -> None:
    rng = np.random.default_rng(0)
    intervals = [paired_bootstrap(rng.normal(size=60), draws=1000, seed=k) for k in range(300)]
    covered = sum(low <= 0 <= high for low, high in intervals)
    assert 0.90 <= covered / 300 <= 0.98  # 95 % nominal; the percentile bootstrap of 60 values runs a little under


def test_memory_stays_bounded_for_many_prompts() -> None:
    values = np.random.default_rng(0).normal(size=20_000)
    tracemalloc.start()
    paired_bootstrap(values, draws=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # all at once would take 320 MB


def test_mean_difference_is_paired() -> None:
    base = np.random.default_rng(0).normal(scale=100, size=50)
    value, ci95 = mean_difference(base + 1.0, base)
    assert value == pytest.approx(1.0)
    assert ci95 == pytest.approx((1.0, 1.0))  # unpaired, the interval would be some 80 wide
    assert mean_difference([3.0, 1.0], [1.0, 0.0]).value == pytest.approx(1.5)


def test_win_rate_counts_ties_one_half_and_compares_rounded() -> None:
    # win, loss, tie, tie after rounding to 4 decimals
    assert win_rate([2.0, 0.0, 1.0, 1.00004], [1.0, 1.0, 1.0, 1.0]).value == 0.5
    # win, win, loss, tie: 2.5 of 4
    estimate = win_rate([1.0001, 5.0, -1.0, 0.0], [1.0, 1.0, 1.0, -0.0])
    assert estimate.value == 0.625
    assert 0.0 <= estimate.ci95[0] < 0.625 < estimate.ci95[1] <= 1.0
    assert win_rate([1.0, 1.0], [0.0, 0.0]) == (1.0, (1.0, 1.0))


def test_kl_bound_of_best_of_n() -> None:
    assert best_of_n_kl_bound(1) == 0.0
    assert best_of_n_kl_bound(2) == pytest.approx(0.6931472 - 0.5)
    assert best_of_n_kl_bound(8) == pytest.approx(2.0794415 - 0.875)
    with pytest.raises(DataError, match="n >= 1, got 0"):
        best_of_n_kl_bound(0)


def test_best_of_n_is_picked_by_reward_and_judged_by_both() -> None:
    pool = [[0.0, 2.0, 1.0], [5.0, 1.0, 1.0], [1.0, 1.00004, 0.0]]  # picks 1, 0, and 0 by a rounded tie
    judge = [[9.0, 0.1, 9.0], [0.5, 9.0, 9.0], [0.3, 9.0, 9.0]]
    # by reward: 2 > 1 win, 5 < 6 loss, 1 = 1 tie; by judge: 0.1 > 0 win, 0.5 > 0 win, 0.3 = 0.3 tie
    assert best_of_n_win_rate(pool, [1.0, 6.0, 1.0], judge, [0.0, 0.0, 0.3]) == pytest.approx((0.5, 2.5 / 3))


def test_best_of_n_beats_one_sample_as_often_as_theory_says() -> None:
    # Without ties the best of n beats an independent sample of the same law with probability n / (n + 1).
    samples = np.random.default_rng(0).normal(size=(20_000, 9))
    by_reward, by_judge = best_of_n_win_rate(samples[:, :8], samples[:, 8], -samples[:, :8], -samples[:, 8])
    assert by_reward == pytest.approx(8 / 9, abs=0.01)
    assert by_judge == pytest.approx(1 / 9, abs=0.01)  # a judge of the opposite opinion


def test_a_ratio_s_interval_is_scipy_s_paired_one() -> None:
    rng = np.random.default_rng(1)
    base = rng.uniform(5, 30, size=60)
    aligned = 1.3 * base + rng.normal(0, 4, size=60)
    found = ratio_of_means(aligned, base)
    theirs = stats.bootstrap(
        (aligned, base), lambda a, b, axis: a.mean(axis) / b.mean(axis), paired=True, method="percentile", rng=0
    ).confidence_interval
    assert found.value == aligned.mean() / base.mean()
    assert found.ci95 == pytest.approx((theirs.low, theirs.high), abs=0.005)
    # A prompt draws both of its values: one ratio for all has an interval without width.
    assert ratio_of_means(1.25 * base, base).ci95 == pytest.approx((1.25, 1.25))


def test_the_spread_is_that_of_the_first_scores_that_differ() -> None:
    assert spread([0.0, 2.0], [0.0, 8.0]) == 1.0
    assert spread([1.0, 1.00001], [1.0, 7.0]) == 3.0  # batching moves a score by as much
    assert spread([1.0, 1.0]) == 1.0


def test_distinct_bigrams() -> None:
    # "a b c" gives ab, bc; "a b d" gives ab, bd: 3 distinct of 4
    assert distinct_n(["a b c", "a b d"]) == 0.75
    assert distinct_n(["a a a a"]) == pytest.approx(1 / 3)
    assert distinct_n(["a\nb  c", "d"], n=1) == 1.0
    assert distinct_n(["one", ""]) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_bootstrap([]), "at least one"),
        (lambda: paired_bootstrap([0.0, float("nan")]), r"values\[1\] is not a finite number"),
        (lambda: win_rate([1.0, 2.0], [1.0]), "got 2 and 1"),
        (lambda: mean_difference([1.0], [1.0, 2.0]), "got 1 and 2"),
        (lambda: mean_difference([1.0], [float("inf")]), r"base\[0\]"),
        (lambda: ratio_of_means([1.0, 1.0], [1.0, 0.0]), r"values above 0, and base\[1\] is not"),
        (lambda: ratio_of_means([1.0], [1.0, 1.0]), "got 1 and 2"),
        (lambda: best_of_n_win_rate([[1.0, 2.0]], [1.0], [[1.0]], [1.0]), "same shape"),
        (lambda: best_of_n_win_rate([[1.0, 2.0], [1.0]], [1.0], [[1.0]], [1.0]), "same number of responses"),
        (lambda: best_of_n_win_rate([[1.0, 2.0]], [1.0, 1.0], [[1.0, 1.0]], [1.0]), "got 1 and 2"),
        (lambda: best_of_n_win_rate([[1.0, float("nan")]], [1.0], [[1.0, 1.0]], [1.0]), "not finite"),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()  # type: ignore[operator]


def test_the_expected_best_of_n_is_the_mean_over_all_subsets() -> None:
    # of {1, 2, 4}: singles 7/3; pairs (1, 2), (1, 4), (2, 4) have 2, 4, 4; all three 4
    assert expected_best([[4.0, 1.0, 2.0]]) == pytest.approx([7 / 3, 10 / 3, 4.0])
    # a second prompt with {0, 3}: 1.5 and 3; the curve ends with the fewest
    assert expected_best([[4.0, 1.0, 2.0], [3.0, 0.0]]) == pytest.approx([(7 / 3 + 1.5) / 2, (10 / 3 + 3.0) / 2])
    scores = np.random.default_rng(0).normal(size=7)
    for n, best in enumerate(expected_best([scores.tolist()]), start=1):
        assert best == pytest.approx(np.mean([max(subset) for subset in itertools.combinations(scores, n)]))


def test_the_expected_best_needs_scores() -> None:
    for nothing in ([], [[]], [[math.nan]]):
        with pytest.raises(DataError):
            expected_best(nothing)
