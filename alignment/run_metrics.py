"""A run's progress for Prometheus, as a file for the textfile collector of node_exporter.

The file is `<run.root>/progress/<run id>.prom`, replaced whole after each RS step, validation and start of the workers.
It is there from the first iteration's start until the run has done its last RS step or was stopped in order. That of a
run that failed or was killed stays, and tells that there is no progress, until the run is resumed or somebody deletes
it. The trainings of a reward model and of `sft_flow.py`, and the evaluation, tell nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.atomic_files import disk_errors, write_text
from alignment.run_folder import RunFolder

METRICS = {
    "rs_run_step": "Last RS step that is done",
    "rs_run_total_steps": "RS steps that the run will have done at its end",
    "rs_run_progress_timestamp_seconds": "Unix time at which a step or validation ended, or the workers got ready",
    "rs_run_step_seconds": "How long the last RS step took; 0 before the first",
    "rs_run_reward_mean": "Mean reward of all rollouts of the last RS step",
    "rs_run_selected_reward_mean": "Mean reward of its selected rollouts",
}
"""Names of the gauges, each with the label `run`, and their help texts."""


@dataclass(frozen=True, slots=True)
class RunProgress:
    """What the file says. Times are seconds, `at` is Unix time; rewards are None where there is none."""

    step: int
    total_steps: int
    at: float
    step_seconds: float = 0.0
    reward_mean: float | None = None
    selected_reward_mean: float | None = None


def after(
    progress: RunProgress, event: Mapping[str, Any], now: float, step_seconds: float | None = None
) -> RunProgress:
    """The progress after a worker's event; one that is no progress (a phase, a note) changes nothing.

    `step_seconds` is how long a finished step took by the clock; without, its phases make it up.
    """
    kind = event["kind"]
    if kind in ("ready", "validation"):
        return replace(progress, at=now)
    if kind == "step":
        return RunProgress(
            event["step"],
            progress.total_steps,
            now,
            sum(event["seconds"].values()) if step_seconds is None else step_seconds,
            event["reward_mean"],
            event["selected_reward_mean"],
        )
    return progress


def progress_file(run: RunFolder) -> Path:
    """Where the run's progress stands. Runs of one root share the folder, which one collector reads."""
    return run.path.parent / "progress" / f"{run.path.name}.prom"


def write_progress(run: RunFolder, progress: RunProgress) -> None:
    """Replace the run's file. Raises DiskError."""
    values = (
        progress.step,
        progress.total_steps,
        progress.at,
        progress.step_seconds,
        progress.reward_mean,
        progress.selected_reward_mean,
    )
    lines = [
        # A run id holds nothing that a label would have to escape (`run_folder.create`).
        f'# HELP {name} {text}\n# TYPE {name} gauge\n{name}{{run="{run.path.name}"}} {value!r}\n'
        for (name, text), value in zip(METRICS.items(), values, strict=True)
        if value is not None
    ]
    write_text(progress_file(run), "".join(lines))


def end_progress(run: RunFolder) -> None:
    """Remove the run's file: it has nothing left to do, or was asked to stop. Raises DiskError."""
    path = progress_file(run)
    with disk_errors(path):
        path.unlink(missing_ok=True)
