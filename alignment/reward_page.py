"""Draws the page of a reward model from its model card: one file, readable offline, without scripts.

A card may lack any part, from an older export or a training without held-out data: what is missing is left out,
and the page says so where it matters. Shares its look, its charts and its escaping with the report of a run.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from alignment.charts import SHARES, SIZE, Bar, Chart, Point, Series, axis, line_chart, x_place, y_place
from alignment.report_page import page_template
from alignment.reward_findings import Finding, at, filled_bins, findings, headline

MOST_POINTS = 300
"""Points of a learning curve; longer ones are averaged over blocks of steps."""
CONFIDENCES = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
COUNT_HEIGHT = 0.25
"""Height of the fullest bin's bar in the reliability chart, as a part of the plot."""

UNMEASURED = "This reward model was not measured on held-out data: nothing is known of its quality."
NOTES = {
    "accuracy": "Each bar: share of pairs put in the right order, the line through its top the 95% interval. "
    "The length rules look at nothing but the number of tokens. Dashed: guessing.",
    "reliability": "Each point: pairs of similar confidence. On the dashed line the model is as often right as it is "
    "sure; below it, it is too sure of itself. Grey bars, with their counts: how many pairs.",
    "margin": "Margin: reward of the preferred answer less that of the other. Left of zero, dashed, it is wrong.",
}

ROWS = (
    ("loss", "Loss", "mean −log of the probability given to the preferred answer; 0.693: never decides"),
    ("chosen_mean", "Mean reward, preferred answers", "in the model's own unit"),
    ("rejected_mean", "Mean reward, other answers", "a good model puts it below the line above"),
    ("reward_mean", "Mean reward, all answers", "subtracted where rewards are standardised"),
    ("reward_std", "Standard deviation of rewards", "how far rewards spread; divided by where they are standardised"),
    ("margin.quantiles.5", "Margin that 5% of pairs fall below", "the pairs that the model gets most wrong"),
    ("margin.quantiles.50", "Median margin", "half the pairs lie above it; below 0 the model is wrong"),
    ("margin.quantiles.95", "Margin that 95% of pairs fall below", "above it lie the pairs it is surest of"),
    ("calibration.expected_error", "Expected calibration error", "mean gap of confidence and share right, 0 to 1"),
    ("length_correlation.pearson", "Correlation with length (Pearson)", "reward against tokens; 0 none, ±1 a line"),
    ("length_correlation.spearman", "Correlation with length (Spearman)", "the same of ranks: outliers weigh less"),
)
"""The table of a set: where the number stands, its name, what it means."""


class PairSet(NamedTuple):
    """One set of held-out pairs, ready for the template."""

    name: str
    quality: Mapping[str, Any]
    findings: list[Finding]
    charts: list[Chart]
    rows: list[tuple[str, str, float, str]]
    """Key, name, value and meaning."""
    bins: list[Mapping[str, Any]]
    attributes: list[Mapping[str, Any]]
    """Of rated answers instead of pairs."""


def reward_page(card: Mapping[str, Any]) -> str:
    """The whole page of a model card, in which every part is optional and null means the same as not there."""
    card = _known(card)
    sets = [_pair_set(i, name, quality) for i, (name, quality) in enumerate(card.get("quality", {}).items())]
    told = [sentence for s in sets if (sentence := headline(s.name, s.quality))]
    rest = {key: value for key, value in card.items() if key not in ("training", "quality", "losses")}
    return page_template("reward_page.html.jinja").render(
        card=card,
        sources=at(card, "data.sets") or [],
        verdict=" ".join(told) or UNMEASURED,
        curves=list(_learning_curves(card.get("training", {}))),
        sets=sets,
        rest=json.dumps(rest, indent=2, ensure_ascii=False, default=str),
        size=SIZE,
    )


def _known(value: Any) -> Any:
    """`value` without the null entries of its mappings, at any depth."""
    if isinstance(value, Mapping):
        return {key: _known(inner) for key, inner in value.items() if inner is not None}
    return [_known(inner) for inner in value] if isinstance(value, list | tuple) else value


def _pair_set(index: int, name: str, quality: Mapping[str, Any]) -> PairSet:
    charts = [_accuracy(index, quality), _reliability(index, quality), _margins(index, quality)]
    return PairSet(
        name,
        quality,
        findings(quality),
        [chart for chart in charts if chart],
        [(key, label, value, meaning) for key, label, meaning in ROWS if (value := at(quality, key)) is not None],
        filled_bins(quality),
        quality.get("attributes", []),
    )


def _learning_curves(training: Mapping[str, Any]) -> Iterator[Chart]:
    """Loss of training and of each validation set by step, then the accuracy of each set."""
    validations = training.get("validations", [])

    def by_set(key: str) -> dict[str, list[Point]]:
        lines: dict[str, list[Point]] = {}
        for record in validations:
            if key in record and "step" in record:
                lines.setdefault(record.get("set", "validation"), []).append((record["step"], record[key]))
        return lines

    trained = _training_line(training.get("losses", []))
    no_line: dict[str, list[Point]] = {name: [] for name in trained}  # so that a set has one colour in both charts
    for key, title, y_label, lines in (
        ("loss", "Loss by step", "mean loss, lower is better", trained | by_set("loss")),
        (
            "learning",
            "Share of pairs right by step",
            "share of held-out pairs in the right order",
            no_line | by_set("accuracy"),
        ),
    ):
        if any(lines.values()):
            yield line_chart(key, title, "optimizer step", y_label, lines)


