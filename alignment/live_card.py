"""The page of a run that goes on, drawn from its events: progress, reward curves, throughput, samples of the last step.

Shares its look, charts and escaping with report.html, and its size is bounded whatever the run's length.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from alignment.card_writer import Draw
from alignment.charts import SIZE, Chart, line_chart
from alignment.progress import ProgressState, advance, duration
from alignment.report_charts import lift_chart, line, reward_charts
from alignment.report_page import page_template
from alignment.run_folder import RunFolder

MOST_POINTS = 100
"""Of each line of a chart."""
MOST_SAMPLES, MOST_CHARACTERS = 4, 600
"""Prompts shown of the last RS step, and of each text."""
SHOWN = ("prompt_id", "prompt", "response", "reward", "selected", "reason")
"""Columns that the samples need: the tokens, most of the file, take ten times as long to read."""

Show = Callable[[Draw], None]
"""Takes how to draw the newest page (`alignment.card_writer`)."""
Record = Mapping[str, Any]


class LiveCard:
    """Follows a run of `total` RS steps and shows its page after each event."""

    def __init__(self, run: RunFolder, total: int, show: Show) -> None:
        self._run, self._show = run, show
        self._records: list[Record] = [r for r in run.read_metrics() if r.get("kind") in ("step", "validation")]
        self._state = ProgressState(total)
        for record in self._records:
            self._state = advance(self._state, record)
        # What came with another run's records, or before this task, says nothing of the time that is left.
        self._state = replace(self._state, step_seconds=())
        self._draw()

    def update(self, event: Record, step_seconds: float | None = None) -> None:
        """Take an event of the run, as `alignment.run_events` tells it."""
        if event["kind"] not in ("phase", "step", "validation"):
            return
        self._state = advance(self._state, event, step_seconds)
        if event["kind"] != "phase":
            self._records.append(event)
        self._draw()

    def _draw(self) -> None:
        run, state, records = self._run, self._state, tuple(self._records)
        self._show(lambda: live_page(run, state, records))


def live_page(run: RunFolder, state: ProgressState, records: Sequence[Record]) -> str:
    """The page for a state of the run, whose steps and validations are `records`."""
    steps, validations = (_thinned([r for r in records if r["kind"] == kind]) for kind in ("step", "validation"))
    to_go = state.total_steps - state.finished_steps
    return page_template("live_card.html.jinja").render(
        run_id=run.path.name,
        s=state,
        left=duration(median(state.step_seconds) * to_go) if state.step_seconds and to_go else "",
        charts=[chart for chart in _charts(steps, validations) if chart.series],
        samples=_samples(run, state.finished_steps),
        size=SIZE,
    )


def _charts(steps: Sequence[Record], validations: Sequence[Record]) -> list[Chart]:
    rate = {"Rollout tokens": line(steps, "tokens_per_second")}
    throughput = line_chart("throughput", "Throughput by step", "RS step", "tokens per second", rate, with_zero=True)
    return [*reward_charts(steps, validations), lift_chart(steps), throughput]


def _thinned(records: Sequence[Record]) -> list[Record]:
    """At most MOST_POINTS of the records, evenly spaced, the last one among them."""
    every = -(-len(records) // MOST_POINTS) or 1
    return list(records[::-1][::every][::-1])


def _samples(run: RunFolder, step: int) -> list[dict[str, Any]]:
    """Of the first prompts of an RS step a selected response and the one with the lowest reward."""
    if not run.rollouts_file(step).is_file():
        return []
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in run.read_rollouts(step, SHOWN):
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    found = []
    for rows in list(by_prompt.values())[:MOST_SAMPLES]:
        chosen, worst = [r for r in rows if r["selected"]], min(rows, key=lambda r: float(r["reward"]))
        shown = {"selected": chosen[0] if chosen else None, "lowest": worst}
        found.append({"prompt": _cut(rows[0]["prompt"])} | {name: row and _shown(row) for name, row in shown.items()})
    return found


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"response": _cut(row["response"]), "reward": row["reward"], "reason": row["reason"]}


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"
