"""What a run's events are passed on to, whichever executor made them: lines, a file for Prometheus, W&B, the alarm,
the live card, and where the run lives, if its folder is a copy.
"""

import time
from collections.abc import Mapping
from typing import Any, Protocol

from alignment.live_card import LiveCard, Show
from alignment.over_optimisation import newest_alarms
from alignment.progress import ProgressLines
from alignment.run_folder import RunFolder
from alignment.run_metrics import RunProgress, after, write_progress
from alignment.tracking import Tracker


class Listener(Protocol):
    """Takes each event of a run."""

    def __call__(self, event: Mapping[str, Any], step_seconds: float | None = None) -> None:
        """`step_seconds`: how long a finished RS step took, where it is not told as it ends."""


def listener(run: RunFolder, wandb_run: Tracker, *, done: int, total: int, show: Show | None = None) -> Listener:
    """What takes each event of a run as it comes, of which `done` RS steps of `total` are behind it.

    `show` takes the page of `alignment.live_card`, which nobody draws without it.
    """
    card = LiveCard(run, total, show) if show else None
    lines, shown = ProgressLines(total), RunProgress(done, total, time.time())
    write_progress(run, shown)

    def listen(event: Mapping[str, Any], step_seconds: float | None = None) -> None:
        nonlocal shown
        lines.update(event, step_seconds)
        if card:
            card.update(event, step_seconds)
        before, shown = shown, after(shown, event, time.time(), step_seconds)
        if shown is not before:
            write_progress(run, shown)
        if event["kind"] in ("step", "validation", "checkpoint"):
            run.send()
        if event["kind"] == "step":
            wandb_run.log_step(event)
        elif event["kind"] == "validation":
            wandb_run.log_validation(event)
            for alarm in newest_alarms(run.read_metrics()):
                lines.update({"kind": "note", "text": f"alarm: {alarm.text}"})
                wandb_run.alert(alarm)
        elif event["kind"] == "checkpoint":
            wandb_run.log_models()

    return listen