def _training_line(losses: Sequence[float]) -> dict[str, list[Point]]:
    """Losses at steps 1, 2, …, by the line's name; a long list as the means of equal blocks, each at its last step."""
    block = max(1, -(-len(losses) // MOST_POINTS))
    blocks = [losses[start : start + block] for start in range(0, len(losses), block)]
    name = "training batches" if block == 1 else f"training batches, means of {block} steps"
    return {name: [(min((i + 1) * block, len(losses)), sum(b) / len(b)) for i, b in enumerate(blocks)]}


def _accuracy(index: int, quality: Mapping[str, Any]) -> Chart | None:
    """The model's accuracy beside the rules that know nothing but length."""
    known = [
        (name, value, at(quality, f"{key}.ci95"))
        for name, key in (("this model", "accuracy"), ("shorter wins", "shorter_wins"), ("longer wins", "longer_wins"))
        if (value := at(quality, f"{key}.value")) is not None
    ]
    if not known:
        return None
    slots = [0.0, float(len(known))]
    bars, ticks, told = [], [], []
    for i, (name, value, interval) in enumerate(known):
        left, right = x_place(i + 0.25, slots), x_place(i + 0.75, slots)
        whisker = (y_place(interval[1], SHARES), y_place(interval[0], SHARES)) if interval else None
        spread = f", 95% interval {interval[0]:.1%} to {interval[1]:.1%}" if interval else ""
        told.append(f"{name}: {value:.1%}{spread}")
        bars.append(_bar(0 if i == 0 else 1, left, right, y_place(value, SHARES), told[-1], f"{value:.1%}", whisker))
        ticks.append(((left + right) / 2, name))
    return Chart(
        key=f"accuracy-{index}",
        title="Does it know more than length?",
        description="; ".join(told),
        x_label="",
        y_label="share of pairs in the right order",
        x_ticks=ticks,
        y_ticks=_percents(SHARES),
        series=[],
        bars=bars,
        guide=(SIZE["left"], y_place(0.5, SHARES), SIZE["right"], y_place(0.5, SHARES)),
        note=NOTES["accuracy"],
    )


def _reliability(index: int, quality: Mapping[str, Any]) -> Chart | None:
    """Confidence against the share right, over bars of how many pairs each point stands for."""
    filled = filled_bins(quality)
    if not filled:
        return None
    most = max(b["count"] for b in filled)
    bars, points = [], []
    for b in filled:
        left, right = (x_place(b[edge], CONFIDENCES) for edge in ("low", "high"))
        text = f"confidence {b['low']:.0%} to {b['high']:.0%}: {b['count']} pairs, {b['correct']:.1%} right"
        top = y_place(COUNT_HEIGHT * b["count"] / most, SHARES)
        bars.append(_bar(2, left + 1, right - 1, top, text, str(b["count"])))
        points.append((x_place(b["confidence"], CONFIDENCES), y_place(b["correct"], SHARES), text))
    return Chart(
        key=f"reliability-{index}",
        title="Is it right as often as it is sure?",
        description="; ".join(text for *_, text in points),
        x_label="how sure the model is",
        y_label="how often it is right",
        x_ticks=[(x_place(t, CONFIDENCES), f"{t:.0%}") for t in CONFIDENCES],
        y_ticks=_percents(SHARES),
        series=[Series("this model", 0, points, [])],
        bars=bars,
        guide=(x_place(0.5, CONFIDENCES), y_place(0.5, SHARES), x_place(1, CONFIDENCES), y_place(1, SHARES)),
        note=NOTES["reliability"],
    )


def _margins(index: int, quality: Mapping[str, Any]) -> Chart | None:
    """How many pairs have which margin; bars left of zero, where the model is wrong, look another way."""
    edges, counts = at(quality, "margin.edges"), at(quality, "margin.counts")
    if not edges or not counts:
        return None
    x_axis, y_axis = axis(edges), axis([0.0, max(*counts, 1)], whole=True)
    bars = []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        text = f"margin {low:.3g} to {high:.3g}: {count} pairs"
        left, right = x_place(low, x_axis), x_place(high, x_axis)
        bars.append(_bar(0 if high > 0 else 1, left + 0.5, right - 0.5, y_place(count, y_axis), text))
    return Chart(
        key=f"margin-{index}",
        title="How far apart does it put the two answers?",
        description="; ".join(bar.text for bar, count in zip(bars, counts, strict=False) if count),
        x_label="margin, in the model's own unit",
        y_label="pairs",
        x_ticks=[(x_place(t, x_axis), f"{t:g}") for t in x_axis],
        y_ticks=[(y_place(t, y_axis), f"{t:g}") for t in y_axis],
        series=[],
        bars=bars,
        guide=(x_place(0, x_axis), SIZE["top"], x_place(0, x_axis), SIZE["bottom"]),
        note=NOTES["margin"],
    )


def _bar(
    style: int,
    left: float,
    right: float,
    top: float,
    text: str,
    label: str = "",
    whisker: tuple[float, float] | None = None,
) -> Bar:
    """A bar that stands on the plot's bottom."""
    return Bar(style, left, top, right - left, SIZE["bottom"] - top, text, label, whisker)


def _percents(ticks: Sequence[float]) -> list[tuple[float, str]]:
    return [(y_place(t, ticks), f"{t:.0%}") for t in ticks]
