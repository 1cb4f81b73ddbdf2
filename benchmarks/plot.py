"""A line chart as one SVG file, drawn without a plotting library."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 40, 56
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
"""Distinct also to colour-blind readers (Okabe and Ito)."""

Points = Sequence[tuple[float, float]]


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[str, Points],
    *,
    logarithmic: bool = True,
    logarithmic_y: bool = False,
    bottom: float = 0,
) -> str:
    """The chart's SVG text. A `logarithmic` x axis (to base 2) takes positive x; the y axis begins at `bottom`.

    With `logarithmic_y` it takes positive y, begins at a power of ten, and needs no `bottom`.
    """
    xs = sorted({x for points in lines.values() for x, _ in points})
    ys = [y for points in lines.values() for _, y in points]
    ticks = _powers(min(ys), max(ys)) if logarithmic_y else _ticks(bottom, max(ys))
    x_ticks = xs if logarithmic else _ticks(0, xs[-1])

    def place_x(x: float) -> float:
        span = (math.log2(xs[-1] / xs[0]) or 1.0) if logarithmic else x_ticks[-1]
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log2(x / xs[0]) if logarithmic else x) / span

    def place_y(y: float) -> float:
        if logarithmic_y:
            share = math.log10(y / ticks[0]) / math.log10(ticks[-1] / ticks[0])
        else:
            share = (y - bottom) / (ticks[-1] - bottom)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [_text(WIDTH / 2, 22, title, "middle", 15)]
    for y in ticks:
        parts.append(f'<path d="M{LEFT} {place_y(y):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 8, place_y(y) + 4, f"{y:g}", "end"))
    parts += [_text(place_x(x), HEIGHT - BOTTOM + 18, f"{x:g}", "middle") for x in x_ticks]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x_label, "middle"))
    parts.append(f'<g transform="rotate(-90 16 {HEIGHT / 2})">{_text(16, HEIGHT / 2, y_label, "middle")}</g>')
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        placed = [(place_x(x), place_y(y)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (length, rate) in zip(placed, points, strict=True):
            told = escape(f"{name}, {length:g}: {rate:.4g}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{told}</title></circle>')
        parts.append(_text(WIDTH - RIGHT + 12, TOP + 18 * number + 10, name, "start", colour=colour))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" role="img" '
        f'aria-label="{escape(title)}">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str, size: int = 12, colour: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """About six round values from `low` to `high` or just above."""
    step = _round_step((high - low) / 5)
    return [round(low + step * k, 10) for k in range(math.ceil((high - low) / step - 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """The powers of ten from `low` or just below to `high` or just above, two at least."""
    first = math.floor(math.log10(low))
    return [10.0**k for k in range(first, max(first + 1, math.ceil(math.log10(high))) + 1)]


def _round_step(rough: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
