"""The update: fine-tune the policy on the selected responses of one RS step.

ceil(selected / global_batch_size) optimizer steps, each normalised by its own response tokens over all
ranks: the gradient does not depend on micro-batches, ranks or padding. A rank that runs short takes
micro-batches of zero weight, since all ranks must run backward equally often.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from alignment.config_training import TrainingSection
from alignment.engine import Ranks, begin_step, gradient_accumulation_steps, optimizer_step
from alignment.types import Rollout, StepUpdate
from models.batching import ResponseBatch, response_batch, response_logits
from models.losses import penalised_loss_sum, response_loss_sum

Item = TypeVar("Item")


class ResponseLoss(nn.Module):
    """A policy as a module whose forward is the summed response loss: what the engine wraps.

    With a `base`, the loss holds `kl_penalty` times the KL to it. The base is kept out of the module's parameters: it
    is neither trained nor saved, nor sharded.
    """

    def __init__(self, policy: nn.Module, base: nn.Module | None = None, kl_penalty: float = 0.0) -> None:
        super().__init__()
        self.policy, self.kl_penalty = policy, kl_penalty
        self._base = (base,)  # in a tuple, where torch does not look for parameters

    def forward(self, batch: ResponseBatch) -> Tensor:
        """Cross-entropy, and the penalty, summed over the batch's response tokens, in nats; a scalar."""
        logits, (base,) = response_logits(self.policy, batch), self._base
        if base is None:
            return response_loss_sum(logits, batch.targets, batch.response_mask)
        with torch.no_grad():
            base_logits = response_logits(base, batch)
        return penalised_loss_sum(logits, base_logits, batch.targets, batch.response_mask, self.kl_penalty)


def update(
    engine: Any,
    selected: Sequence[Rollout],
    training: TrainingSection,
    ranks: Ranks,
    *,
    lr: float,
    pad_id: int,
    stream: str,
) -> StepUpdate:
    """Train on the selected rollouts, the same list on every rank. An empty list updates nothing.

    `stream` names the randomness of dropout, e.g. "<seed>/step-7": like all else it has no state to save.
    Raises TrainingError where the loss or the gradient is not finite: before anything is saved, though under
    ZeRO, which knows its norm only after the step, the weights in memory have changed.
    """
    begin_step(engine, lr=lr, stream=f"{stream}/rank-{ranks.rank}")
    losses, norms = [], []
    for start in range(0, len(selected), training.global_batch_size):
        loss, norm = _optimizer_step(
            engine, selected[start : start + training.global_batch_size], training, ranks, pad_id
        )
        losses.append(loss)
        norms.append(norm)
    engine.eval()
    tokens = sum(r.num_tokens for r in selected)
    return StepUpdate(
        optimizer_steps=len(losses),
        response_tokens=tokens,
        loss=sum(losses) / tokens if losses else None,
        grad_norm=max(norms, default=None),
        lr=lr,
    )


def _optimizer_step(
    engine: Any, batch: Sequence[Rollout], training: TrainingSection, ranks: Ranks, pad_id: int
) -> tuple[float, float]:
    """One optimizer step; returns the loss summed over all ranks' response tokens (nats) and the gradient norm."""
    accumulation = gradient_accumulation_steps(training, ranks.world_size)
    micro_batches = [
        (_tensors(rows or [_shortest(batch)], pad_id, engine.device), 1.0 if rows else 0.0)
        for rows in deal(batch, training.micro_batch_size, ranks, accumulation, _length)
    ]
    tokens = sum(r.num_tokens for r in batch)
    return optimizer_step(engine, micro_batches, count=tokens, ranks=ranks, section="training")


def deal(
    batch: Sequence[Item], micro_batch_size: int, ranks: Ranks, accumulation: int, length: Callable[[Item], int]
) -> list[Sequence[Item]]:
    """This rank's micro-batches: rows of like length together, dealt in turn; empty ones fill up to `accumulation`."""
    by_length = sorted(batch, key=length, reverse=True)
    micro_batches = [by_length[i : i + micro_batch_size] for i in range(0, len(by_length), micro_batch_size)]
    mine = micro_batches[ranks.rank :: ranks.world_size]
    return [*mine, *([[]] * (accumulation - len(mine)))]


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.response_ids)


def _shortest(batch: Sequence[Rollout]) -> Rollout:
    return min(batch, key=_length)


def _tensors(rows: Sequence[Rollout], pad_id: int, device: torch.device) -> ResponseBatch:
    return response_batch([r.prompt_ids for r in rows], [r.response_ids for r in rows], pad_id, device)
