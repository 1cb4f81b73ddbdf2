"""One RS step's update by itself: the worker of the disaggregated executor's update phase.

python -m torch.distributed.run --nproc-per-node N -m alignment.update_worker --folder DIR --step K --selected FILE
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from alignment.config import parse_config
from alignment.errors import CheckpointError
from alignment.lifeline import end_with_stdin
from alignment.run_folder import RunFolder
from alignment.types import Rollout, StepUpdate
from alignment.worker import emit, reported_errors, sole_writer


def main() -> None:
    """Train on the selected rollouts of one step, save its checkpoint, report the update; once, however often run."""
    options = _options()
    run = RunFolder(Path(options.folder))
    end_with_stdin()
    with reported_errors(), sole_writer(run):
        from alignment.engine import start_ranks
        from alignment.trainer import load_trainer, save_checkpoint, train_step
        from models.checkpoints import checkpoint_folder, read_manifest

        config = parse_config(run.config.read_text())
        ranks = start_ranks(threads=config.resources.threads, gpu=config.resources.gpu > 0)
        trainer = load_trainer(config, run, ranks)
        if trainer.start == options.step:  # a replay: the checkpoint of this step is there already
            manifest = read_manifest(checkpoint_folder(run.checkpoints, options.step))
            result = StepUpdate(**manifest["update"])
        elif trainer.start == options.step - 1:
            result = train_step(trainer, _selected(Path(options.selected)), options.step)
            save_checkpoint(trainer, options.step, update=result)
        else:
            raise CheckpointError(f"{run.path} is at RS step {trainer.start}: RS step {options.step} cannot be trained")
        if trainer.is_writer:
            emit({"kind": "update", "update": asdict(result)})


def _selected(path: Path) -> list[Rollout]:
    keys = ("prompt_id", "rollout_index", "response", "finish_reason")
    return [
        Rollout(
            **{key: row[key] for key in keys},
            prompt_ids=tuple(row["prompt_ids"]),
            response_ids=tuple(row["response_ids"]),
        )
        for row in json.loads(path.read_text())
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="update worker; started by the flow")
    parser.add_argument("--folder", required=True, help="run folder")
    parser.add_argument("--step", type=int, required=True, help="RS step")
    parser.add_argument("--selected", required=True, help="JSON file of the selected rollouts")
    return parser.parse_args()


if __name__ == "__main__":
    main()
