"""The table of `benchmarks.method`: what an arm, or best of n, reached against the base over all seeds.

Seeds that evaluate on the same prompt say more of that prompt, they are no further prompts: values are averaged by
prompt first, and the intervals are over prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from alignment.config import Config
from alignment.selection import REWARD_DECIMALS
from alignment.statistics import Estimate, Floats, best_of_n_kl_bound, mean_difference, preferences

Sides = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Scores of an arm's responses and of the base's to the same prompts, (P,) each."""


@dataclass(frozen=True)
class Row:
    """A line of the table: what an arm, or best of n, reached against the base; seeds are pooled by prompt."""

    name: str
    kl: Estimate
    reward_gain: Estimate
    judge_gain: Estimate
    win_rate: Estimate
    judge_win_rate: Estimate
    responses: int

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        estimates = {key: value for key, value in self.__dict__.items() if isinstance(value, Estimate)}
        return {**self.__dict__, **{k: {"value": v.value, "ci95": list(v.ci95)} for k, v in estimates.items()}}


def compared(name: str, points: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], config: Config) -> Row:
    """An arm's responses against the base's first ones; points and base have one entry a seed."""
    rollouts, ids = config.rollouts, [point["prompts"] for point in points]
    rewards, judged = (
        [(_column(p[key], 0), _column(b[key], 0)) for p, b in zip(points, base, strict=True)]
        for key in ("reward", "judge")
    )
    responses = points[0]["step"] * rollouts.num_rollout_samples * rollouts.num_rollouts_per_prompt
    return Row(name, pooled(ids, [point["kl"] for point in points]), *_against(ids, rewards, judged), responses)


def best_of(n: int, base: Sequence[dict[str, Any]]) -> Row:
    """Best of n of the base by the reward model, from a pool that the opponent is not in; its KL is a bound."""
    rewards, judged = [], []
    for seed in base:
        pool = np.array(seed["reward"])[:, 1 : n + 1]
        best = np.round(pool, REWARD_DECIMALS).argmax(axis=1) + 1  # as selection compares them
        for key, sides in (("reward", rewards), ("judge", judged)):
            sides.append((_column(seed[key], best), _column(seed[key], 0)))
    bound = best_of_n_kl_bound(n)
    ids = [seed["prompts"] for seed in base]
    return Row(f"best of {n}", Estimate(bound, (bound, bound)), *_against(ids, rewards, judged), 0)


def pooled(ids: Sequence[Sequence[str]], values: Sequence[Floats]) -> Estimate:
    """The mean over prompts; of each seed the ids of its prompts and a value for each.

    A prompt's value is the mean over the seeds in which it occurs: those of one prompt depend on each other, so the
    interval is over prompts.
    """
    by_prompt: dict[str, list[float]] = {}
    for names, numbers in zip(ids, values, strict=True):
        for name, number in zip(names, numbers, strict=True):
            by_prompt.setdefault(name, []).append(float(number))
    means = [float(np.mean(numbers)) for numbers in by_prompt.values()]
    return mean_difference(means, np.zeros(len(means)))


def _against(ids: Sequence[Sequence[str]], rewards: Sequence[Sides], judged: Sequence[Sides]) -> Iterator[Estimate]:
    """Gain by reward and by the judge, then win rate by reward and by the judge; of each seed both sides' scores."""
    for sides in (rewards, judged):
        yield pooled(ids, [ours - theirs for ours, theirs in sides])
    for sides in (rewards, judged):
        yield pooled(ids, [preferences(ours, theirs) for ours, theirs in sides])


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, with 95 % intervals over prompts."""
    lines = [
        "| | KL, nats | win rate by the judge | win rate by reward | judge's gain | reward's gain | responses |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kl = f"≤ {row.kl.value:.2f}" if not row.responses else _shown(row.kl, ".2f")
        cells = [kl, _shown(row.judge_win_rate, ".3f"), _shown(row.win_rate, ".3f")]
        cells += [_shown(row.judge_gain, "+.2f"), _shown(row.reward_gain, "+.2f"), str(row.responses or "")]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(estimate: Estimate, form: str) -> str:
    low, high = estimate.ci95
    return f"{estimate.value:{form}} ({low:{form}} to {high:{form}})"


def _column(groups: Sequence[Sequence[float]], which: Any) -> npt.NDArray[np.float64]:
    """Of each prompt's scores the one at `which`, an index for all or for each."""
    scores: npt.NDArray[np.float64] = np.array(groups)
    chosen: npt.NDArray[np.float64] = scores[np.arange(len(scores)), which]
    return chosen
