"""Supervised fine-tuning on all ranks: optimizer steps and validations; see alignment.fitting for their course.

The loss is the mean over the counted tokens of the whole optimizer step, whatever the ranks, the micro-batches and the
layout: packing changes how fast a step is, not what it does.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from alignment.config_training import SftSection
from alignment.engine import (
    Ranks,
    begin_step,
    build_engine,
    gradient_accumulation_steps,
    learning_rate,
    optimizer_step,
)
from alignment.micro_batches import sequence_micro_batches
from alignment.mixture import epoch_order
from alignment.sft_data import SftData
from alignment.types import TokenSequence
from models.sequence_loss import SequenceLoss


@dataclass(frozen=True, slots=True)
class SftTrainer:
    """One rank's hold on the policy under fine-tuning; only the weights and moments inside `engine` change."""

    engine: Any
    section: SftSection
    ranks: Ranks
    data: SftData
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per pass; the last may be smaller than the others."""
        return math.ceil(sum(map(len, self.data.train)) / self.section.global_batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        steps = self.section.epochs * self.steps_per_epoch
        return steps if self.section.max_steps is None else min(steps, self.section.max_steps)


def build_trainer(policy: nn.Module, section: SftSection, ranks: Ranks, data: SftData, *, seed: int) -> SftTrainer:
    """The engine around a policy whose trainable weights are where they should start. Raises ConfigError."""
    module = SequenceLoss(policy, packed=section.packing == "rows")
    engine = build_engine(module, section, zero_stage=section.zero_stage, world_size=ranks.world_size)
    engine.eval()
    trainer = SftTrainer(engine, section, ranks, data, seed)
    section.check_schedule(trainer.total_steps)
    return trainer


def train_step(trainer: SftTrainer, step: int) -> dict[str, Any]:
    """Optimizer step `step` (from 1) on all ranks; its record. Loss is nats per counted token, seconds by the clock.

    Raises TrainingError where the loss or the gradient is not finite.
    """
    section, ranks, engine = trainer.section, trainer.ranks, trainer.engine
    begun = time.monotonic()
    lr = learning_rate(step, section, total_steps=trainer.total_steps)
    begin_step(engine, lr=lr, stream=f"{trainer.seed}/sft-step-{step}/rank-{ranks.rank}")
    batch = step_examples(trainer, step)
    micro_batches = _micro_batches(trainer, batch, gradient_accumulation_steps(section, ranks.world_size))
    count = sum(s.num_learned for s in batch)
    (loss,), norm = optimizer_step(engine, micro_batches, count=count, ranks=ranks, section="sft")
    engine.eval()
    seconds, tokens = time.monotonic() - begun, sum(len(s.ids) for s in batch)
    return {
        **{"kind": "step", "step": step, "loss": loss / count, "grad_norm": norm, "lr": lr},
        **{"examples": len(batch), "tokens": tokens, "learned_tokens": count},
        **{"seconds": seconds, "tokens_per_second": tokens / seconds},
    }


@torch.no_grad()
def validate(trainer: SftTrainer, step: int) -> list[dict[str, Any]]:
    """The record of the validation after optimizer step `step`: mean loss in nats per counted token; none without.

    All ranks run as many forward passes: ZeRO-3 needs all of them in each.
    """
    examples = trainer.data.validation
    if examples is None:
        return []
    ranks, module = trainer.ranks, trainer.engine.module
    trainer.engine.eval()
    sequences = list(examples)
    passes = math.ceil(math.ceil(len(sequences) / trainer.section.micro_batch_size) / ranks.world_size)
    total = torch.zeros((), dtype=torch.float64, device=trainer.engine.device)
    for batch, weight in _micro_batches(trainer, sequences, passes):
        total += module(batch)[0].double() * weight
    if ranks.world_size > 1:
        torch.distributed.all_reduce(total)
    loss = float(total) / sum(s.num_learned for s in sequences)
    return [{"kind": "validation", "step": step, "set": "validation", "loss": loss}]


def step_examples(trainer: SftTrainer, step: int) -> list[TokenSequence]:
    """The examples of optimizer step `step`, over all ranks."""
    train, size = trainer.data.train, trainer.section.global_batch_size
    epoch, index = divmod(step - 1, trainer.steps_per_epoch)
    order = epoch_order(tuple(map(len, train)), trainer.data.weights, seed=trainer.seed, epoch=epoch)
    return [train[source][i] for source, i in order[index * size : (index + 1) * size]]


def _micro_batches(
    trainer: SftTrainer, batch: Sequence[TokenSequence], passes: int
) -> list[tuple[Sequence[TokenSequence], float]]:
    section = trainer.section
    return sequence_micro_batches(
        batch, section.micro_batch_size, trainer.ranks, passes, packed=section.packing == "rows"
    )
