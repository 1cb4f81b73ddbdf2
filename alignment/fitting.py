"""The course of a training that scores nothing: optimizer steps, validations, checkpoints, a stop in order.

Shared by the reward model's training and by supervised fine-tuning, whose modules say what a step and a validation
are. There is no state but the weights and AdamW's moments, so what was interrupted goes on as if nothing had been.

    FOLDER/config.json             the resolved config
           metrics.jsonl           one line per optimizer step and per validation
           checkpoints/step-*/     trainable weights and AdamW's moments, sealed like the policy's
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from alignment.atomic_files import disk_errors
from alignment.config import Config
from alignment.engine import Ranks, any_rank, optimizer_tensors, restore_optimizer
from alignment.errors import CheckpointError
from alignment.lifeline import Stop
from alignment.run_folder import RunFolder
from alignment.types import Checkpoint
from alignment.worker import ANOTHER, emit
from models.adapters import trainable_tensors
from models.checkpoints import (
    prune,
    read_manifest,
    read_optimizer_state,
    removed_if_failed,
    seal,
    staging_folder,
    sweep,
    write_optimizer_state,
)

WEIGHTS = "trained.safetensors"


@dataclass(frozen=True, slots=True)
class Fitting:
    """One rank's hold on a training.

    `model`, inside `engine`, has the parameters that are saved. `step` and `validate` take the number of an optimizer
    step and return the record of it, and of each validation set; the first set chooses the checkpoint.
    `events` opens the kinds of the events that are sent. `stop_after` is the number of validations without a lower
    loss after which training ends; None never. `validates_base`: whether there is a validation before step 1.
    """

    events: str
    engine: Any
    model: nn.Module
    ranks: Ranks
    zero_stage: int
    total_steps: int
    val_check_interval: int
    step: Callable[[int], dict[str, Any]]
    validate: Callable[[int], list[dict[str, Any]]]
    keep_best: int = 1
    stop_after: int | None = None
    validates_base: bool = False


def fit(fitting: Fitting, folder: RunFolder, config: Config, stop: Stop, *, start: int) -> None:
    """Optimizer steps start + 1 … to the end, with validations and checkpoints; saves before it stops."""
    is_writer = fitting.ranks.rank == 0

    def record(values: Mapping[str, Any]) -> None:
        if is_writer:
            folder.append_metrics(dict(values))
            emit({**values, "kind": f"{fitting.events}_{values['kind']}", "steps": fitting.total_steps})

    if is_writer:
        folder.truncate_metrics(start)
        sweep(folder.checkpoints)
    losses = [loss for step, loss in validation_losses(folder).items() if step <= start]
    if fitting.validates_base and not losses:
        for result in fitting.validate(0):
            record(result)
    for step in range(start + 1, fitting.total_steps + 1):
        if should_stop_early(losses, fitting.stop_after):
            break
        record(fitting.step(step))
        pause = step % fitting.val_check_interval == 0 or step == fitting.total_steps
        results = fitting.validate(step) if pause else []
        losses += [result["loss"] for result in results[:1]]
        for result in results:
            record(result)
        asked = any_rank(bool(stop.reason), fitting.ranks, fitting.engine.device)
        if pause or asked:
            save(fitting, folder, config, step)
        if pause and is_writer:
            emit({"kind": "checkpoint", "step": step})
        if asked:
            if is_writer:
                emit({"kind": "stopped", "step": step, "reason": stop.reason or ANOTHER})
            return


def restore_moments(checkpoint: Checkpoint, engine: Any, ranks: Ranks, zero_stage: int) -> None:
    """AdamW's moments as a checkpoint has them, or anew where the workers or the ZeRO stage are others; it says so."""
    manifest = read_manifest(Path(checkpoint.uri))
    if (manifest["ranks"], manifest["zero_stage"]) == (ranks.world_size, zero_stage):
        restore_optimizer(engine, read_optimizer_state(Path(checkpoint.uri), ranks.rank))
    elif ranks.rank == 0:
        text = (
            f"{checkpoint.uri} was written by {manifest['ranks']} workers under ZeRO {manifest['zero_stage']} and "
            f"now there are {ranks.world_size} under ZeRO {zero_stage}: AdamW's moments start anew"
        )
        emit({"kind": "note", "text": text})


def read_weights(checkpoint: Path) -> dict[str, Any]:
    """The trainable weights of a verified checkpoint. Raises CheckpointError for one of RS steps, a whole model."""
    if not (checkpoint / WEIGHTS).is_file():
        raise CheckpointError(f"{checkpoint} has no {WEIGHTS}: name a step-* folder of a run of this kind of training")
    return load_file(checkpoint / WEIGHTS)


def validation_losses(folder: RunFolder) -> dict[int, float]:
    """Loss by optimizer step on the first validation set, which chooses the checkpoint."""
    records = [r for r in folder.read_metrics() if r["kind"] == "validation"]
    return {r["step"]: r["loss"] for r in records if r["set"] == records[0]["set"]}


def should_stop_early(losses: Sequence[float], stop_after: int | None) -> bool:
    """Whether the last `stop_after` validations all failed to lower the validation loss."""
    if stop_after is None or len(losses) <= stop_after:
        return False
    return min(losses[-stop_after:]) >= min(losses[:-stop_after])


def save(fitting: Fitting, folder: RunFolder, config: Config, step: int) -> None:
    """Write and seal the checkpoint of an optimizer step over all ranks; keep the newest and the best."""
    ranks, staging = fitting.ranks, staging_folder(folder.checkpoints, step)
    with removed_if_failed(staging):
        weights = trainable_tensors(fitting.model)
        write_optimizer_state(staging, ranks.rank, optimizer_tensors(fitting.engine))
        if ranks.world_size > 1:
            torch.distributed.barrier()
        if ranks.rank == 0:
            with disk_errors(staging / WEIGHTS):
                save_file(weights, staging / WEIGHTS)
            details: dict[str, Any] = {"ranks": ranks.world_size, "zero_stage": fitting.zero_stage}
            details |= {"run_id": folder.path.name, "parent": {}}
            seal(folder.checkpoints, step, config=config.model_dump(mode="json"), details=details)
            rewards = {step: -loss for step, loss in validation_losses(folder).items()}
            prune(folder.checkpoints, keep_last=1, keep_best=fitting.keep_best, validations=rewards)
    if ranks.world_size > 1:
        torch.distributed.barrier()
