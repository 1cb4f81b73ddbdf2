"""The charts of report.html, by the panel that they stand in. `alignment.charts` has their geometry."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignment.charts import Chart, Point, dot_chart, line_chart, share_chart
from alignment.report_parts import lifts

Record = Mapping[str, Any]
Report = Mapping[str, Any]
KINDS = (("", "reward"), ("judge_", "judge"))
"""What opens the evaluation's keys of each score, and its name."""
FRONTIER_NOTE = (
    "The line: the best of 1 to {n} responses of the base, at the most that its KL can be. Above it is better than "
    "picking from the base's responses, below is not. Dashed: 50%, as often won as lost."
)
LIFT_NOTE = "Above 0 what was trained on scores higher than what was drawn. Each score has its own unit."
OVER_NOTE = (
    "Gain since the first validation, in its standard deviations, with 95% intervals. The lines part where the "
    "policy learns what the reward model likes and nothing else."
)


def charts_of(report: Report) -> dict[str, list[Chart]]:
    """The charts of each panel, empty ones left out."""
    steps, validations = report["steps"], report["validation"]
    found = {
        "change": _change(report["evaluation"]),
        "frontier": _frontier(report),
        "course": [*reward_charts(steps, validations), *model_charts(steps, validations), lift_chart(steps)],
        "text": _texts(steps),
        "over": [_over(report["over_optimisation"])],
        "server": _server(steps),
        "time": _time(steps),
    }
    return {panel: [chart for chart in charts if chart.series] for panel, charts in found.items()}


def line(records: Sequence[Record], *path: str) -> list[Point]:
    """(step, value) of each record that has a finite number there."""
    points = []
    for record in records:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and math.isfinite(value):
            points.append((record["step"], value))
    return points


def _change(evaluation: Record) -> list[Chart]:
    charts = []
    for _, name in KINDS:
        key = f"{name}_mean"
        values = {
            who.capitalize(): (evaluation[who][key], evaluation[who][f"{key}_ci95"]) for who in ("base", "aligned")
        }
        charts.append(dot_chart(f"change-{name}", f"Mean {name} before and after", f"mean {name} score", values))
    return charts


def _frontier(report: Report) -> list[Chart]:
    """Win rate against KL, by each score: best-of-n's curve, the aligned policy, the control where there is one."""
    evaluation, control = report["evaluation"], report.get("control")
    if evaluation["aligned"]["kl_to_base"] is None:
        return []
    policies = {"Aligned": (evaluation["aligned"], evaluation)}
    if control and control["kl_to_base"] is not None:
        policies["Random control"] = (control, control)
    curve = evaluation["best_of_n_curve"]
    charts = []
    for prefix, name in KINDS:
        rate = f"{prefix}win_rate"
        dots = {
            who: ((kl["kl_to_base"], kl["kl_to_base_ci95"]), (won[rate], won[f"{rate}_ci95"]))
            for who, (kl, won) in policies.items()
        }
        picked = {f"best of {n}": (of["kl_bound"], of[rate]) for n, of in curve.items()}
        title = f"Win rate by {'the judge' if prefix else 'reward'} against KL"
        note = FRONTIER_NOTE.format(n=len(curve))
        charts.append(
            share_chart(f"frontier-{name}", title, "KL to the base, nats per response", "Best of n", picked, dots, note)
        )
    return charts


def reward_charts(steps: Sequence[Record], validations: Sequence[Record]) -> list[Chart]:
    """Mean reward, then mean judge score: all rollouts beside the selected ones and the validations."""
    charts = []
    for key, title, label in (
        ("reward", "Mean reward by step", "mean reward"),
        ("judge", "Mean judge score by step", "mean judge score"),
    ):
        lines = {
            "All rollouts": line(steps, f"{key}_mean"),
            "Selected rollouts": line(steps, f"selected_{key}_mean"),
            "Validation": line(validations, f"{key}_mean"),
        }
        charts.append(line_chart("rewards" if key == "reward" else key, title, "RS step", label, lines))
    return charts


def model_charts(steps: Sequence[Record], validations: Sequence[Record]) -> list[Chart]:
    """One chart for each member and shadow where several reward models score: their scales differ."""
    charts = []
    for kind in ("member", "shadow"):
        key = f"{kind}_means"
        for name in dict.fromkeys(name for r in (*steps, *validations) for name in r.get(key, {})):
            lines = {
                "All rollouts": line(steps, key, name),
                "Selected rollouts": line(steps, f"selected_{key}", name),
                "Validation": line(validations, key, name),
            }
            title = f"Mean score of the {kind} {name} by step"
            charts.append(line_chart(f"{kind}-{name.replace('/', '-')}", title, "RS step", "mean score", lines))
    return charts


def lift_chart(steps: Sequence[Record]) -> Chart:
    """Selected less all rollouts, by reward and by the judge."""
    lines = {
        "Reward": lifts(steps, "selected_reward_mean", "reward_mean"),
        "Judge": lifts(steps, "selected_judge_mean", "judge_mean"),
    }
    title = "Selection lift: selected less all rollouts"
    return line_chart("lift", title, "RS step", "difference of means", lines, LIFT_NOTE, with_zero=True)


def _texts(steps: Sequence[Record]) -> list[Chart]:
    lengths = {"All rollouts": line(steps, "response_length_mean")}
    shares = {"Cut at the limit": line(steps, "truncated_fraction"), "Duplicates": line(steps, "duplicate_fraction")}
    return [
        line_chart("length", "Response length by step", "RS step", "mean tokens", lengths),
        line_chart(
            "shares", "Cut and doubled responses by step", "RS step", "share of rollouts", shares, with_zero=True
        ),
    ]


def _over(told: Sequence[Record]) -> Chart:
    """Gains of reward and shadows since the first validation, with their intervals."""
    lines = {one["who"]: [(p["step"], p["gain"]) for p in one["points"]] for one in told}
    intervals = {one["who"]: [p["ci95"] for p in one["points"]] for one in told}
    title = "Reward against judge and shadows"
    return line_chart(
        "over", title, "RS step", "gain in standard deviations", lines, OVER_NOTE, intervals, with_zero=True
    )


def _server(steps: Sequence[Record]) -> list[Chart]:
    batches = {"Conversations per batch": line(steps, "scoring_server", "mean_batch")}
    waits = {
        "In the queue": line(steps, "scoring_server", "queue_ms"),
        "Computing": line(steps, "scoring_server", "compute_ms"),
    }
    return [
        line_chart("batch", "Batches of the reward server", "RS step", "conversations each", batches, with_zero=True),
        line_chart("server-ms", "Time of a request", "RS step", "milliseconds per request", waits, with_zero=True),
    ]


def _time(steps: Sequence[Record]) -> list[Chart]:
    seconds = {
        name.capitalize(): line(steps, "seconds", name) for name in ("rollouts", "scoring", "update", "validation")
    }
    rates = {"Rollout tokens": line(steps, "tokens_per_second")}
    return [
        line_chart("seconds", "Seconds of each phase by step", "RS step", "seconds", seconds, with_zero=True),
        line_chart("throughput", "Rollout throughput by step", "RS step", "tokens per second", rates, with_zero=True),
    ]
