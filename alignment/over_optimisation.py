"""The alarm of a run: the reward rises and a shadow, the judge, does not follow. It is told and stops nothing.

A policy that learns what the reward model likes, and not what it stands for, gains reward and nothing else (Gao et
al., "Scaling Laws for Reward Model Overoptimization", 2023). Every validation is compared with the run's first, on the
same prompts; that is the base's, unless the phases run as Metaflow steps. The two scores have no common unit, so each
is divided by its standard deviation over the first validation's responses. The alarm holds where both are true:

1. the reward has risen: the 95 % interval of its mean gain lies above 0;
2. the shadow does not follow: the interval of (gain of the judge − SHARE · gain of the reward) lies below 0, i.e. the
   judge has gained less than SHARE of what the reward has.

Both intervals are paired bootstraps over prompts. So the alarm waits for evidence: a judge that merely shows no clear
gain on few prompts raises none, and the more prompts and the larger the reward's gain, the sooner it comes. With fewer
than LEAST_PROMPTS there is none, since so few say too little about the rest for an interval to be one.

Validations without scores per prompt (by runs that recorded means only) carry no measure of their noise. There the
alarm holds where in the last RUN_LENGTH validations the mean reward lies above the first's and rises each time, and no
mean of the judge lies above the first's. If nothing changed, any three would do so by chance once in 96 times.

Each of `reward_ensemble.shadows` is compared in the judge's place, and has alarms of its own. Where members vote, a
validation's reward is the first member's score.

A gain below LEAST_GAIN is none, and a validation that lacks a score, or has one that is no finite number, raises none.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from alignment.statistics import LEAST_GAIN, LEAST_PROMPTS, paired_bootstrap, spread

SHARE = 1 / 3
"""The least part of the reward's gain that the judge must gain too, both in standard deviations. Two scores
that agree moderately (correlation 0.5) share half of a gain as long as nothing is exploited."""
RUN_LENGTH = 3
"""Validations in a row that the rule for means looks at."""
MOST_POINTS = 40
"""Of a run's course as `gains_by_step` tells it."""

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Alarm:
    """From the validation after RS step `step` on, `who` does not follow the reward; `text` says by how much."""

    step: int
    text: str
    who: str = "the judge"


def alarms(metrics: Sequence[Record]) -> list[Alarm]:
    """The alarms of a run from the records of metrics.jsonl, by step: one each time that the rule begins to hold."""
    told = []
    for who, validations in _by_shadow(metrics).items():
        found = [_alarm(validations[: i + 1], who) for i in range(len(validations))]
        begins = zip([None, *found], found, strict=False)
        told += [now for before, now in begins if now is not None and before is None]
    return sorted(told, key=lambda alarm: alarm.step)


def newest_alarms(metrics: Sequence[Record]) -> list[Alarm]:
    """The alarms that begin with the newest validation: the last of `alarms`, without the work for all."""
    found = (
        _alarm(validations, who)
        for who, validations in _by_shadow(metrics).items()
        if len(validations) > 1 and _alarm(validations[:-1], who) is None
    )
    return [alarm for alarm in found if alarm is not None]


