"""Draws report.html: one file without scripts, fonts or network, readable offline and on a phone.

Responses are untrusted text: Jinja escapes everything, control characters are made visible, and the page's
own content policy forbids scripts and requests. Charts are inline SVG; here they are only laid out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 10, 50
"""Size of a chart and of the margins around its plot, in SVG units."""
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


def render_page(report: Mapping[str, Any], verdict: str, samples: Sequence[Any], config: str) -> str:
    """The whole page. `samples` are `report.Sample`s, `config` the text of config.json (shown as it is)."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent, "visible": visible}
    seconds = dict(report["seconds"])
    total = seconds.pop("total")
    if "seconds" in report["evaluation"]:
        seconds["evaluation"] = report["evaluation"]["seconds"]
    return environment.get_template("report.html.jinja").render(
        r=report,
        e=report["evaluation"],
        verdict=verdict,
        samples=samples,
        config=_pretty(config),
        charts=[chart for chart in _charts(report) if chart.series],
        phases=[(name, value, value / total if total else 0.0) for name, value in seconds.items()],
        total_seconds=total,
        size={"w": WIDTH, "h": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM},
    )


def visible(text: str) -> str:
    """Control characters as their Unicode pictures, lone surrogates as �; line breaks and tabs stay."""
    pictures = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"} | {0x7F: "\u2421"}
    return text.translate(pictures).encode("utf-8", "replace").decode()


def _charts(report: Mapping[str, Any]) -> list[Chart]:
    steps, validations = report["steps"], report["validation"]

    def line(records: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
        return [(r["step"], r[key]) for r in records if r[key] is not None]

    rewards = {
        "All rollouts": line(steps, "reward_mean"),
        "Selected rollouts": line(steps, "selected_reward_mean"),
        "Validation": line(validations, "reward_mean"),
    }
    return [
        _line_chart("rewards", "Mean reward by step", "mean reward", rewards),
        _line_chart(
            "judge", "Validation: judge by step", "mean judge score", {"Judge": line(validations, "judge_mean")}
        ),
        _frontier(report["evaluation"]),
    ]


def _line_chart(key: str, title: str, y_label: str, lines: Mapping[str, Sequence[Point]]) -> Chart:
    known = {name: points for name, points in lines.items() if points}
    every = [point for points in known.values() for point in points]
    x_axis, y_axis = _axis([x for x, _ in every], whole=True), _axis([y for _, y in every])
    series = []
    for style, (name, points) in enumerate(known.items()):
        placed = [(_x(x, x_axis), _y(y, y_axis), f"{name}, step {x:g}: {y:.4g}") for x, y in points]
        series.append(Series(name, style, placed, []))
    told = "; ".join(
        f"{name}: {p[0][1]:.3g} at step {p[0][0]:g}, {p[-1][1]:.3g} at step {p[-1][0]:g}" for name, p in known.items()
    )
    ticks = [(_x(t, x_axis), f"{t:g}") for t in x_axis], [(_y(t, y_axis), f"{t:g}") for t in y_axis]
    return Chart(key, title, told, "RS step", y_label, *ticks, series)


def _frontier(evaluation: Mapping[str, Any]) -> Chart:
    """Win rate against KL: what was won, and how far the policy moved for it. Best-of-n's KL is an upper bound."""
    best, kl = evaluation["best_of_n"], evaluation["aligned"]["kl_to_base"]
    low, high = evaluation["aligned"]["kl_to_base_ci95"]
    x_axis = _axis([0.0, high, kl, best["kl_bound"]])
    y_axis = [0.0, 0.25, 0.5, 0.75, 1.0]
    series: list[Series] = []
    for name, key in (("Aligned, by reward", "win_rate"), ("Aligned, by judge", "judge_win_rate")):
        rate, (bottom, top) = evaluation[key], evaluation[f"{key}_ci95"]
        x, y = _x(kl, x_axis), _y(rate, y_axis)
        whiskers = [
            (_x(low, x_axis), y, _x(high, x_axis), y),
            (x, _y(bottom, y_axis), x, _y(top, y_axis)),
        ]
        series.append(Series(name, len(series), [(x, y, f"{name}: {rate:.1%} at {kl:.3g} nats")], whiskers))
    for name, key in (
        (f"Best of {best['n']}, by reward", "win_rate"),
        (f"Best of {best['n']}, by judge", "judge_win_rate"),
    ):
        text = f"{name}: {best[key]:.1%} at no more than {best['kl_bound']:.3g} nats"
        series.append(Series(name, len(series), [(_x(best["kl_bound"], x_axis), _y(best[key], y_axis), text)], []))
    told = "; ".join(s.points[0][2] for s in series)
    ticks = [(_x(t, x_axis), f"{t:g}") for t in x_axis], [(_y(t, y_axis), f"{t:.0%}") for t in y_axis]
    return Chart(
        "frontier",
        "Win rate against KL to the base",
        told,
        "KL to the base, nats per response",
        "win rate",
        *ticks,
        series,
    )


def _axis(values: Sequence[float], whole: bool = False) -> list[float]:
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


def _x(value: float, axis: Sequence[float]) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (value - axis[0]) / (axis[-1] - axis[0])


def _y(value: float, axis: Sequence[float]) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - axis[0]) / (axis[-1] - axis[0])


def _number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    if value is None:
        return "–"
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"


def _pretty(config: str) -> str:
    try:
        return json.dumps(json.loads(config), indent=2, ensure_ascii=False)
    except ValueError:
        return config  # shown as it was written
