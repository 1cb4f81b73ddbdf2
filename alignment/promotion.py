"""The gate at a run's end: whether the evaluated policy is promoted, by rules that must all pass.

It reads the rows of evaluation.json and nothing else but the run's rollback, so that whoever asks again gets the same.
Those prompts chose nothing: the validation's chose the checkpoint among several, and the gain of the best of several is
too large by chance. d are differences aligned − base per prompt, R means over prompts, and each interval is the 95 %
paired bootstrap over prompts of `alignment.statistics`:

reward_gain       the interval of mean d of the rewards lies above min_reward_gain
judge_gain        the interval of mean d of the judge's scores, over their standard deviation for the base, does not
                  reach below −max_judge_fall; likewise shadow_gain:NAME of each shadow
response_length   the interval of R(aligned tokens) / R(base tokens) does not reach above max_length_ratio
kl_to_base        the interval of the mean KL, in nats per response, does not reach above max_kl
distinct_2        distinct_2 of the aligned responses over that of the base's is at least min_distinct_ratio. It has no
                  interval: to draw prompts anew draws texts twice, and repeated texts are just what it counts
rollback          of a run that was rolled back: the evaluated checkpoint is of an RS step before the one that failed

What is to be promoted carries the burden of proof: an interval that leaves a rule open fails it, and more prompts close
it. As all rules must pass, that there are several makes none easier, and none needs a correction. A number that is not
there (no KL between tokenizers, say) fails its rule; a bound of null leaves the rule out, which is said.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from alignment.config_promotion import PromotionSection
from alignment.statistics import (
    LEAST_PROMPTS,
    Estimate,
    distinct_n,
    mean_difference,
    paired_bootstrap,
    ratio_of_means,
    spread,
)

PROMOTED, NOT_PROMOTED = "promoted", "not promoted"

Row = Mapping[str, Any]
Measured = Estimate | float | str
"""An estimate, a value without an interval, or why there is neither."""
Rule = dict[str, Any]
Side = Literal["above", "at least", "at most"]


def gate(
    config: PromotionSection, rows: Sequence[Row], step: int, rollback: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`promotion` of report.json: the verdict on the checkpoint of RS step `step`, with that of each rule.

    `rows` are those of evaluation.json, `rollback` the run's record of that kind. Of a rule that is left out `passed`
    is None; `alias` is the one that a promoted policy gets.
    """
    own = config
    length, kl, distinct = _length_ratio(rows), _kl(rows), _distinct_ratio(rows)
    rules = [
        _rule("reward_gain", _gain(rows), "", "above", "min_reward_gain", own.min_reward_gain),
        *_falls(own.max_judge_fall, rows),
        _rule("response_length", length, "times the base's", "at most", "max_length_ratio", own.max_length_ratio),
        _rule("kl_to_base", kl, "nats per response", "at most", "max_kl", own.max_kl),
        _rule("distinct_2", distinct, "times the base's", "at least", "min_distinct_ratio", own.min_distinct_ratio),
        *([] if rollback is None else [_before_failure(step, rollback["step"])]),
    ]
    passed = all(rule["passed"] is not False for rule in rules)
    keys = ("step", "rule", "value", "ci95", "bound", "reason")
    return {
        "verdict": PROMOTED if passed else NOT_PROMOTED,
        "rules": rules,
        "rolled_back": None if rollback is None else {"to_step": step, **{key: rollback[key] for key in keys}},
        "alias": own.alias if passed else None,
    }


def sentence(promotion: Mapping[str, Any]) -> str:
    """The verdict in one sentence: which rules passed, or which did not."""
    promoted = promotion["verdict"] == PROMOTED
    names = [rule["name"] for rule in promotion["rules"] if rule["passed"] is promoted]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"Promoted: {listed} passed." if promoted else f"Not promoted: {listed} did not pass."


def _falls(most: float | None, rows: Sequence[Row]) -> list[Rule]:
    """The judge's rule and each shadow's."""
    shadows = dict.fromkeys(name for row in rows for name in row.get("base_shadows", {}))
    gains = {"judge_gain": _standardized_gain(rows, "judge")}
    gains |= {f"shadow_gain:{name}": _standardized_gain(rows, "shadows", name) for name in shadows}
    bound = None if most is None else 0.0 - most
    unit = "standard deviations"
    return [_rule(name, gain, unit, "at least", "max_judge_fall", bound) for name, gain in gains.items()]


