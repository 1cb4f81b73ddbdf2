"""Training a reward model on all ranks: optimizer steps and validations; see alignment.fitting for their course.

Like the policy's training it has no state but the weights and AdamW's moments: the order of examples is a permutation
given by (seed, epoch), the learning rate a function of the step, dropout's stream named by seed, step and rank. So a
training that was interrupted goes on, with as many ranks, as if nothing had been.

Legend: B texts, P pairs (their B = 2P texts stand as all chosen, then all rejected), A outputs of the head.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alignment.config_training import RewardTrainingSection
from alignment.engine import (
    Ranks,
    begin_step,
    build_engine,
    gradient_accumulation_steps,
    learning_rate,
    optimizer_step,
)
from alignment.micro_batches import deal
from alignment.reward_data import Example
from models.reward_losses import bradley_terry_loss_sum, margin_loss_sum, regression_loss_sum, scaled_loss_sum
from models.reward_model import encode, forward_rows


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as token ids."""

    rows: tuple[tuple[int, ...], ...]
    margin: float | None
    labels: tuple[float | None, ...]

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self.rows))

    @property
    def count(self) -> int:
        """What it adds to the denominator of the loss: a pair counts 1, an answer its labels."""
        return sum(label is not None for label in self.labels) if self.labels else 1


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_tokens: int
) -> tuple[Encoded, ...]:
    """Examples as token ids, cut at `max_tokens`."""
    rows = iter(encode(tokenizer, [text for e in examples for text in e.texts], max_tokens))
    return tuple(Encoded(tuple(tuple(next(rows)) for _ in e.texts), e.margin, e.labels) for e in examples)


class RewardLoss(nn.Module):
    """A reward model as a module whose forward is the summed loss of some examples: what the engine wraps.

    On a GPU it computes in bfloat16 over float32 weights.
    """

    def __init__(self, model: nn.Module, loss: str) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, examples: Sequence[Encoded]) -> Tensor:
        """The summed loss: nats, or squared errors for `regression`; a scalar."""
        return self.of(self.outputs(examples), examples)

    def of(self, outputs: Tensor, examples: Sequence[Encoded]) -> Tensor:
        """The summed loss of outputs (B, A) of these examples."""
        if self.loss == "regression":
            labels = torch.tensor([[math.nan if x is None else x for x in e.labels] for e in examples])
            labels = labels.to(outputs.device)
            return regression_loss_sum(outputs, labels, ~labels.isnan())
        chosen, rejected = outputs[:, 0].split(len(examples))
        if self.loss == "bradley_terry":
            return bradley_terry_loss_sum(chosen, rejected)
        margins = torch.tensor([e.margin for e in examples], dtype=torch.float32, device=outputs.device)
        return {"margin": margin_loss_sum, "scaled": scaled_loss_sum}[self.loss](chosen, rejected, margins)

    def outputs(self, examples: Sequence[Encoded]) -> Tensor:
        """The head's outputs. Shape: returns (B, A) in float32."""
        rows = [e.rows[side] for side in range(len(examples[0].rows)) for e in examples]
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            return forward_rows(self.model, rows, device)


