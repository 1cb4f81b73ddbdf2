"""Who wins, looked at twice: with the advantage of length taken out, and against chance.

Both take the scores of the two sides, one per prompt; scores are compared rounded, as in `alignment.statistics`.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from alignment.errors import DataError
from alignment.statistics import BLOCK, DRAWS, Estimate, Floats, preferences

PENALTY = 1.0
"""Weight of ½ φ², which keeps the length's coefficient finite; the intercept θ is free."""
NEWTON_STEPS, LONGEST_STEP = 100, 2.0


class SignTest(NamedTuple):
    """Prompts won, lost and tied, and the chance of a split at least as uneven if both sides were equally good."""

    wins: int
    losses: int
    ties: int
    p_value: float


def sign_test(aligned: Floats, base: Floats) -> SignTest:
    """The exact two-sided sign test over prompts, ties left out: w of n ~ Binomial(n, ½). Raises DataError.

    Both sides are of shape (P,). Without a win or a loss the p-value is 1.
    """
    wins = preferences(aligned, base)
    won, lost = int((wins == 1).sum()), int((wins == 0).sum())
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1))
    return SignTest(won, lost, len(wins) - n, float(min(1.0, 2 * tail / 2**n)))


def length_controlled_win_rate(
    aligned: Floats,
    base: Floats,
    aligned_lengths: Floats,
    base_lengths: Floats,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """The win rate to expect of responses as long as the base's, with its interval. All are of shape (P,).

    Dubois et al. 2024, "Length-Controlled AlpacaEval": logistic regression of the preference on
    x = tanh(Δ / std(Δ)), Δ the aligned response's length minus the base's; the win rate is what the fit
    P(win) = σ(θ + φ x) says at Δ = 0, which is σ(θ). A tie is half a win and half a loss. As there, φ is held
    by a penalty, else responses whose length alone tells the winner would have no fit. Their third term, the
    difficulty of each instruction, is left out: it is estimated from many other models.

    Raises DataError.
    """
    wins = preferences(aligned, base)
    delta = np.subtract(np.asarray(aligned_lengths, dtype=np.float64), np.asarray(base_lengths, dtype=np.float64))
    if delta.shape != wins.shape or not np.isfinite(delta).all():
        raise DataError(f"lengths must be one finite number per prompt on both sides, {len(wins)} each")
    spread = float(delta.std())
    x = np.tanh(delta / spread) if spread else np.zeros_like(delta)
    rng = np.random.default_rng(seed)
    rates = np.empty(draws)
    rows = max(1, BLOCK // (8 * len(x)))
    for start in range(0, draws, rows):
        count = min(rows, draws - start)
        drawn = rng.integers(0, len(x), size=(count, len(x)))
        rates[start : start + count] = _rate_at_equal_length(x[drawn], wins[drawn])
    low, high = np.quantile(rates, [0.025, 0.975])
    return Estimate(float(_rate_at_equal_length(x[None], wins[None])[0]), (float(low), float(high)))


def _rate_at_equal_length(x: npt.NDArray[np.float64], wins: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """σ(θ) of each row's fit, by Newton's method. Shape: x and wins (D, P); returns (D,).

    Where all win, or all lose, θ has no finite best value and σ(θ) is 1 or 0.
    """
    theta, phi = np.zeros(len(x)), np.zeros(len(x))
    share = wins.mean(axis=1)
    certain = (share == 0) | (share == 1)
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-(theta[:, None] + phi[:, None] * x)))
        residual, weight = wins - p, p * (1 - p)
        gradient = np.stack([residual.sum(1), (residual * x).sum(1) - PENALTY * phi])
        a, b, c = weight.sum(1), (weight * x).sum(1), (weight * x * x).sum(1) + PENALTY
        determinant = a * c - b * b
        steps = np.stack([c * gradient[0] - b * gradient[1], a * gradient[1] - b * gradient[0]]) / determinant
        steps = np.where(certain, 0.0, np.clip(steps, -LONGEST_STEP, LONGEST_STEP))
        theta, phi = theta + steps[0], phi + steps[1]
        if np.abs(steps).max() < 1e-9:
            break
    else:
        raise AssertionError(f"no fit after {NEWTON_STEPS} steps")
    rate: npt.NDArray[np.float64] = np.where(certain, share, 1 / (1 + np.exp(-theta)))
    return rate
