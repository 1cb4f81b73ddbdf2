"""The statistics of a run, each defined once.

A value per prompt goes in, the prompts are the unit of resampling: samples of one prompt are not
independent of each other, prompts are. Intervals are 95 % percentile bootstraps of the mean; a comparison
of two policies is paired, so the differences per prompt are what is resampled. Nothing here measures a
model; `n` and `P` are the responses per prompt and the prompts.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from alignment.errors import DataError
from alignment.selection import REWARD_DECIMALS

Floats = Sequence[float] | npt.NDArray[np.float64]

DRAWS = 10_000
"""Resamples of a bootstrap interval."""
BLOCK = 1 << 20
"""Values resampled at a time: bounds the memory of a bootstrap to some 16 MB whatever the number of prompts."""
LEAST_GAIN = 10.0**-REWARD_DECIMALS
"""Batching moves a score by less."""
LEAST_PROMPTS = 8
"""Fewer say too little about the rest for a bootstrap's interval to be one."""


class Estimate(NamedTuple):
    """A mean over prompts and the ends of its 95 % interval."""

    value: float
    ci95: tuple[float, float]


def paired_bootstrap(values: Floats, *, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of `values` (P,), one value per prompt.

    For a paired comparison the values are the differences per prompt. One value has an interval of no
    width. Raises DataError where there is no value, or one that is not finite.
    """
    array = _vector(values, "values")
    return _middle(np.concatenate([array[drawn].mean(axis=1) for drawn in _resamples(len(array), draws, seed)]))


def mean_difference(aligned: Floats, base: Floats, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean of aligned − base over prompts, both (P,), with its paired interval. Raises DataError."""
    difference = _paired(aligned, base)
    return Estimate(float(difference.mean()), paired_bootstrap(difference, draws=draws, seed=seed))


def ratio_of_means(aligned: Floats, base: Floats, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean of `aligned` over mean of `base`, both (P,), with its paired interval. Raises DataError.

    Prompts are resampled with both of their values; those of the base must be above 0.
    """
    a, b = _vector(aligned, "aligned"), _vector(base, "base")
    _same_length(a, b)
    if (b <= 0).any():
        raise DataError(f"a ratio is over values above 0, and base[{int(np.flatnonzero(b <= 0)[0])}] is not")
    drawn = _resamples(len(a), draws, seed)
    return Estimate(float(a.mean() / b.mean()), _middle(np.concatenate([a[i].sum(1) / b[i].sum(1) for i in drawn])))


def spread(*groups: Floats) -> float:
    """The standard deviation of the first of these sets of scores whose scores differ; 1.0 where none do.

    Batching moves a score in its last bits, so that below LEAST_GAIN they are equal.
    """
    found = (float(_vector(group, "scores").std()) for group in groups)
    return next((deviation for deviation in found if deviation >= LEAST_GAIN), 1.0)


def win_rate(aligned: Floats, base: Floats, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Share of prompts where `aligned` (P,) scores above `base` (P,), ties one half, with its interval.

    Scores are compared rounded to 4 decimals, as selection compares them. Raises DataError.
    """
    wins = preferences(aligned, base)
    return Estimate(float(wins.mean()), paired_bootstrap(wins, draws=draws, seed=seed))


def preferences(aligned: Floats, base: Floats) -> npt.NDArray[np.float64]:
    """1 where `aligned` (P,) is higher, 0.5 at a tie, 0 where it is lower, compared rounded; (P,). Raises DataError."""
    a, b = (np.round(_vector(x, name), REWARD_DECIMALS) for x, name in ((aligned, "aligned"), (base, "base")))
    _same_length(a, b)
    wins: npt.NDArray[np.float64] = (np.sign(a - b) + 1) / 2
    return wins


def best_of_n_kl_bound(n: int) -> float:
    """Upper bound in nats of best-of-n's KL to the policy it samples from: log n − (n − 1)/n.

    Beirami et al., "Theoretical guarantees on the best-of-n alignment policy", 2024. Raises DataError for n < 1.
    """
    if n < 1:
        raise DataError(f"best-of-n needs n >= 1, got {n}")
    return math.log(n) - (n - 1) / n


def best_of_n_win_rate(
    pool_rewards: Sequence[Sequence[float]],
    opponent: Floats,
    judge_pool: Sequence[Sequence[float]],
    judge_opponent: Floats,
) -> tuple[float, float]:
    """Win rates of best-of-n by reward and by judge, against one response per prompt from outside the pool.

    In each prompt's pool of n responses the one with the highest `pool_rewards` (P, n) is picked, ties to
    the lowest index; its reward is compared to `opponent` (P,), its judge score in `judge_pool` (P, n) to
    `judge_opponent` (P,). The judge never picks. Raises DataError for shapes that do not match.
    """
    rewards, judge = _matrix(pool_rewards, "pool_rewards"), _matrix(judge_pool, "judge_pool")
    if rewards.shape != judge.shape:
        raise DataError(f"pool_rewards {rewards.shape} and judge_pool {judge.shape} must have the same shape (P, n)")
    best = np.round(rewards, REWARD_DECIMALS).argmax(axis=1)[:, None]
    by_reward = preferences(np.take_along_axis(rewards, best, axis=1)[:, 0], opponent)
    by_judge = preferences(np.take_along_axis(judge, best, axis=1)[:, 0], judge_opponent)
    return float(by_reward.mean()), float(by_judge.mean())


def expected_best(scores: Sequence[Sequence[float]]) -> list[float]:
    """The expected highest of n scores of a prompt, for n = 1, 2, … up to the fewest that a prompt has; prompts' mean.

    Without bias: it is the mean over all subsets of n of a prompt's N scores. The i-th lowest is the highest of
    C(i − 1, n − 1) of the C(N, n) subsets, so E = Σᵢ C(i − 1, n − 1) / C(N, n) · xᵢ. Raises DataError.
    """
    if not scores:
        raise DataError("the expected best of n needs the scores of one prompt at least")
    curves = [_subset_weights(len(one)) @ one for one in (np.sort(_vector(one, "scores")) for one in scores)]
    most = min(len(curve) for curve in curves)
    best: list[float] = np.mean([curve[:most] for curve in curves], axis=0).tolist()
    return best


@functools.lru_cache(maxsize=8)
def _subset_weights(count: int) -> npt.NDArray[np.float64]:
    """Share of the subsets of n (row n − 1) of `count` scores whose highest is the i-th lowest (column i − 1)."""
    sizes = np.arange(1, count + 1)
    weights = np.zeros((count, count))
    weights[:, -1] = sizes / count
    for i in range(count - 1, 0, -1):  # C(i − 1, n − 1) = C(i, n − 1) · (i − n + 1) / i
        weights[:, i - 1] = weights[:, i] * np.clip(i - sizes + 1, 0, None) / i
    return weights


def best_of_n_curve(
    pool_rewards: Sequence[Sequence[float]],
    opponent: Floats,
    judge_pool: Sequence[Sequence[float]],
    judge_opponent: Floats,
) -> dict[str, dict[str, float]]:
    """`win_rate`, `judge_win_rate` and `kl_bound` of best-of-k for each k from 1 to n, by k as text.

    Of each pool of n the mean over all of its subsets of k responses: the r-th best one (from 0) is the best of
    C(n − 1 − r, k − 1) of the C(n, k). Shapes, ties and errors as in `best_of_n_win_rate`, with which k = n agrees.
    """
    rewards, judge = _matrix(pool_rewards, "pool_rewards"), _matrix(judge_pool, "judge_pool")
    n = rewards.shape[1]
    ranked = np.argsort(-np.round(rewards, REWARD_DECIMALS), axis=1, kind="stable")
    wins = [
        np.array([preferences(column, other).mean() for column in np.take_along_axis(scores, ranked, axis=1).T])
        for scores, other in ((rewards, opponent), (judge, judge_opponent))
    ]
    curve = {}
    for k, is_best in enumerate(_subset_weights(n)[:, ::-1], start=1):
        by_reward, by_judge = (float(is_best @ of_rank) for of_rank in wins)
        curve[str(k)] = {"win_rate": by_reward, "judge_win_rate": by_judge, "kl_bound": best_of_n_kl_bound(k)}
    return curve


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Share of distinct word n-grams among all word n-grams of `texts`; words are split at white space.

    1 means that none repeats, near 0 that the texts are alike. 0.0 where no text has n words.
    """
    grams = [tuple(words[i : i + n]) for words in (text.split() for text in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _resamples(size: int, draws: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of `draws` resamples of `size` prompts, in blocks (rows, size)."""
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // size)
    for start in range(0, draws, rows):
        yield rng.integers(0, size, size=(min(rows, draws - start), size))


def _middle(resampled: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The ends of the middle 95 % of resampled values."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def _paired(aligned: Floats, base: Floats) -> npt.NDArray[np.float64]:
    a, b = _vector(aligned, "aligned"), _vector(base, "base")
    _same_length(a, b)
    return a - b


def _same_length(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> None:
    if len(a) != len(b):
        raise DataError(f"a paired comparison needs one value per prompt on both sides, got {len(a)} and {len(b)}")


def _vector(values: Floats, name: str) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise DataError(f"{name} must hold one number per prompt and at least one, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise DataError(f"{name}[{int(np.flatnonzero(~np.isfinite(array))[0])}] is not a finite number")
    return array


def _matrix(values: Sequence[Sequence[float]], name: str) -> npt.NDArray[np.float64]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except ValueError:
        raise DataError(f"{name} must hold the same number of responses for every prompt") from None
    if array.ndim != 2 or not array.size:
        raise DataError(f"{name} must have the shape (prompts, responses per prompt), got {array.shape}")
    if not np.isfinite(array).all():
        raise DataError(f"{name} has a value that is not finite, at {tuple(np.argwhere(~np.isfinite(array))[0])}")
    return array
