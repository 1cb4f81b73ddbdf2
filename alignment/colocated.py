"""The colocated executor: one iteration of RS steps by workers on the step's own node, or on those of its Slurm job."""

import json
from dataclasses import asdict
from typing import Any

from alignment.config import Config
from alignment.errors import CheckpointError, StoppedError
from alignment.launch import run_workers
from alignment.live_card import Show
from alignment.preparation import total_steps
from alignment.reward_server import RewardServer
from alignment.rollback import end_of_loop, settle, standing_checkpoint
from alignment.run_events import listener
from alignment.run_folder import RunFolder
from alignment.run_metrics import end_progress
from alignment.slurm_gang import allocated_gang
from alignment.task import claim_devices, ends_at, served, timed_task, tracker
from alignment.types import Checkpoint, JudgeRef, RewardModelRef
from alignment.unchanged import check_scorers

WORKER = "alignment.worker"


def iterate(
    config: Config, run: RunFolder, reward: RewardModelRef, judge: JudgeRef, show: Show | None = None
) -> Checkpoint:
    """RS steps from the run's last checkpoint to the next multiple of `steps_per_iteration`. Raises AlignmentError.

    Where a step failed badly, the best checkpoint before it; no RS step follows. `show` takes the run's live page.
    """
    from models.checkpoints import newest_checkpoint

    failed = settle(config.promotion, run)
    if failed is not None:  # a resume of a run whose loop is over
        return _over(run, failed)
    claim_devices(config)
    check_scorers(run, reward, judge)
    total = total_steps(config, run.path)
    begun_at = newest_checkpoint(run.checkpoints)
    done = begun_at.step if begun_at else 0
    until = min((done // config.loop.steps_per_iteration + 1) * config.loop.steps_per_iteration, total)
    stopped: list[dict[str, Any]] = []
    with (
        timed_task(run, "iterate") as clock,
        served(config, run, reward) as server,
        tracker(config, run) as wandb_run,
    ):
        listen = listener(run, wandb_run, done=done, total=total, show=show)

        def on_event(event: dict[str, Any]) -> None:
            listen(event)
            if event["kind"] == "ready":
                clock.work_begins()
            elif event["kind"] == "checkpoint":
                clock.saved(event["seconds"])
            elif event["kind"] == "stopped":
                stopped.append(event)

        arguments = ["--folder", str(run.path), "--until", str(until), "--url", server.url, "--judge", judge.uri]
        arguments += ["--reward-model", json.dumps(asdict(reward)), *_metrics_url(server), *ends_at(config)]
        run_workers(
            WORKER,
            arguments,
            num_workers=config.num_workers,
            on_event=on_event,
            check=server.check,
            grace_s=config.loop.stop_grace_s,
            gang=allocated_gang(config),
        )
    failed = run.rollback()
    if failed is not None:
        return _over(run, failed)
    checkpoint = newest_checkpoint(run.checkpoints)
    if stopped or until == total:
        end_progress(run)
    if stopped:
        where = checkpoint.uri if checkpoint else "no checkpoint yet: the run begins anew"
        raise StoppedError(
            f"stopped after RS step {stopped[0]['step']} of {total}: {stopped[0]['reason']} ({where}). "
            "`python flows/rs_flow.py resume` goes on from there"
        )
    if checkpoint is None or checkpoint.step < until:
        raise CheckpointError(f"{run.checkpoints} holds no checkpoint of RS step {until}, which the workers just made")
    return checkpoint


def _over(run: RunFolder, failed: dict[str, Any]) -> Checkpoint:
    """The checkpoint that a run whose loop ended early has come to."""
    end_progress(run)
    print(end_of_loop(failed))
    return standing_checkpoint(run)


def _metrics_url(server: RewardServer) -> list[str]:
    return ["--metrics-url", server.metrics_url] if server.metrics_url else []
