"""The policy under training on all ranks: loaded from the last checkpoint, saved to the next."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignment.atomic_files import disk_errors
from alignment.config import Config
from alignment.continuation import check_own
from alignment.engine import Ranks, any_rank, learning_rate, optimizer_tensors, restore_optimizer
from alignment.hosted_optimizer import HostedOptimizer, hosted_optimizer
from alignment.mix_in import load_mix_in, mixed
from alignment.policy_source import base_folder
from alignment.preparation import total_steps
from alignment.provenance import describe_base, keep_manifests, provenance
from alignment.rollout_engine import load_engine
from alignment.run_folder import RunFolder
from alignment.trained_policy import follow, load, policy_engine, write_adapters
from alignment.types import Checkpoint, Rollout, StepUpdate
from alignment.unchanged import check_unchanged
from alignment.update import update as run_update
from models.checkpoints import (
    last_checkpoint,
    prune,
    read_manifest,
    read_optimizer_state,
    removed_if_failed,
    seal,
    staging_folder,
    write_optimizer_state,
)
from models.memory import peak_gpu_bytes
from models.policy import Policy
from models.quiet import quiet_transformers
from models.vllm_engine import VllmEngine


@dataclass(frozen=True, slots=True)
class Trainer:
    """One rank's hold on the policy; only the weights and moments inside `policy` and `engine` change.

    `policy` is what is sampled and saved. Where what is trained is something else (adapters, or weights that ZeRO-3
    has sharded), it is a copy that follows after each update.

    `start` is the number of RS steps that the loaded checkpoint has behind it, `validated` whether it was
    validated after them, `total_steps` the RS steps of the whole run. `lost_moments` says why AdamW's moments
    start anew although the weights go on; "" where they go on too. `demonstrations` are those of the SFT mix-in.
    `base` describes the policy before step 1, where the trainer starts there. `sampler` is vLLM where it samples the
    rollouts; without, the policy's own model does. `hosted` moves the optimizer's state out of their way, where the
    config asks for it.
    """

    config: Config
    run: RunFolder
    ranks: Ranks
    policy: Policy
    engine: Any
    start: int
    validated: bool
    total_steps: int
    lost_moments: str
    demonstrations: Sequence[Rollout]
    base: Mapping[str, Any]
    sampler: VllmEngine | None
    hosted: HostedOptimizer | None

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

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return any_rank(flag, self.ranks, self.engine.device)

    def peak_gpu_bytes(self) -> int | None:
        """The most that a rank's GPU held since the last call; None on a CPU. All ranks call it."""
        mine = peak_gpu_bytes(self.engine.device)
        return None if mine is None else max(self.gather([mine]))

    def optimizer_at_hand(self) -> AbstractContextManager[None]:
        """A context in which the optimizer's state is where the engine steps: outside it may be on the host."""
        return nullcontext() if self.hosted is None else self.hosted.at_hand()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.ranks.world_size > 1:
            torch.distributed.barrier()


