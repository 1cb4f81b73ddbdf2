"""What a run's step and validation records are passed on to, whichever executor made them: lines, W&B, the alarm."""

from collections.abc import Callable, Mapping
from typing import Any

from alignment.over_optimisation import newest_alarms
from alignment.progress import ProgressLines
from alignment.run_folder import RunFolder
from alignment.tracking import Tracker


def listener(run: RunFolder, progress: ProgressLines, wandb_run: Tracker) -> Callable[[Mapping[str, Any]], None]:
    """What takes each event of a run as it comes."""

    def listen(event: Mapping[str, Any]) -> None:
        progress.update(event)
        if event["kind"] == "step":
            wandb_run.log_step(event)
        elif event["kind"] == "validation":
            wandb_run.log_validation(event)
            for alarm in newest_alarms(run.read_metrics()):
                progress.update({"kind": "note", "text": f"alarm: {alarm.text}"})
                wandb_run.alert(alarm)

    return listen
