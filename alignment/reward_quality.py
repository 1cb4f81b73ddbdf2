"""How good a reward model is on held-out answers: numbers alone, measured from rewards that others computed.

`pair_quality` takes what a model gave to the chosen and the rejected answer of each pair, `regression_quality`
what it predicted for rated answers. Both return frozen carriers; `as_json` makes of them the dict that stands
in a model card under "quality". No model is run here, and nothing is drawn (`alignment.reward_page` draws).

Legend: P pairs, A answers (2P in pairs), K attributes. Rewards are in the model's own unit, a margin is the
chosen answer's reward less the rejected one's. As in selection, rewards are compared rounded to 4 decimals and
a tie counts one half. Intervals are 95 % bootstraps over pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from alignment.correlation import Vector, pearson, spearman
from alignment.errors import DataError
from alignment.selection import REWARD_DECIMALS
from alignment.statistics import Estimate, mean_difference, paired_bootstrap

CONFIDENCE_BINS = 10
"""Bins of the reliability curve over confidences from 0.5 to 1."""
MARGIN_BINS = 20
"""Bins of the margin histogram: an even number, so that zero is an edge and no bin mixes right with wrong."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, slots=True)
class Margins:
    """The distribution of margins over pairs."""

    mean: float
    std: float
    """Population standard deviation."""
    quantiles: dict[str, float]
    """By percent: "5", "25", "50", "75", "95"; linear between order statistics."""
    edges: tuple[float, ...]
    """The histogram's MARGIN_BINS + 1 edges, symmetric about zero."""
    counts: tuple[int, ...]
    """Pairs per bin; a bin holds its lower edge, the last one its upper edge too."""


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Pairs of similar confidence: low < confidence <= high; the first bin holds 0.5 too."""

    low: float
    high: float
    count: int
    confidence: float | None
    """Mean confidence of the bin's pairs; None where it has none."""
    correct: float | None
    """Share of them that the model orders rightly, ties one half; None where it has none."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Whether the model is as often right as it is sure."""

    bins: tuple[ReliabilityBin, ...]
    expected_error: float
    """Mean gap between confidence and share right over the bins, weighted by their pairs; 0 to 1."""


@dataclass(frozen=True, slots=True)
class LengthCorrelation:
    """Correlation of reward with token count over all answers; None where either is the same for all."""

    pearson: float | None
    spearman: float | None


@dataclass(frozen=True, slots=True)
class PairQuality:
    """What `pair_quality` measures on one set of held-out pairs."""

    pairs: int
    loss: float
    """Mean Bradley-Terry loss in nats, −log σ(margin); log 2 = 0.693 is that of a model that is never sure."""
    accuracy: Estimate
    """Share of pairs whose chosen answer has the higher reward."""
    shorter_wins: Estimate
    """Accuracy of the rule that prefers the answer with fewer tokens."""
    longer_wins: Estimate
    """Accuracy of the opposite rule; the two add up to 1."""
    over_shorter_wins: Estimate
    """The model's accuracy less that of `shorter_wins`, paired."""
    over_longer_wins: Estimate
    chosen_mean: float
    rejected_mean: float
    reward_mean: float
    """Mean over all answers."""
    reward_std: float
    """Population standard deviation over all answers: with `reward_mean`, what standardised serving uses."""
    margin: Margins
    calibration: Calibration
    length_correlation: LengthCorrelation


@dataclass(frozen=True, slots=True)
class AttributeQuality:
    """One attribute of rated answers. `mse` is None without a label, `pearson` also where either side is constant."""

    name: str
    count: int
    """Answers that have a label for it."""
    mse: float | None
    """Mean squared error over those, in the label's unit squared."""
    pearson: float | None


@dataclass(frozen=True, slots=True)
class RegressionQuality:
    """What `regression_quality` measures on one set of rated answers."""

    answers: int
    attributes: tuple[AttributeQuality, ...]


def pair_quality(
    chosen: Sequence[float],
    rejected: Sequence[float],
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
    *,
    seed: int,
) -> PairQuality:
    """Measure a reward model by its rewards (P,) of chosen and rejected answers and their token counts (P,).

    `seed` is that of the bootstraps. Raises DataError for no pairs, for sequences that differ in length, and for
    a value that is not finite, with its index.
    """
    preferred, other = _vector(chosen, "chosen"), _vector(rejected, "rejected")
    preferred_tokens = _vector(chosen_lengths, "chosen_lengths")
    other_tokens = _vector(rejected_lengths, "rejected_lengths")
    for name, values in (
        ("rejected", other), ("chosen_lengths", preferred_tokens), ("rejected_lengths", other_tokens),
    ):  # fmt: skip
        if len(values) != len(preferred):
            raise DataError(
                f"chosen has {len(preferred)} values and {name} {len(values)}: "
                f"pair {min(len(preferred), len(values))} is incomplete; give one value per pair in each"
            )
    if not len(preferred):
        raise DataError("there are no held-out pairs to measure a reward model on; give at least one")
    right = _wins(preferred, other)
    shorter, longer = _wins(other_tokens, preferred_tokens), _wins(preferred_tokens, other_tokens)
    margins, rewards = preferred - other, np.concatenate([preferred, other])
    return PairQuality(
        pairs=len(margins),
        loss=float(np.logaddexp(0.0, -margins).mean()),
        accuracy=_share(right, seed),
        shorter_wins=_share(shorter, seed),
        longer_wins=_share(longer, seed),
        over_shorter_wins=mean_difference(right, shorter, seed=seed),
        over_longer_wins=mean_difference(right, longer, seed=seed),
        chosen_mean=float(preferred.mean()),
        rejected_mean=float(other.mean()),
        reward_mean=float(rewards.mean()),
        reward_std=_std(rewards),
        margin=_margins(margins),
        calibration=_calibration(margins, right),
        length_correlation=_length_correlation(rewards, np.concatenate([preferred_tokens, other_tokens])),
    )


