"""What is good about a reward model and what is suspicious, in plain words, from the numbers on its card.

The rules are few and stated: each looks at one number or one interval, and says nothing where the card lacks
it. The limits are conventions, not laws; each has its reason beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FEW_PAIRS = 100
"""Below this an interval of accuracy is some 20 points wide."""
HIGH_CALIBRATION_ERROR = 0.1
"""Confidence that is off by more than 10 points on average misleads whoever reads margins as odds."""
HIGH_LENGTH_CORRELATION = 0.5
"""Above this, length explains a quarter of the variance of rewards or more."""

LENGTH_RULES = {"over_shorter_wins": "the shorter answer wins", "over_longer_wins": "the longer answer wins"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence about a reward model, and whether it speaks for the model or against it."""

    good: bool
    text: str


def at(values: Any, path: str) -> Any:
    """The value under a dotted path of nested dicts, or None where the card has none."""
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def findings(quality: Mapping[str, Any]) -> list[Finding]:
    """What the numbers of one set of pairs (`reward_quality.as_json`, or a part of it) say."""
    rules = [_enough(quality), _same_for_all(quality), _guessing(quality)]
    rules += [_length_rule(quality, key, rule) for key, rule in LENGTH_RULES.items()]
    rules += [_calibration(quality), _length_correlation(quality)]
    few = _enough(quality) is not None  # then nothing speaks for the model
    return [finding for finding in rules if finding and not (few and finding.good)]


def filled_bins(quality: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The bins of the reliability curve that hold pairs and all their numbers."""
    keys = ("low", "high", "count", "confidence", "correct")
    return [
        b for b in at(quality, "calibration.bins") or [] if b.get("count") and all(b.get(k) is not None for k in keys)
    ]


def headline(name: str, quality: Mapping[str, Any]) -> str | None:
    """One sentence with the accuracy on a set of pairs, or the size of a set of ratings; None without either."""
    if quality.get("attributes"):
        rated = at(quality, "answers")
        return f"On {name} its predictions are compared with {'' if rated is None else f'{rated:,} '}rated answers."
    value, interval = at(quality, "accuracy.value"), at(quality, "accuracy.ci95")
    if value is None:
        return None
    pairs = "" if quality.get("pairs") is None else f" of {quality['pairs']:,} pairs"
    spread = "" if interval is None else f" (95% interval {interval[0]:.0%} to {interval[1]:.0%})"
    return f"On {name} the preferred answer gets the higher reward in {value:.1%}{pairs}{spread}."


def _enough(quality: Mapping[str, Any]) -> Finding | None:
    pairs = quality.get("pairs")
    if pairs is None or pairs >= FEW_PAIRS:
        return None
    return Finding(False, f"Only {pairs} pairs were measured: with other pairs every number here may be quite another.")


def _same_for_all(quality: Mapping[str, Any]) -> Finding | None:
    if quality.get("reward_std") != 0:
        return None
    return Finding(False, "Every answer gets the same reward: the model tells nothing apart.")


def _guessing(quality: Mapping[str, Any]) -> Finding | None:
    interval = at(quality, "accuracy.ci95")
    if interval is None:
        return None
    low, high = interval
    told = f"95% interval of the share right: {low:.1%} to {high:.1%}; guessing gives 50%"
    if low > 0.5:
        return Finding(True, f"It is better than guessing ({told}).")
    if high < 0.5:
        return Finding(False, f"It is worse than guessing ({told}). Are chosen and rejected answers swapped?")
    return Finding(False, f"It is not clearly better than guessing ({told}).")


def _length_rule(quality: Mapping[str, Any], key: str, rule: str) -> Finding | None:
    value, interval = at(quality, f"{key}.value"), at(quality, f"{key}.ci95")
    if value is None or interval is None:
        return None
    low, high = interval
    told = f"{_points(value)} percentage points, 95% interval {_points(low)} to {_points(high)}"
    if low > 0:
        return Finding(True, f"It beats the rule “{rule}” on the same pairs ({told}).")
    if high < 0:
        return Finding(False, f"It loses to the rule “{rule}” on the same pairs ({told}): counting tokens does better.")
    return Finding(
        False, f"It does not clearly beat the rule “{rule}” ({told}): it may have learned little besides length."
    )


def _calibration(quality: Mapping[str, Any]) -> Finding | None:
    error = at(quality, "calibration.expected_error")
    if error is None:
        return None
    told = f"On average its confidence is {error * 100:.1f} percentage points away from how often it is right"
    if error <= HIGH_CALIBRATION_ERROR:
        return Finding(True, f"{told}, so its confidence can be believed.")
    excess = _overconfidence(filled_bins(quality))
    kind = "" if excess is None else f": it is too {'sure of itself' if excess > 0 else 'modest'}"
    return Finding(False, f"{told}{kind}. Do not read the size of a margin as odds.")


def _overconfidence(bins: list[Mapping[str, Any]]) -> float | None:
    """Mean confidence less the share right over all pairs of `bins`; None without any."""
    pairs = sum(b["count"] for b in bins)
    return sum(b["count"] * (b["confidence"] - b["correct"]) for b in bins) / pairs if pairs else None


def _length_correlation(quality: Mapping[str, Any]) -> Finding | None:
    known = [at(quality, f"length_correlation.{kind}") for kind in ("pearson", "spearman")]
    strongest = max((value for value in known if value is not None), key=abs, default=None)
    if strongest is None:
        return None
    told = f"correlation {strongest:+.2f}; 0 is none, +1 and −1 are complete"
    if abs(strongest) <= HIGH_LENGTH_CORRELATION:
        return Finding(True, f"The reward does not mainly follow the length of an answer ({told}).")
    longer = "Longer" if strongest > 0 else "Shorter"
    return Finding(
        False,
        f"{longer} answers get clearly higher rewards ({told}): "
        f"a policy trained on this reward will learn to write {longer.lower()} answers.",
    )


def _points(share: float) -> str:
    return f"{share * 100:+.1f}"


def summary(ref: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """What a training says at its end: how good the model is, what is suspicious, where it is, how to serve it."""
    told = []
    for data, quality in card.get("quality", {}).items():
        told.append(headline(data, quality) or f"On {data}: {_rated(quality)}.")
        told += [f"  {finding.text}" for finding in findings(quality) if not finding.good]
    repository, name = ref["repository"], ref["name"]
    folder = f"{repository}/{name}/{ref['version']}"
    return "\n".join(
        [
            f"{name} version {ref['version']}:",
            *(told or ["not measured: reward_training.held_out and reward_training.test_share name no data"]),
            f"  weights    {folder}/weights",
            f"  report     {folder}/report.html",
            f"  serve      python -m infra.triton --repository {repository} --model {name} --grpc-port 8001",
        ]
    )


def _rated(quality: Mapping[str, Any]) -> str:
    """The attributes of rated answers: error and correlation of each."""
    told = []
    for attribute in quality.get("attributes", []):
        pearson = "none" if attribute["pearson"] is None else f"{attribute['pearson']:.2f}"
        mse = "unknown" if attribute["mse"] is None else f"{attribute['mse']:.3g}"
        told.append(f"{attribute['name']} squared error {mse}, correlation {pearson} ({attribute['count']} ratings)")
    return "; ".join(told) or "nothing was measured"