# What is measured


def _gain(rows: Sequence[Row]) -> Measured:
    base, aligned = _column(rows, "base_reward"), _column(rows, "aligned_reward")
    return _missing(base, aligned) or mean_difference(aligned, base)


def _standardized_gain(rows: Sequence[Row], what: str, name: str | None = None) -> Measured:
    base, aligned = _column(rows, f"base_{what}", name), _column(rows, f"aligned_{what}", name)
    why = _missing(base, aligned)
    if why:
        return why
    gains = np.subtract(aligned, base) / spread(base, [*base, *aligned])
    return Estimate(float(gains.mean()), paired_bootstrap(gains))


def _length_ratio(rows: Sequence[Row]) -> Measured:
    base, aligned = _column(rows, "base_tokens"), _column(rows, "aligned_tokens")
    why = _missing(base, aligned)
    if not why and min(base) <= 0:
        why = "a response of the base has no tokens"
    return why or ratio_of_means(aligned, base)


def _kl(rows: Sequence[Row]) -> Measured:
    nats = _column(rows, "kl_to_base")
    return _missing(nats) or mean_difference(nats, [0.0] * len(nats))


def _distinct_ratio(rows: Sequence[Row]) -> Measured:
    base, aligned = (distinct_n([row[f"{who}_response"] for row in rows]) for who in ("base", "aligned"))
    return aligned / base if base else "no response of the base has two words"


def _column(rows: Sequence[Row], key: str, name: str | None = None) -> list[float]:
    """A number of each row, NaN where it has none."""
    found = [row.get(key) if name is None else row.get(key, {}).get(name) for row in rows]
    return [math.nan if value is None else float(value) for value in found]


def _missing(*columns: Sequence[float]) -> str:
    """Why these numbers, one a prompt in each column, make no interval; "" where they do."""
    prompts = len(columns[0])
    absent = sum(not all(map(math.isfinite, values)) for values in zip(*columns, strict=True))
    if absent:
        return f"{absent} of {prompts} evaluation prompts have no such number"
    few = prompts < LEAST_PROMPTS
    return f"an interval needs {LEAST_PROMPTS} evaluation prompts, and there are {prompts}" if few else ""


# What is decided


def _rule(name: str, measured: Measured, unit: str, side: Side, key: str, bound: float | None) -> Rule:
    value, ci95 = _parts(measured)
    rule: Rule = {"name": name, "value": value, "ci95": ci95, "bound": bound}
    if bound is None:
        return rule | {"passed": None, "reason": f"left out: promotion.{key} is null"}
    if value is None:
        remedy = "" if key == "min_reward_gain" else f"; promotion.{key}=null leaves the rule out"
        return rule | {"passed": False, "reason": f"not measured: {measured}{remedy}"}
    low, high = ci95 or (value, value)
    passed = _holds(side, low, high, bound)
    found = f"the 95% interval {low:+.3f} to {high:+.3f}" if ci95 else f"{value:.3f}"
    wanted = " ".join(filter(None, (side, f"{bound:g}", unit)))
    reason = f"{found} is {'' if passed else 'not '}{wanted}"
    if not passed and _holds(side, value, value, bound):
        reason += ", though its middle is: more prompts (evaluation.num_prompts) would tell"
    return rule | {"passed": passed, "reason": reason}


def _holds(side: Side, low: float, high: float, bound: float) -> bool:
    if side == "above":
        return low > bound
    return low >= bound if side == "at least" else high <= bound


def _before_failure(step: int, failed: int) -> Rule:
    passed = step < failed
    reason = f"RS step {failed} failed badly, and the checkpoint of RS step {step} was evaluated"
    if not passed:
        reason += ": there was none before it"
    return {"name": "rollback", "value": step, "ci95": None, "bound": failed, "passed": passed, "reason": reason}


def _parts(measured: Measured) -> tuple[float | None, list[float] | None]:
    if isinstance(measured, str):
        return None, None
    return (measured.value, list(measured.ci95)) if isinstance(measured, Estimate) else (measured, None)