def regression_quality(
    predicted: Sequence[Sequence[float]],
    labels: Sequence[Sequence[float | None]],
    attributes: Sequence[str],
) -> RegressionQuality:
    """Measure predicted attribute values (A, K) against `labels` (A, K), where None masks a label.

    Raises DataError for shapes that differ and for a value that is not finite, with the answer's index; a
    prediction has to be finite where its label is masked too.
    """
    if len(predicted) != len(labels):
        raise DataError(f"predicted has {len(predicted)} answers and labels {len(labels)}; give one row per answer")
    for name, rows in (("predicted", predicted), ("labels", labels)):
        for i, row in enumerate(rows):
            if len(row) != len(attributes):
                raise DataError(f"{name}[{i}] has {len(row)} values for the {len(attributes)} attributes {attributes}")
    return RegressionQuality(
        len(predicted),
        tuple(
            _attribute(name, [row[k] for row in predicted], [row[k] for row in labels])
            for k, name in enumerate(attributes)
        ),
    )


def as_json(quality: PairQuality | RegressionQuality) -> dict[str, Any]:
    """The plain dict of a model card: the fields by name, an estimate as {"value", "ci95": [low, high]}."""
    plain: dict[str, Any] = _plain(quality)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return {"value": value.value, "ci95": list(value.ci95)}
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value


def _share(wins: Vector, seed: int) -> Estimate:
    return Estimate(float(wins.mean()), paired_bootstrap(wins, seed=seed))


def _wins(a: Vector, b: Vector) -> Vector:
    """1 where `a` is higher, 0.5 at a tie, 0 where it is lower; (P,)."""
    wins: Vector = (np.sign(np.round(a, REWARD_DECIMALS) - np.round(b, REWARD_DECIMALS)) + 1) / 2
    return wins


def _margins(margins: Vector) -> Margins:
    limit = float(np.abs(margins).max()) or 1.0  # margins that are all zero have no width of their own
    half = MARGIN_BINS // 2
    edges = limit * (np.arange(-half, half + 1) / half)
    counts, _ = np.histogram(margins, bins=edges)
    values = np.quantile(margins, QUANTILES)
    return Margins(
        mean=float(margins.mean()),
        std=_std(margins),
        quantiles={f"{q * 100:g}": float(value) for q, value in zip(QUANTILES, values, strict=True)},
        edges=tuple(float(edge) for edge in edges),
        counts=tuple(int(count) for count in counts),
    )


def _calibration(margins: Vector, right: Vector) -> Calibration:
    """Confidence against share right, and the expected calibration error.

    Guo et al., "On calibration of modern neural networks", 2017, equations 2 and 3. The class that the model
    predicts is the answer it prefers, and its confidence max(p, 1 − p) with p = σ(margin): so 0.5 to 1. Taking
    p against "the chosen one won" instead would be trivial, since the chosen answer always won.
    """
    confidences = 1 / (1 + np.exp(-np.abs(margins)))
    edges = np.linspace(0.5, 1.0, CONFIDENCE_BINS + 1)
    members = np.searchsorted(edges[1:-1], confidences, side="left")
    bins = []
    error = 0.0
    for k in range(CONFIDENCE_BINS):
        inside = members == k
        count = int(inside.sum())
        confidence = float(confidences[inside].mean()) if count else None
        correct = float(right[inside].mean()) if count else None
        bins.append(ReliabilityBin(float(edges[k]), float(edges[k + 1]), count, confidence, correct))
        if confidence is not None and correct is not None:
            error += count / len(margins) * abs(correct - confidence)
    return Calibration(tuple(bins), error)


def _length_correlation(rewards: Vector, lengths: Vector) -> LengthCorrelation:
    return LengthCorrelation(pearson(rewards, lengths), spearman(rewards, lengths))


def _attribute(name: str, predicted: Sequence[float], labels: Sequence[float | None]) -> AttributeQuality:
    values = _vector(predicted, f"predicted {name}")
    known = [i for i, label in enumerate(labels) if label is not None]
    if not known:
        return AttributeQuality(name, 0, None, None)
    # A zero stands where a label is masked, so that an error names the answer's own index.
    truth = _vector([0.0 if label is None else label for label in labels], f"labels {name}")[known]
    values = values[known]
    return AttributeQuality(name, len(known), float(((values - truth) ** 2).mean()), pearson(values, truth))


def _std(values: Vector) -> float:
    """Population standard deviation; exactly 0 for equal values, whose mean may be off by a rounding."""
    return float(values.std()) if values.min() < values.max() else 0.0


def _vector(values: Sequence[float], name: str) -> Vector:
    array = np.asarray(values, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise DataError(f"{name}[{bad[0]}] is {array[bad[0]]}, not a finite number")
    return array