@dataclass(frozen=True, slots=True)
class RewardTrainer:
    """One rank's hold on the reward model under training; only the weights and moments inside `engine` change."""

    engine: Any
    section: RewardTrainingSection
    ranks: Ranks
    train: tuple[Encoded, ...]
    validation: Mapping[str, tuple[Encoded, ...]]
    seed: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.section.epochs * self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per pass; the last may be smaller than the others."""
        return math.ceil(len(self.train) / self.section.global_batch_size)


def build_trainer(
    model: nn.Module,
    section: RewardTrainingSection,
    ranks: Ranks,
    *,
    train: tuple[Encoded, ...],
    validation: Mapping[str, tuple[Encoded, ...]],
    seed: int,
) -> RewardTrainer:
    """The engine around a model whose trainable weights are where they should start. Raises ConfigError."""
    module = RewardLoss(model, section.loss)
    engine = build_engine(module, section, zero_stage=section.zero_stage, world_size=ranks.world_size)
    trainer = RewardTrainer(engine, section, ranks, train, validation, seed)
    section.check_schedule(trainer.total_steps)
    return trainer


def train_step(trainer: RewardTrainer, step: int) -> dict[str, Any]:
    """Optimizer step `step` (from 1) on all ranks; its record: mean loss, gradient norm, learning rate.

    Raises TrainingError where the loss or the gradient is not finite.
    """
    section, ranks, engine = trainer.section, trainer.ranks, trainer.engine
    lr = learning_rate(step, section, total_steps=trainer.total_steps)
    begin_step(engine, lr=lr, stream=f"{trainer.seed}/reward-step-{step}/rank-{ranks.rank}")
    batch = _batch(trainer, step)
    accumulation = gradient_accumulation_steps(section, ranks.world_size)
    count = sum(e.count for e in batch)
    micro_batches = _micro_batches(trainer, batch, accumulation)
    (loss,), norm = optimizer_step(engine, micro_batches, count=count, ranks=ranks, section="reward_training")
    engine.eval()
    return {"kind": "step", "step": step, "loss": loss / count, "grad_norm": norm, "lr": lr, "examples": len(batch)}


@torch.no_grad()
def validate(trainer: RewardTrainer, step: int) -> list[dict[str, Any]]:
    """The validations after optimizer step `step`: a record of each set with mean loss and, of pairs, accuracy."""
    trainer.engine.eval()
    return [
        {"kind": "validation", "step": step, "set": name, **_validate(trainer, examples)}
        for name, examples in trainer.validation.items()
    ]


def _validate(trainer: RewardTrainer, examples: Sequence[Encoded]) -> dict[str, float | None]:
    """Mean loss and accuracy over all ranks, which run as many forward passes: ZeRO-3 needs all of them in each."""
    section, ranks, module = trainer.section, trainer.ranks, trainer.engine.module
    passes = math.ceil(math.ceil(len(examples) / section.micro_batch_size) / ranks.world_size)
    totals = torch.zeros(2, dtype=torch.float64)
    for batch, weight in _micro_batches(trainer, examples, passes):
        outputs = module.outputs(batch)
        totals[0] += float(module.of(outputs, batch)) * weight
        if section.loss != "regression":
            chosen, rejected = outputs[:, 0].split(len(batch))
            wins = (chosen > rejected).double() + (chosen == rejected).double() / 2
            totals[1] += float(wins.sum()) * weight
    totals = totals.to(trainer.engine.device)
    if ranks.world_size > 1:
        torch.distributed.all_reduce(totals)
    accuracy = None if section.loss == "regression" else float(totals[1]) / len(examples)
    return {"loss": float(totals[0]) / sum(e.count for e in examples), "accuracy": accuracy}


def _batch(trainer: RewardTrainer, step: int) -> list[Encoded]:
    """The examples of optimizer step `step`: each epoch is a new permutation of all."""
    epoch, index = divmod(step - 1, trainer.steps_per_epoch)
    generator = torch.Generator().manual_seed(trainer.seed * 1_000_003 + epoch)
    order = torch.randperm(len(trainer.train), generator=generator).tolist()
    size = trainer.section.global_batch_size
    return [trainer.train[i] for i in order[index * size : (index + 1) * size]]


def _micro_batches(
    trainer: RewardTrainer, batch: Sequence[Encoded], passes: int
) -> list[tuple[Sequence[Encoded], float]]:
    """This rank's part as `passes` micro-batches with weight 1; a rank that runs short takes some of weight 0."""
    shortest = [min(batch, key=_length)]
    dealt = deal(batch, trainer.section.micro_batch_size, trainer.ranks, passes, _length)
    return [(rows or shortest, 1.0 if rows else 0.0) for rows in dealt]


def _length(example: Encoded) -> int:
    return example.length
