"""The policy under training on all ranks: loaded from the last checkpoint, saved to the next."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from alignment.config import Config
from alignment.embedded import policy_folder
from alignment.engine import Ranks, build_engine, learning_rate, optimizer_tensors, restore_optimizer
from alignment.errors import CheckpointError, DiskError
from alignment.preparation import cache_folder
from alignment.run_folder import RunFolder
from alignment.types import Checkpoint, Rollout, StepUpdate
from alignment.update import update as run_update
from models.checkpoints import (
    last_checkpoint,
    prune,
    read_manifest,
    read_optimizer_state,
    seal,
    staging_folder,
    write_optimizer_state,
)
from models.policy import Policy, load_policy
from models.quiet import quiet_transformers


@dataclass(frozen=True, slots=True)
class Trainer:
    """One rank's hold on the policy; only the weights and moments inside `policy` and `engine` change.

    `start` is the number of RS steps that the loaded checkpoint has behind it.
    """

    config: Config
    run: RunFolder
    ranks: Ranks
    policy: Policy
    engine: Any
    start: int

    @property
    def is_writer(self) -> bool:
        """Rank 0 alone writes the run's files."""
        return self.ranks.rank == 0

    def gather(self, mine: Sequence[Any]) -> list[Any]:
        """The items of all ranks, by rank. The pickles travel between the run's own processes only."""
        if self.ranks.world_size == 1:
            return list(mine)
        parts: list[Any] = [None] * self.ranks.world_size
        torch.distributed.all_gather_object(parts, list(mine))
        return [item for part in parts for item in part]

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This rank's part of a list."""
        return items[self.ranks.rank :: self.ranks.world_size]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.ranks.world_size > 1:
            torch.distributed.barrier()


def load_trainer(config: Config, run: RunFolder, ranks: Ranks) -> Trainer:
    """Policy, moments and progress as the last checkpoint left them, or new from the base.

    Raises CheckpointError for a damaged checkpoint, or one written by another number of workers.
    """
    checkpoint = last_checkpoint(run.checkpoints)
    source = checkpoint.uri if checkpoint else policy_folder(config.policy.model, cache_folder(config))
    device = "cuda" if config.resources.gpu else "cpu"
    policy = load_policy(source, prompt_format=config.policy.prompt_format, device=device)
    engine = build_engine(policy.model, config.training, world_size=ranks.world_size)
    if checkpoint:
        written_by = int(read_manifest(Path(checkpoint.uri))["ranks"])
        if written_by != ranks.world_size:
            raise CheckpointError(
                f"{checkpoint.uri} was written by {written_by} workers and this run has {ranks.world_size}: "
                "resume with the same resources.gpu and resources.cpu_workers"
            )
        restore_optimizer(engine, read_optimizer_state(Path(checkpoint.uri), ranks.rank))
    engine.eval()
    return Trainer(config, run, ranks, policy, engine, checkpoint.step if checkpoint else 0)


def train_step(trainer: Trainer, selected: Sequence[Rollout], step: int) -> StepUpdate:
    """The update of RS step `step` (from 1) on the selected rollouts, the same list on every rank."""
    training = trainer.config.training
    return run_update(
        trainer.engine,
        selected,
        training,
        trainer.ranks,
        lr=learning_rate(step, training, max_steps=trainer.config.loop.max_steps),
        pad_id=trainer.policy.eos_ids[0],
        stream=f"{trainer.config.seed}/step-{step}",
    )


def save_checkpoint(
    trainer: Trainer, step: int, *, validation: Mapping[str, Any] | None = None, update: StepUpdate | None = None
) -> Checkpoint | None:
    """Write and seal the checkpoint of an RS step over all ranks; the writer gets its reference.

    `validation` and `update` go into the manifest. Raises DiskError.
    """
    run = trainer.run
    staging = staging_folder(run.checkpoints, step)
    if trainer.is_writer:
        _write_policy(trainer.policy, staging)
    trainer.barrier()
    write_optimizer_state(staging, trainer.ranks.rank, optimizer_tensors(trainer.engine))
    trainer.barrier()
    checkpoint = None
    if trainer.is_writer:
        checkpoint = seal(
            run.checkpoints,
            step,
            ranks=trainer.ranks.world_size,
            config=json.loads(trainer.config.model_dump_json()),
            details={
                "validation": dict(validation) if validation else None,
                "update": asdict(update) if update else None,
            },
        )
        prune(run.checkpoints, keep_last=trainer.config.loop.keep_last)
    trainer.barrier()
    return checkpoint


def _write_policy(policy: Policy, staging: Path) -> None:
    """A new staging folder with the policy as transformers reads it. Raises DiskError."""
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        with quiet_transformers():
            policy.model.save_pretrained(staging)
        policy.reader.tokenizer.save_pretrained(staging)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise DiskError(
            f"cannot write {staging}: {error}. Free space and resume: the last checkpoint is intact"
        ) from error
