"""The colocated executor: one iteration of RS steps by workers on the step's own node."""

from contextlib import closing
from typing import Any

from alignment.config import Config
from alignment.errors import CheckpointError
from alignment.launch import run_workers
from alignment.lifeline import end_with_parent
from alignment.progress import ProgressLine
from alignment.run_folder import RunFolder
from alignment.task import claim_devices, served, timed_task, tracker
from alignment.types import Checkpoint, JudgeRef, RewardModelRef


def iterate(config: Config, run: RunFolder, reward: RewardModelRef, judge: JudgeRef, iteration: int) -> Checkpoint:
    """RS steps up to `iteration × steps_per_iteration`, from the run's last checkpoint. Raises AlignmentError."""
    from models.checkpoints import newest_checkpoint

    claim_devices(config)
    end_with_parent()
    until = min(iteration * config.loop.steps_per_iteration, config.loop.max_steps)
    with (
        closing(ProgressLine(config.loop.max_steps)) as progress,
        timed_task(run, "iterate"),
        served(config, run, reward) as server,
        tracker(config, run) as wandb_run,
    ):

        def on_event(event: dict[str, Any]) -> None:
            progress.update(event)
            if event["kind"] == "step":
                wandb_run.log_step(event)
            elif event["kind"] == "validation":
                wandb_run.log_validation(event)

        arguments = ["--folder", str(run.path), "--until", str(until), "--url", server.url]
        arguments += ["--version", reward.version, "--judge", judge.uri]
        run_workers(
            "alignment.worker", arguments, num_workers=config.num_workers, on_event=on_event, check=server.check
        )
    checkpoint = newest_checkpoint(run.checkpoints)
    if checkpoint is None or checkpoint.step < until:
        raise CheckpointError(f"{run.checkpoints} holds no checkpoint of RS step {until}, which the workers just made")
    return checkpoint
