"""One RS step's update by itself: the worker of the disaggregated executor's update phase.

python -m torch.distributed.run --nproc-per-node N -m alignment.update_worker --folder DIR --step K --scored FILE
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.config import parse_config
from alignment.errors import CheckpointError, TrainingError
from alignment.lifeline import end_with_stdin
from alignment.phase_parts import scored_rollout
from alignment.run_folder import RunFolder
from alignment.types import Decision
from alignment.worker import emit, reported_errors, sole_writer

if TYPE_CHECKING:
    from alignment.trainer import Trainer


def main() -> None:
    """Train on the selected rollouts of one step, record it and save its checkpoint; once, however often run."""
    options = _options()
    run = RunFolder(Path(options.folder))
    end_with_stdin()
    with reported_errors():
        config = parse_config(run.config.read_text())
        # The workers of a task that was ended may not have ended yet.
        with sole_writer(run, wait_s=config.loop.stop_grace_s):
            from alignment.engine import start_ranks
            from alignment.trainer import load_trainer

            own = config.in_phase("update").resources
            ranks = start_ranks(threads=own.threads, gpu=own.gpu > 0)
            trainer = load_trainer(config, run, ranks, updates_only=True)
            if trainer.start == options.step - 1:
                _train(trainer, options.step, json.loads(Path(options.scored).read_text()))
            elif trainer.start != options.step:  # else a task that was repeated: it has been done
                raise CheckpointError(
                    f"{run.path} is at RS step {trainer.start}: RS step {options.step} cannot be trained"
                )


def _train(trainer: "Trainer", step: int, scoring: Mapping[str, Any]) -> None:
    """The update, its record and its checkpoint. The record comes first, so that no checkpoint is without one.

    An update whose numbers are not finite leaves neither, but a rollback, where there is a checkpoint to go back to.
    """
    from alignment.provenance import forget_manifests
    from alignment.records import step_record
    from alignment.rollback import settle, settle_diverged
    from alignment.trainer import save_checkpoint, train_step
    from models.checkpoints import sweep
    from models.judge import load_judge

    scored = [scored_rollout(r) for r in scoring["scored"]]
    decisions = [Decision(**d) for d in scoring["decisions"]]
    begun = time.monotonic()
    try:
        result = train_step(trainer, [r for r, d in zip(scored, decisions, strict=True) if d.selected], step)
    except TrainingError as error:
        if not trainer.start:
            raise
        if trainer.is_writer:
            trainer.run.truncate_metrics(step - 1)
            settle_diverged(trainer.run, step, error)
        return
    seconds, held = time.monotonic() - begun, trainer.peak_gpu_bytes()
    if trainer.is_writer:
        if trainer.lost_moments:
            emit({"kind": "note", "text": trainer.lost_moments})
        trainer.run.truncate_metrics(step - 1)
        forget_manifests(trainer.run, step - 1)
        sweep(trainer.run.checkpoints)
        record = step_record(
            step,
            scored,
            decisions,
            result,
            {**scoring["seconds"], "update": seconds},
            judge=load_judge(Path(scoring["judge"])),
            scoring_server=scoring["scoring_server"],
            scoring_cache=scoring["scoring_cache"],
            reused_from=trainer.config.reuse.rollouts,
            lost_prompts=scoring["lost_prompts"],
            gpu_memory_bytes=held,
        )
        trainer.run.append_metrics(record)
        settle(trainer.config.promotion, trainer.run)
    save_checkpoint(trainer, step)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="update worker; started by the flow")
    parser.add_argument("--folder", required=True, help="run folder")
    parser.add_argument("--step", type=int, required=True, help="RS step")
    parser.add_argument("--scored", required=True, help="JSON file of the scored rollouts and their decisions")
    return parser.parse_args()


if __name__ == "__main__":
    main()
