"""Lays out charts: values become positions in SVG units. charts.html.jinja draws what is laid out here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 10, 50
"""Size of a chart and of the margins around its plot, in SVG units."""
SIZE = {"w": WIDTH, "h": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM}
"""The same as the templates take it: the plot's edges instead of its margins."""
TICKS = 5
LEAST_SPAN = 1e-9
"""Values that differ by less, or by less than this share of the largest, are drawn as equal: means of the same numbers,
summed in another order, are not quite."""

SHARES = [0.0, 0.25, 0.5, 0.75, 1.0]
"""Ticks of an axis of shares."""

Point = tuple[float, float]
Interval = Sequence[float]
"""Its two ends."""


@dataclass(frozen=True)
class Series:
    """One line of a chart, or one point with whiskers; positions in SVG units. `style` picks colour and mark."""

    name: str
    style: int
    points: list[tuple[float, float, str]]
    """x, y and the text shown for the point."""
    whiskers: list[tuple[float, float, float, float]]
    """Segments x1, y1, x2, y2."""

    @property
    def path(self) -> str:
        """The `points` attribute of the polyline."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in self.points)


@dataclass(frozen=True)
class Bar:
    """An upright bar, its left, top, width and height in SVG units."""

    style: int
    x: float
    y: float
    width: float
    height: float
    text: str
    """What a pointer or a screen reader is told about the bar."""
    label: str = ""
    """What stands above it."""
    whisker: tuple[float, float] | None = None
    """Upper and lower end of its interval."""


@dataclass(frozen=True)
class Chart:
    """A laid-out chart; ticks are (position, label)."""

    key: str
    title: str
    description: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    series: list[Series]
    bars: list[Bar] = field(default_factory=list)
    guide: tuple[float, float, float, float] | None = None
    """A dashed line to compare with, x1, y1, x2, y2."""
    note: str = ""
    """How to read the chart, in words."""


def line_chart(
    key: str,
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[str, Sequence[Point]],
    note: str = "",
    intervals: Mapping[str, Sequence[Interval]] | None = None,
    *,
    with_zero: bool = False,
) -> Chart:
    """A chart of lines by name, x being whole numbers; a line without points is left out, and its style with it.

    `intervals` are those of each point of the lines that have any; `with_zero` puts 0 on the upright axis.
    """
    spans = intervals or {}
    known = {name: points for name, points in lines.items() if points}
    every = [point for points in known.values() for point in points]
    ends = [end for of_line in spans.values() for ends in of_line for end in ends]
    ends += [0.0] if with_zero and every else []
    x_axis, y_axis = (
        axis([x for x, _ in every], whole=True),
        axis([*(y for _, y in every), *ends]),
    )
    series = []
    for style, (name, points) in enumerate(lines.items()):
        if not points:
            continue
        placed = [(x_place(x, x_axis), y_place(y, y_axis), f"{name}, step {x:g}: {y:.4g}") for x, y in points]
        whiskers = [
            (x_place(x, x_axis), y_place(low, y_axis), x_place(x, x_axis), y_place(high, y_axis))
            for (x, _), (low, high) in zip(points, spans.get(name, ()), strict=False)
        ]
        series.append(Series(name, style, placed, whiskers))
    told = "; ".join(
        f"{name}: {p[0][1]:.3g} at step {p[0][0]:g}, {p[-1][1]:.3g} at step {p[-1][0]:g}" for name, p in known.items()
    )
    ticks = [(x_place(t, x_axis), f"{t:g}") for t in x_axis], [(y_place(t, y_axis), f"{t:g}") for t in y_axis]
    return Chart(key, title, told, x_label, y_label, *ticks, series, note=note)


def dot_chart(key: str, title: str, y_label: str, values: Mapping[str, tuple[float, Interval]]) -> Chart:
    """A point with its interval for each name, side by side."""
    slots = [0.0, float(len(values))]
    y_axis = axis([y for value, interval in values.values() for y in (value, *interval)])
    series, x_ticks = [], []
    for style, (name, (value, (low, high))) in enumerate(values.items()):
        x, text = x_place(style + 0.5, slots), f"{name}: {value:.4g}, 95% interval {low:.4g} to {high:.4g}"
        whisker = (x, y_place(low, y_axis), x, y_place(high, y_axis))
        series.append(Series(name, style, [(x, y_place(value, y_axis), text)], [whisker]))
        x_ticks.append((x, name))
    told = "; ".join(s.points[0][2] for s in series)
    y_ticks = [(y_place(t, y_axis), f"{t:g}") for t in y_axis]
    return Chart(key, title, told, "", y_label, x_ticks, y_ticks, series)


def share_chart(
    key: str,
    title: str,
    x_label: str,
    curve_name: str,
    curve: Mapping[str, Point],
    dots: Mapping[str, tuple[tuple[float, Interval], tuple[float, Interval]]],
    note: str,
) -> Chart:
    """Shares over x from 0: a curve of named points, and for each name a point with an interval both ways.

    A dashed line marks one half.
    """
    x_axis = axis([0.0, *(x for x, _ in curve.values()), *(v for (x, ends), _ in dots.values() for v in (x, *ends))])
    placed = [
        (x_place(x, x_axis), y_place(y, SHARES), f"{name}: {y:.1%} at no more than {x:.3g}")
        for name, (x, y) in curve.items()
    ]
    series = [Series(curve_name, 2, placed, [])] if placed else []
    for style, (name, ((x, x_ends), (y, y_ends))) in enumerate(dots.items()):
        at = x_place(x, x_axis), y_place(y, SHARES)
        text = (
            f"{name}: {y:.1%} (95% {y_ends[0]:.1%} to {y_ends[1]:.1%}) at {x:.3g} ({x_ends[0]:.3g} to {x_ends[1]:.3g})"
        )
        whiskers = [
            (x_place(x_ends[0], x_axis), at[1], x_place(x_ends[1], x_axis), at[1]),
            (at[0], y_place(y_ends[0], SHARES), at[0], y_place(y_ends[1], SHARES)),
        ]
        series.append(Series(name, style, [(*at, text)], whiskers))
    told = "; ".join(text for s in series for *_, text in s.points)
    ticks = [(x_place(t, x_axis), f"{t:g}") for t in x_axis], [(y_place(t, SHARES), f"{t:.0%}") for t in SHARES]
    half = (SIZE["left"], y_place(0.5, SHARES), SIZE["right"], y_place(0.5, SHARES))
    return Chart(key, title, told, x_label, "win rate", *ticks, series, guide=half, note=note)


def axis(values: Sequence[float], whole: bool = False) -> list[float]:
    """Round tick values that span `values`: steps of 1, 2 or 5 times a power of ten, whole ones on request."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    size = max(abs(low), abs(high))
    if high - low <= LEAST_SPAN * max(1.0, size):
        margin = max(0.5, 1e-6 * size)
        low, high = low - margin, high + margin
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def x_place(value: float, ticks: Sequence[float]) -> float:
    """Where `value` lies across a chart whose axis has these tick values."""
    return LEFT + (WIDTH - LEFT - RIGHT) * (value - ticks[0]) / (ticks[-1] - ticks[0])


def y_place(value: float, ticks: Sequence[float]) -> float:
    """Where `value` lies down a chart whose axis has these tick values."""
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - ticks[0]) / (ticks[-1] - ticks[0])
