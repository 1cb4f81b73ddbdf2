"""Sign test and length-controlled win rate: values by hand, against SciPy and scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LogisticRegression

from alignment.errors import DataError
from alignment.preference_statistics import SignTest, length_controlled_win_rate, sign_test

OUTCOMES = st.sampled_from([-1.0, 0.0, 1.0])


def test_the_sign_test_by_hand() -> None:
    # 4 wins, 1 loss, 1 tie: P(at most 1 or at least 4 of 5) = 2 (1 + 5) / 32
    assert sign_test([1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0]) == SignTest(4, 1, 1, 12 / 32)
    assert sign_test([1.0] * 6, [0.0] * 6).p_value == 2 / 64
    assert sign_test([1.0, 0.0], [0.0, 1.0]).p_value == 1.0
    assert sign_test([1.00004], [1.0]) == SignTest(0, 0, 1, 1.0)  # a tie after rounding: nothing to test


@given(st.lists(OUTCOMES, min_size=1, max_size=300))
def test_the_sign_test_is_scipys_binomial_test(outcomes: list[float]) -> None:
    won, lost, ties, p_value = sign_test(outcomes, [0.0] * len(outcomes))
    assert (won, lost, ties) == (outcomes.count(1.0), outcomes.count(-1.0), outcomes.count(0.0))
    expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert p_value == pytest.approx(expected, rel=1e-9)


def test_many_prompts_overflow_nothing() -> None:
    outcomes = np.r_[np.ones(3000), -np.ones(2700)]
    assert sign_test(outcomes, np.zeros(5700)).p_value == pytest.approx(stats.binomtest(3000, 5700).pvalue, rel=1e-9)


def scikit_learn(outcomes: np.ndarray, x: np.ndarray) -> float:
    """σ(intercept) of scikit-learn's fit with the same penalty; a tie enters as half a win and half a loss."""
    features, labels = np.r_[x, x][:, None], np.r_[np.ones(len(x)), np.zeros(len(x))]
    wins = (np.sign(outcomes) + 1) / 2
    weights = np.r_[wins, 1 - wins]
    kept = weights > 0
    fit = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000)
    fit.fit(features[kept], labels[kept], sample_weight=weights[kept])
    return float(1 / (1 + np.exp(-fit.intercept_[0])))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(OUTCOMES, st.integers(0, 40), st.integers(0, 40)), min_size=2, max_size=60))
def test_the_rate_is_scikit_learns(rows: list[tuple[float, int, int]]) -> None:
    outcomes, ours, theirs = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    rate = length_controlled_win_rate(outcomes, 0 * outcomes, ours, theirs, draws=2).value
    if set(outcomes) in ({1.0}, {-1.0}):
        assert rate == (outcomes[0] == 1.0)
        return
    delta = ours - theirs
    x = np.tanh(delta / delta.std()) if delta.std() else 0 * delta
    assert rate == pytest.approx(scikit_learn(outcomes, x), abs=1e-4)


def test_without_a_difference_of_length_it_is_the_win_rate() -> None:
    # 3 wins, 1 loss, 1 tie: the intercept's best value is the logit of 3.5 / 5
    estimate = length_controlled_win_rate([1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [7] * 5, [7] * 5)
    assert estimate.value == pytest.approx(0.7)
    assert length_controlled_win_rate([1, 1], [0, 0], [3, 9], [3, 4]) == (1.0, (1.0, 1.0))
    assert length_controlled_win_rate([0, 0], [1, 1], [3, 9], [3, 4]) == (0.0, (0.0, 0.0))


def test_wins_that_mirror_in_length_cancel() -> None:
    # Longer by d wins as often as shorter by d loses, so that θ is 0 by symmetry, whatever φ.
    estimate = length_controlled_win_rate(
        [1, 1, 0, 1, 0, 0], [0, 0, 1, 0, 1, 1], [5, 9, 9, 2, 2, 6], [2, 6, 5, 5, 5, 9]
    )
    mirrored = length_controlled_win_rate(
        [0, 0, 1, 0, 1, 1], [1, 1, 0, 1, 0, 0], [2, 6, 5, 5, 5, 9], [5, 9, 9, 2, 2, 6]
    )
    assert estimate.value == pytest.approx(1 - mirrored.value)
    symmetric = length_controlled_win_rate([1, 1, 0, 0], [0, 0, 1, 1], [9, 9, 2, 2], [2, 2, 9, 9])
    assert symmetric.value == pytest.approx(0.5)


def test_a_policy_that_wins_by_length_alone_loses_its_lead() -> None:
    rng = np.random.default_rng(0)
    longer = rng.integers(0, 40, size=400)  # on average 20 longer
    won = rng.random(400) < 1 / (1 + np.exp(-np.tanh(longer / longer.std()) * 3))
    estimate = length_controlled_win_rate(won, np.full(400, 0.5), longer, np.zeros(400))
    assert won.mean() > 0.85
    assert estimate.value < 0.65
    assert estimate.ci95[0] < 0.5 < estimate.ci95[1]


def test_the_interval_covers_the_rate_at_its_own_frequency() -> None:
    truth, covered = 1 / (1 + math.exp(-0.5)), 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        lengths = rng.normal(0.3, 1.0, size=200)
        x = np.tanh(lengths / lengths.std())
        won = rng.random(200) < 1 / (1 + np.exp(-(0.5 + 1.0 * x)))
        low, high = length_controlled_win_rate(won, np.full(200, 0.5), lengths, np.zeros(200), draws=300).ci95
        covered += low <= truth <= high
    assert 0.88 <= covered / 150 <= 0.99


def test_it_is_reproducible() -> None:
    rng = np.random.default_rng(1)
    sides = [rng.normal(size=40) for _ in range(4)]
    assert length_controlled_win_rate(*sides, draws=500) == length_controlled_win_rate(*sides, draws=500)
    assert (
        length_controlled_win_rate(*sides, draws=500).ci95 != length_controlled_win_rate(*sides, draws=500, seed=1).ci95
    )


def test_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match="got 2 and 1"):
        sign_test([1.0, 2.0], [1.0])
    with pytest.raises(DataError, match="one finite number per prompt on both sides, 2 each"):
        length_controlled_win_rate([1, 0], [0, 1], [1, 2, 3], [1, 2, 3])
    with pytest.raises(DataError, match="one finite number per prompt"):
        length_controlled_win_rate([1, 0], [0, 1], [1, float("nan")], [1, 2])