def gains_by_step(metrics: Sequence[Record]) -> list[dict[str, Any]]:
    """What the rule compares, to be looked at: `{"who", "points": [{"step", "gain", "ci95"}]}` of reward and shadows.

    A gain is that since the first validation, in its standard deviations. Validations without a score for each of the
    same prompts are left out, and of very many those that lie between.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for who, validations in _by_shadow(metrics).items():
        usable = [v for v in validations if _usable(v)]
        others = [v for v in usable[1:] if _paired(usable[0], v) and len(v["rewards"]) >= LEAST_PROMPTS]
        shown = others[:: -(-len(others) // MOST_POINTS) or 1]
        for name, key in (("the reward", "rewards"), (who, "judged")):
            if shown and name not in found:
                found[name] = [_point(usable[0], now, key) for now in shown]
    return [{"who": who, "points": points} for who, points in found.items()]


def _point(base: Record, now: Record, key: str) -> dict[str, Any]:
    gains = _gains(base[key], now[key])
    return {"step": now["step"], "gain": float(gains.mean()), "ci95": list(paired_bootstrap(gains))}


def _by_shadow(metrics: Sequence[Record]) -> dict[str, list[Record]]:
    """The validations as the judge's, and once more for each served shadow with its scores in the judge's place."""
    validations = [r for r in metrics if r.get("kind") == "validation"]
    names = dict.fromkeys(name for r in validations for name in r.get("shadow_means", {}))
    return {"the judge": validations} | {
        f"the shadow {name}": [
            {
                **record,
                "judge_mean": record.get("shadow_means", {}).get(name),
                "judged": record.get("shadowed", {}).get(name),
            }
            for record in validations
        ]
        for name in names
    }


def _alarm(validations: Sequence[Record], who: str) -> Alarm | None:
    """Whether the rule holds at the last of these validations; the scores in the judge's place are `who`'s."""
    if not _usable(validations[-1]):
        return None
    base, *others = (v for v in validations if _usable(v))
    now = others[-1] if others else base
    if _paired(base, now):
        return _by_prompts(base, now, who) if len(base["rewards"]) >= LEAST_PROMPTS else None
    return _by_means(base, others[-RUN_LENGTH:], who)


def _usable(record: Record) -> bool:
    """Whether its means are there and all of its scores are finite numbers."""
    scores = [record.get("reward_mean"), record.get("judge_mean")]
    scores += [*(record.get("rewards") or ()), *(record.get("judged") or ())]
    return all(isinstance(score, int | float) and math.isfinite(score) for score in scores)


def _paired(base: Record, now: Record) -> bool:
    """Whether both hold a score for each of the same prompts."""
    return all(base.get(key) and len(base[key]) == len(now.get(key) or ()) for key in ("rewards", "judged"))


def _by_prompts(base: Record, now: Record, who: str) -> Alarm | None:
    reward, judge = (_gains(base[key], now[key]) for key in ("rewards", "judged"))
    risen = paired_bootstrap(reward)
    if risen[0] <= 0:
        return None
    lag = paired_bootstrap(judge - SHARE * reward)
    if lag[1] >= 0:
        return None
    low, high = paired_bootstrap(judge)
    return Alarm(
        now["step"],
        f"since RS step {base['step']} the reward has risen by {reward.mean():.2f} standard deviations (95% "
        f"{risen[0]:+.2f} to {risen[1]:+.2f}) and {who} by {judge.mean():+.2f} (95% {low:+.2f} to {high:+.2f}), "
        f"clearly less than {SHARE:.0%} of it: {_REMEDY}",
        who,
    )


def _by_means(base: Record, last: Sequence[Record], who: str) -> Alarm | None:
    rewards = [base["reward_mean"], *(r["reward_mean"] for r in last)]
    rising = all(after - before >= LEAST_GAIN for before, after in itertools.pairwise(rewards))
    if len(last) < RUN_LENGTH or not rising or any(r["judge_mean"] - base["judge_mean"] >= LEAST_GAIN for r in last):
        return None
    return Alarm(
        last[-1]["step"],
        f"the mean reward has risen in {RUN_LENGTH} validations, from {rewards[0]:.3f} at RS step {base['step']} to "
        f"{rewards[-1]:.3f}, and {who}'s lies no higher than then in any of them: {_REMEDY}",
        who,
    )


_REMEDY = (
    "the policy may be exploiting the reward model. Read the samples; a lower training.lr, fewer steps or a better "
    "reward model help"
)


def _gains(base: Sequence[float], now: Sequence[float]) -> npt.NDArray[np.float64]:
    """Gain per prompt (P,) in standard deviations of the scores before; of all scores where those are equal."""
    before, after = np.asarray(base, dtype=np.float64), np.asarray(now, dtype=np.float64)
    gains = after - before
    gains[np.abs(gains) < LEAST_GAIN] = 0.0
    return gains / spread(before, np.concatenate([before, after]))
