"""Correlation of two vectors, Pearson's and Spearman's. A constant has none: the answer is None, not a number."""

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


def pearson(a: Vector, b: Vector) -> float | None:
    """Pearson's correlation of `a` and `b`, both (N,) of finite values, or None where one is constant."""
    if a.min() == a.max() or b.min() == b.max():
        return None
    x, y = _centred(a), _centred(b)
    return float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1.0, 1.0))


def spearman(a: Vector, b: Vector) -> float | None:
    """Spearman's correlation, which is Pearson's of the ranks, or None where `a` or `b` is constant."""
    return pearson(_ranks(a), _ranks(b))


def _centred(values: Vector) -> Vector:
    """Deviations from the mean as parts of the largest, so that no square over- or underflows."""
    deviations = values - values.mean()
    scaled: Vector = deviations / np.abs(deviations).max()
    return scaled


def _ranks(values: Vector) -> Vector:
    """Ranks from 1; equal values share the mean of theirs."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Vector = (np.cumsum(counts) - (counts - 1) / 2)[index]
    return ranks