def load_trainer(config: Config, run: RunFolder, ranks: Ranks, *, updates_only: bool = False) -> Trainer:
    """Policy, moments and progress as the last checkpoint left them, or new from the base.

    `updates_only`: on the devices of `phases.update`, without what is there for rollouts alone. The trainer's config
    stays the run's, which its checkpoints hold.

    With another number of workers than the checkpoint's, only the weights go on. Raises CheckpointError for a
    checkpoint that is damaged or of another run.
    """
    checkpoint = last_checkpoint(run.checkpoints)
    manifest: dict[str, Any] = {"step": 0}
    if checkpoint:
        manifest = read_manifest(Path(checkpoint.uri))
        check_own(config, run, Path(checkpoint.uri))
        check_unchanged(config, run, Path(checkpoint.uri))
    base_source = base_folder(config)
    source = checkpoint.uri if checkpoint else base_source
    placed = config.in_phase("update") if updates_only else config
    policy = load(placed, source)
    engine = policy_engine(placed, policy, base_source, checkpoint, ranks.world_size)
    lost_moments = _lost_moments(manifest, config, ranks)
    if checkpoint and not lost_moments:
        restore_optimizer(engine, read_optimizer_state(Path(checkpoint.uri), ranks.rank))
    engine.eval()
    hosted = None if updates_only else hosted_optimizer(engine, config.training)
    if hosted:
        hosted.put_away()
    return Trainer(
        config=config,
        run=run,
        ranks=ranks,
        policy=policy,
        engine=engine,
        start=manifest["step"],
        validated=manifest["step"] in run.validations(),
        total_steps=total_steps(config, run.path),
        lost_moments=lost_moments,
        demonstrations=load_mix_in(config, run.path),
        base={} if checkpoint else describe_base(config.policy.model, source, policy.model.config),
        sampler=None if updates_only else load_engine(config, source),
        hosted=hosted,
    )


def _lost_moments(manifest: Mapping[str, Any], config: Config, ranks: Ranks) -> str:
    """Why a checkpoint's optimizer state cannot go on here; "" where it can. It is cut by ranks and ZeRO stage."""
    if not manifest["step"]:
        return ""
    written, here = (manifest["ranks"], manifest["zero_stage"]), (ranks.world_size, config.training.zero_stage)
    if written == here:
        return ""
    return (
        f"the checkpoint was written by {written[0]} workers under ZeRO {written[1]} and this run has {here[0]} under "
        f"ZeRO {here[1]}: the weights go on, AdamW's moments start anew"
    )


def train_step(trainer: Trainer, selected: Sequence[Rollout], step: int) -> StepUpdate:
    """The update of RS step `step` (from 1) on the selected rollouts, the same list on every rank, and the mix-in."""
    training = trainer.config.training
    with trainer.optimizer_at_hand():
        result = run_update(
            trainer.engine,
            mixed(selected, trainer.demonstrations, trainer.config, step),
            training,
            trainer.ranks,
            lr=learning_rate(step, training, total_steps=trainer.total_steps),
            stream=f"{trainer.config.seed}/step-{step}",
        )
    if result.optimizer_steps:
        follow(trainer.policy, trainer.engine)
    return result


def save_checkpoint(trainer: Trainer, step: int) -> Checkpoint | None:
    """Write and seal the checkpoint of an RS step over all ranks; the writer gets its reference. Raises DiskError."""
    run, training, loop = trainer.run, trainer.config.training, trainer.config.loop
    staging = staging_folder(run.checkpoints, step)
    with removed_if_failed(staging):
        if trainer.is_writer:
            _write_policy(trainer.policy, staging)
        trainer.barrier()
        with trainer.optimizer_at_hand():
            write_optimizer_state(staging, trainer.ranks.rank, optimizer_tensors(trainer.engine))
        if training.lora_rank:
            write_adapters(trainer.engine.module.policy, staging, is_writer=trainer.is_writer)
        trainer.barrier()
        checkpoint = None
        if trainer.is_writer:
            checkpoint = seal(
                run.checkpoints,
                step,
                config=trainer.config.model_dump(mode="json"),
                details={
                    "ranks": trainer.ranks.world_size,
                    "zero_stage": training.zero_stage,
                    **provenance(run, trainer.config, step, trainer.base),
                },
            )
            keep_manifests(run)
            kept = {"keep_last": loop.keep_last, "keep_best": loop.keep_best}
            prune(run.checkpoints, **kept, validations=run.validations(), failed=run.failed_step())
    trainer.barrier()
    return checkpoint


def _write_policy(policy: Policy, staging: Path) -> None:
    """A new staging folder with the policy as transformers reads it. Raises DiskError."""
    with disk_errors(staging), quiet_transformers():
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        policy.model.save_pretrained(staging)
        policy.reader.tokenizer.save_pretrained(staging)
