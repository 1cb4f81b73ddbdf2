"""Draws report.html: one file without scripts, fonts or network, readable offline and on a phone.

Responses are untrusted text: Jinja escapes everything, control characters are made visible, and the page's
own content policy forbids scripts and requests. Charts are inline SVG; here they are only laid out.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.charts import SIZE, Chart, Point, Series, axis, line_chart, x_place, y_place

if TYPE_CHECKING:
    from jinja2 import Environment, Template


def render_page(report: Mapping[str, Any], verdict: str, samples: Sequence[Any], config: str) -> str:
    """The whole page. `samples` are `report.Sample`s, `config` the text of config.json (shown as it is)."""
    seconds = dict(report["seconds"])
    total = seconds.pop("total")
    if "seconds" in report["evaluation"]:
        seconds["evaluation"] = report["evaluation"]["seconds"]
    return page_template("report.html.jinja").render(
        r=report,
        e=report["evaluation"],
        verdict=verdict,
        samples=samples,
        config=_pretty(config),
        charts=[chart for chart in _charts(report) if chart.series],
        phases=[(name, value, value / total if total else 0.0) for name, value in seconds.items()],
        total_seconds=total,
        size=SIZE,
    )


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


def _charts(report: Mapping[str, Any]) -> list[Chart]:
    steps, validations = report["steps"], report["validation"]

    def line(records: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
        return [(r["step"], r[key]) for r in records if r[key] is not None]

    rewards = {
        "All rollouts": line(steps, "reward_mean"),
        "Selected rollouts": line(steps, "selected_reward_mean"),
        "Validation": line(validations, "reward_mean"),
    }
    judged = {
        "All rollouts": line(steps, "judge_mean"),
        "Selected rollouts": line(steps, "selected_judge_mean"),
        "Validation": line(validations, "judge_mean"),
    }
    return [
        line_chart("rewards", "Mean reward by step", "RS step", "mean reward", rewards),
        line_chart("judge", "Mean judge score by step", "RS step", "mean judge score", judged),
        *_model_charts(steps, validations),
        *([] if report["evaluation"]["aligned"]["kl_to_base"] is None else [_frontier(report["evaluation"])]),
    ]


def _model_charts(steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """One chart for each member and shadow where several reward models score: their scales differ."""
    charts = []
    for kind in ("member", "shadow"):
        key = f"{kind}_means"
        for name in dict.fromkeys(name for r in (*steps, *validations) for name in r.get(key, {})):

            def line(records: Sequence[Mapping[str, Any]], key: str, name: str = name) -> list[Point]:
                return [(r["step"], r[key][name]) for r in records if r.get(key, {}).get(name) is not None]

            lines = {
                "All rollouts": line(steps, key),
                "Selected rollouts": line(steps, f"selected_{key}"),
                "Validation": line(validations, key),
            }
            title = f"Mean score of the {kind} {name} by step"
            charts.append(line_chart(f"{kind}-{name.replace('/', '-')}", title, "RS step", "mean score", lines))
    return charts


def _frontier(evaluation: Mapping[str, Any]) -> Chart:
    """Win rate against KL: what was won, and how far the policy moved for it. Best-of-n's KL is an upper bound."""
    best, kl = evaluation["best_of_n"], evaluation["aligned"]["kl_to_base"]
    low, high = evaluation["aligned"]["kl_to_base_ci95"]
    x_axis = axis([0.0, high, kl, best["kl_bound"]])
    y_axis = [0.0, 0.25, 0.5, 0.75, 1.0]
    series: list[Series] = []
    for name, key in (("Aligned, by reward", "win_rate"), ("Aligned, by judge", "judge_win_rate")):
        rate, (bottom, top) = evaluation[key], evaluation[f"{key}_ci95"]
        x, y = x_place(kl, x_axis), y_place(rate, y_axis)
        whiskers = [
            (x_place(low, x_axis), y, x_place(high, x_axis), y),
            (x, y_place(bottom, y_axis), x, y_place(top, y_axis)),
        ]
        series.append(Series(name, len(series), [(x, y, f"{name}: {rate:.1%} at {kl:.3g} nats")], whiskers))
    for name, key in (
        (f"Best of {best['n']}, by reward", "win_rate"),
        (f"Best of {best['n']}, by judge", "judge_win_rate"),
    ):
        text = f"{name}: {best[key]:.1%} at no more than {best['kl_bound']:.3g} nats"
        series.append(
            Series(name, len(series), [(x_place(best["kl_bound"], x_axis), y_place(best[key], y_axis), text)], [])
        )
    told = "; ".join(s.points[0][2] for s in series)
    ticks = [(x_place(t, x_axis), f"{t:g}") for t in x_axis], [(y_place(t, y_axis), f"{t:.0%}") for t in y_axis]
    return Chart(
        "frontier",
        "Win rate against KL to the base",
        told,
        "KL to the base, nats per response",
        "win rate",
        *ticks,
        series,
    )


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
