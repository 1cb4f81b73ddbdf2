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

Point = tuple[float, float]


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


def line_chart(key: str, title: str, x_label: str, y_label: str, lines: Mapping[str, Sequence[Point]]) -> Chart:
    """A chart of lines by name, x being whole numbers; a line without points is left out, and its style with it."""
    known = {name: points for name, points in lines.items() if points}
    every = [point for points in known.values() for point in points]
    x_axis, y_axis = axis([x for x, _ in every], whole=True), axis([y for _, y in every])
    series = []
    for style, (name, points) in enumerate(lines.items()):
        if not points:
            continue
        placed = [(x_place(x, x_axis), y_place(y, y_axis), f"{name}, step {x:g}: {y:.4g}") for x, y in points]
        series.append(Series(name, style, placed, []))
    told = "; ".join(
        f"{name}: {p[0][1]:.3g} at step {p[0][0]:g}, {p[-1][1]:.3g} at step {p[-1][0]:g}" for name, p in known.items()
    )
    ticks = [(x_place(t, x_axis), f"{t:g}") for t in x_axis], [(y_place(t, y_axis), f"{t:g}") for t in y_axis]
    return Chart(key, title, told, x_label, y_label, *ticks, series)


def axis(values: Sequence[float], whole: bool = False) -> list[float]:
    """Round tick values that span `values`: steps of 1, 2 or 5 times a power of ten, whole ones on request."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high == low:
        low, high = low - 0.5, high + 0.5
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
