"""The quality of a reward model: values by hand, then SciPy and scikit-learn on random pairs."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from alignment.errors import DataError
from alignment.reward_quality import PairQuality, as_json, pair_quality, regression_quality
from alignment.statistics import paired_bootstrap

LOG2, LOG6 = math.log(2), math.log(6)
"""A margin of log 2 has the odds 2:1 and a confidence of 2/3, one of log 6 a confidence of 6/7."""


def by_hand() -> PairQuality:
    # Margins log 2, -log 2, 0 and log 6: right, wrong, tie, right. The chosen answer is longer twice, as long, shorter.
    return pair_quality([LOG2, 0.0, 1.0, LOG6], [0.0, LOG2, 1.0, 0.0], [5, 9, 3, 2], [4, 8, 3, 6], seed=0)


def test_loss_accuracy_and_means_by_hand() -> None:
    quality = by_hand()
    assert quality.pairs == 4
    # the mean of -log of 2/3, 1/3, 1/2 and 6/7
    assert quality.loss == pytest.approx(-math.log(2 / 3 * 1 / 3 * 1 / 2 * 6 / 7) / 4)
    assert quality.accuracy.value == 0.625
    assert quality.accuracy.ci95 == paired_bootstrap([1.0, 0.0, 0.5, 1.0], seed=0)
    assert quality.chosen_mean == pytest.approx((LOG2 + LOG6 + 1) / 4)
    assert quality.rejected_mean == pytest.approx((LOG2 + 1) / 4)
    rewards = [LOG2, 0.0, 1.0, LOG6, 0.0, LOG2, 1.0, 0.0]
    assert quality.reward_mean == pytest.approx(sum(rewards) / 8)
    assert quality.reward_std == pytest.approx(math.sqrt(sum((r - sum(rewards) / 8) ** 2 for r in rewards) / 8))


def test_the_length_rules_by_hand() -> None:
    quality = by_hand()
    assert quality.shorter_wins.value == 0.375  # loses twice, ties, wins
    assert quality.longer_wins.value == 0.625
    assert quality.shorter_wins.ci95 == paired_bootstrap([0.0, 0.0, 0.5, 1.0], seed=0)
    assert quality.over_shorter_wins == (0.25, paired_bootstrap([1.0, 0.0, 0.0, 0.0], seed=0))
    assert quality.over_longer_wins == (0.0, paired_bootstrap([0.0, -1.0, 0.0, 1.0], seed=0))


def test_calibration_by_hand() -> None:
    calibration = by_hand().calibration
    assert [b.low for b in calibration.bins] == pytest.approx([0.5 + 0.05 * k for k in range(10)])
    assert [b.high for b in calibration.bins] == pytest.approx([0.55 + 0.05 * k for k in range(10)])
    filled = [(k, b.count, b.confidence, b.correct) for k, b in enumerate(calibration.bins) if b.count]
    assert [(k, count) for k, count, _, _ in filled] == [(0, 1), (3, 2), (7, 1)]
    assert [confidence for *_, confidence, _ in filled] == pytest.approx([1 / 2, 2 / 3, 6 / 7])
    assert [correct for *_, correct in filled] == [0.5, 0.5, 1.0]
    # gaps 0, 1/6 and 1/7 with the weights 1/4, 2/4 and 1/4
    assert calibration.expected_error == pytest.approx(1 / 12 + 1 / 28)
    assert all(b.confidence is None and b.correct is None for b in calibration.bins if not b.count)


def test_a_model_that_is_always_right_is_not_calibrated_by_that_alone() -> None:
    # Always right at a confidence of 2/3: the error is the third by which it was too modest.
    modest = pair_quality([LOG2] * 8, [0.0] * 8, [1] * 8, [1] * 8, seed=0)
    assert modest.calibration.expected_error == pytest.approx(1 / 3)


def test_margins_by_hand() -> None:
    margin = pair_quality([0.0, 1.0, 2.0, 3.0, 10.0], [1.0, 1.0, 1.0, 1.0, 0.0], [1] * 5, [1] * 5, seed=0).margin
    # margins -1, 0, 1, 2, 10: mean 2.4, squares about it 11.56 + 5.76 + 1.96 + 0.16 + 57.76 = 77.2
    assert (margin.mean, margin.std) == (pytest.approx(2.4), pytest.approx(math.sqrt(77.2 / 5)))
    # 5 % lies a fifth of the way from -1 to 0, 95 % four fifths of the way from 2 to 10
    assert margin.quantiles == pytest.approx({"5": -0.8, "25": 0.0, "50": 1.0, "75": 2.0, "95": 8.4})
    assert margin.edges == tuple(range(-10, 11))
    assert margin.counts == (0,) * 9 + (1, 1, 1, 1) + (0,) * 6 + (1,)  # 10 lies in the last bin, its edge


def test_correlation_with_length_by_hand() -> None:
    # Rewards 1, 2, 3, 10 with lengths 1, 2, 4, 3; deviations -3, -2, -1, 6 and -1.5, -0.5, 1.5, 0.5
    quality = pair_quality([1.0, 3.0], [2.0, 10.0], [1, 4], [2, 3], seed=0)
    assert quality.length_correlation.pearson == pytest.approx((4.5 + 1 - 1.5 + 3) / math.sqrt(50 * 5))
    assert quality.length_correlation.spearman == pytest.approx(1 - 6 * (1 + 1) / (4 * 15))  # two ranks off by one


@pytest.mark.parametrize("lengths", [[3, 3, 3], [1, 2, 3]])
def test_what_is_constant_has_no_correlation(lengths: list[int]) -> None:
    quality = pair_quality([0.1] * 3, [0.1] * 3, lengths, lengths, seed=0)
    assert quality.length_correlation.pearson is None and quality.length_correlation.spearman is None
    assert quality.reward_std == 0.0 and quality.margin.std == 0.0
    assert quality.accuracy == (0.5, (0.5, 0.5)) and quality.loss == pytest.approx(math.log(2))
    assert sum(quality.margin.counts) == 3


def test_random_pairs_agree_with_scipy_and_sklearn() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0.7, 1.5, size=500), rng.normal(0.0, 1.5, size=500)
    lengths = rng.integers(1, 40, size=(2, 500))
    chosen += 0.03 * lengths[0]
    quality = pair_quality(chosen, rejected, lengths[0], lengths[1], seed=3)  # type: ignore[arg-type]
    margins = chosen - rejected
    sigmoid = 1 / (1 + np.exp(-margins))
    assert quality.loss == pytest.approx(log_loss(np.ones(500), sigmoid, labels=[0, 1]))
    assert quality.accuracy.value == pytest.approx(np.mean(margins > 0), abs=1 / 500)  # but for ties to 4 decimals
    rewards, tokens = np.concatenate([chosen, rejected]), np.concatenate([lengths[0], lengths[1]])
    assert quality.length_correlation.pearson == pytest.approx(stats.pearsonr(rewards, tokens).statistic)
    assert quality.length_correlation.spearman == pytest.approx(stats.spearmanr(rewards, tokens).statistic)
    # 20 bins over [0, 1] are our 10 over [0.5, 1] where no confidence lies below
    correct, confident = calibration_curve(margins > 0, np.maximum(sigmoid, 1 - sigmoid), n_bins=20)
    filled = [b for b in quality.calibration.bins if b.count]
    assert [b.confidence for b in filled] == pytest.approx(confident)
    assert [b.correct for b in filled] == pytest.approx(correct)
    assert sum(quality.margin.counts) == 500


rewards_of_pairs = st.lists(
    st.tuples(
        st.floats(-50, 50), st.floats(-50, 50), st.integers(0, 1000), st.integers(0, 1000)
    ), min_size=1, max_size=30,
)  # fmt: skip


@settings(max_examples=25, deadline=None, database=None)
@given(rewards_of_pairs)
def test_what_holds_for_all_pairs(pairs: list[tuple[float, float, int, int]]) -> None:
    columns = [list(column) for column in zip(*pairs, strict=True)]
    quality = pair_quality(*columns, seed=0)  # type: ignore[arg-type]
    assert quality.shorter_wins.value + quality.longer_wins.value == pytest.approx(1.0)
    bins = quality.calibration.bins
    assert sum(b.count for b in bins) == sum(quality.margin.counts) == quality.pairs == len(pairs)
    assert sum(b.count * (b.correct or 0.0) for b in bins) / len(pairs) == pytest.approx(quality.accuracy.value)
    assert all(b.low - 1e-9 <= b.confidence <= b.high + 1e-9 for b in bins if b.confidence is not None)
    assert 0.0 <= quality.calibration.expected_error <= 1.0
    assert all(one < next_ for one, next_ in pairwise(quality.margin.edges))
    assert list(quality.margin.quantiles.values()) == sorted(quality.margin.quantiles.values())
    # Swapping the sides of every pair turns the model's verdict round and leaves the rewards what they were.
    swapped = pair_quality(columns[1], columns[0], columns[3], columns[2], seed=0)  # type: ignore[arg-type]
    assert swapped.accuracy.value == pytest.approx(1 - quality.accuracy.value)
    assert swapped.reward_std == pytest.approx(quality.reward_std)
    assert json.loads(json.dumps(as_json(quality), allow_nan=False)) == as_json(quality)


def test_huge_and_tiny_rewards_stay_finite() -> None:
    tiny = pair_quality([1e-200, 3e-200], [2e-200, 4e-200], [1, 3], [2, 4], seed=0)
    assert tiny.length_correlation.pearson == pytest.approx(1.0)
    huge = pair_quality([3e38, 0.0], [0.0, 3e38], [1, 2], [2, 1], seed=0)
    assert huge.loss == pytest.approx(1.5e38) and huge.calibration.expected_error == pytest.approx(0.5)


def test_the_json_names_value_and_interval() -> None:
    plain = as_json(by_hand())
    assert plain["accuracy"] == {"value": 0.625, "ci95": list(by_hand().accuracy.ci95)}
    assert plain["margin"]["edges"][0] == -plain["margin"]["edges"][-1] == pytest.approx(-LOG6)
    assert plain["calibration"]["bins"][1] == {
        "low": pytest.approx(0.55), "high": pytest.approx(0.6), "count": 0, "confidence": None, "correct": None
    }  # fmt: skip
    assert set(plain["length_correlation"]) == {"pearson", "spearman"}


def test_the_seed_moves_intervals_alone() -> None:
    rng = np.random.default_rng(0)
    columns = [*rng.normal(size=(2, 301)).tolist(), *rng.integers(1, 9, size=(2, 301)).tolist()]
    one, other = (pair_quality(*columns, seed=seed) for seed in (0, 1))
    assert one == pair_quality(*columns, seed=0)
    assert one.accuracy.value == other.accuracy.value and one.loss == other.loss
    assert one != other


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([], [], [], []), "there are no held-out pairs"),
        (([1.0, 2.0], [1.0], [1, 1], [1, 1]), "chosen has 2 values and rejected 1: pair 1 is incomplete"),
        (([1.0], [1.0], [1, 1], [1]), "chosen has 1 values and chosen_lengths 2: pair 1"),
        (([1.0], [1.0], [1], []), "rejected_lengths 0: pair 0"),
        (([1.0, math.nan], [1.0, 1.0], [1, 1], [1, 1]), r"chosen\[1\] is nan, not a finite number"),
        (([1.0, 1.0], [-math.inf, 1.0], [1, 1], [1, 1]), r"rejected\[0\] is -inf"),
        (([1.0], [1.0], [math.inf], [1]), r"chosen_lengths\[0\] is inf"),
    ],
)
def test_bad_pairs_are_refused(columns: tuple[list[float], ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pair_quality(*columns, seed=0)  # type: ignore[arg-type]


def test_regression_by_hand() -> None:
    predicted = [[1.0, 0.0, 7.0], [2.0, 0.0, 7.0], [4.0, 0.0, 7.0]]
    labels = [[1.0, 2.0, None], [None, 1.0, None], [2.0, 3.0, None]]
    quality = regression_quality(predicted, labels, ["helpful", "safe", "brief"])
    assert quality.answers == 3
    helpful, safe, brief = quality.attributes
    assert (helpful.name, helpful.count, helpful.mse) == ("helpful", 2, pytest.approx((0 + 4) / 2))
    assert helpful.pearson == pytest.approx(1.0)  # two points always lie on a line
    assert (safe.count, safe.mse, safe.pearson) == (3, pytest.approx((4 + 1 + 9) / 3), None)  # predicted is constant
    assert (brief.count, brief.mse, brief.pearson) == (0, None, None)
    assert as_json(quality)["attributes"][2] == {"name": "brief", "count": 0, "mse": None, "pearson": None}


def test_regression_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.normal(size=(60, 1))
    labels = [[None] if i % 3 == 0 else [float(p[0] + rng.normal())] for i, p in enumerate(predicted)]
    (attribute,) = regression_quality(predicted.tolist(), labels, ["score"]).attributes
    known = [(float(p[0]), label[0]) for p, label in zip(predicted, labels, strict=True) if label[0] is not None]
    x, y = np.array(known).T
    assert (attribute.count, attribute.mse) == (40, pytest.approx(np.mean((x - y) ** 2)))
    assert attribute.pearson == pytest.approx(stats.pearsonr(x, y).statistic)


@pytest.mark.parametrize(
    ("predicted", "labels", "message"),
    [
        ([[1.0, 1.0]], [], "predicted has 1 answers and labels 0"),
        ([[1.0, 1.0], [1.0]], [[1.0, 1.0]] * 2, r"predicted\[1\] has 1 values for the 2 attributes"),
        ([[1.0, 1.0]] * 2, [[1.0, 1.0], [None]], r"labels\[1\] has 1 values"),
        ([[1.0, math.nan]], [[1.0, None]], r"predicted safe\[0\] is nan"),
        ([[1.0, 1.0]] * 2, [[None, 1.0], [math.inf, 1.0]], r"labels helpful\[1\] is inf"),
    ],
)
def test_bad_ratings_are_refused(predicted: list[list[float]], labels: list[list[float | None]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        regression_quality(predicted, labels, ["helpful", "safe"])
