"""Draws report.html: one file without scripts, fonts or network, readable offline, on paper and on a phone.

Responses are untrusted text: Jinja escapes everything, control characters are made visible, and the page's
own content policy forbids scripts and requests. So samples are sorted by CSS alone: each carries its places as
numbers, and a radio button says which of them is the order. Charts are inline SVG, laid out by
`alignment.report_charts`.

An element with a `data-key` holds what report.json has at that path. Where it has a `value`, that is the number or
interval itself, as JSON, and its text is how people read it; else its text is the value.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.charts import SIZE
from alignment.report_charts import charts_of

if TYPE_CHECKING:
    from jinja2 import Environment, Template

MOST_SAMPLES = 200
"""Samples on the page; prompts stand in random order, so that the first ones are like all others."""
ORDERS = (("reward", "reward"), ("judge", "judge's score"), ("tokens", "length"))
"""What samples are sorted by the change of: the end of their fields' names, and what it is called."""


def render_page(report: Mapping[str, Any], verdict: str, samples: Sequence[Any], config: str) -> str:
    """The whole page. `samples` are `report.Sample`s, `config` the text of config.json (shown as it is)."""
    seconds = dict(report["seconds"])
    total = seconds.pop("total")
    if "seconds" in report["evaluation"]:
        seconds["evaluation"] = report["evaluation"]["seconds"]
    shown = samples[:MOST_SAMPLES]
    return page_template("report.html.jinja").render(
        r=report,
        e=report["evaluation"],
        verdict=verdict,
        samples=[(one, ranks) for one, ranks in zip(shown, _ranks(shown), strict=True)],
        orders=ORDERS,
        num_samples=len(samples),
        config=_pretty(config),
        charts=charts_of(report),
        phases=[(name, value, value / total if total else 0.0) for name, value in seconds.items()],
        total_seconds=total,
        size=SIZE,
    )


def _ranks(samples: Sequence[Any]) -> list[dict[str, int]]:
    """Of each sample its place, from 0, by each of the scores in ORDERS: the one that gained most comes first."""
    places: list[dict[str, int]] = [{} for _ in samples]
    for name, _ in ORDERS:
        changes = [getattr(s, f"aligned_{name}") - getattr(s, f"base_{name}") for s in samples]
        for place, i in enumerate(sorted(range(len(samples)), key=lambda i, of=changes: -of[i])):  # type: ignore[misc]
            places[i][name] = place
    return places


def page_template(name: str) -> "Template":
    """A template of this folder: everything is escaped, an undefined name is an error."""
    return _environment().get_template(name)


@cache
def _environment() -> "Environment":
    """The templates' surroundings, made once: they are compiled once then too."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent, "visible": visible}
    return environment


def visible(text: str) -> str:
    """Control characters as their Unicode pictures, lone surrogates as �; line breaks and tabs stay."""
    pictures = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"} | {0x7F: "\u2421"}
    return text.translate(pictures).encode("utf-8", "replace").decode()


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
