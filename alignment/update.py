"""The update: fine-tune the policy on the selected responses of one RS step.

ceil(selected / global_batch_size) optimizer steps, each normalised by its own response tokens over all
ranks: the gradient does not depend on micro-batches, ranks or padding. DeepSpeed averages over ranks and
divides by the accumulation steps, so each micro-batch's summed loss is scaled by
world_size × accumulation / N, where N counts the optimizer step's response tokens. A rank that runs short
takes micro-batches of zero weight, since all ranks must run backward equally often.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from alignment.config_sections import TrainingSection
from alignment.engine import Ranks, gradient_accumulation_steps
from alignment.errors import TrainingError
from alignment.types import Rollout, StepUpdate
from models.batching import ResponseBatch, response_batch


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
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{stream}/rank-{ranks.rank}".encode()).digest()[:8], "big"))
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    engine.train()
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
    tokens = sum(r.num_tokens for r in batch)
    accumulation = gradient_accumulation_steps(training, ranks.world_size)
    scale = ranks.world_size * accumulation / tokens
    loss_sum = torch.zeros((), device=engine.device)
    for rows in deal(batch, training.micro_batch_size, ranks, accumulation):
        weight = 1.0 if rows else 0.0
        loss = engine(_tensors(rows or [_shortest(batch)], pad_id, engine.device)) * weight
        loss_sum += loss.detach()
        engine.backward(loss * scale)
        norm = _unclipped_norm(engine)
        _check_finite(norm, "gradient norm")
        engine.step()
    if ranks.world_size > 1:
        torch.distributed.all_reduce(loss_sum)
    norm = float(engine.get_global_grad_norm()) if norm is None else norm
    _check_finite(norm, "gradient norm")
    _check_finite(float(loss_sum), "loss")
    return float(loss_sum), norm


def deal(batch: Sequence[Rollout], micro_batch_size: int, ranks: Ranks, accumulation: int) -> list[Sequence[Rollout]]:
    """This rank's micro-batches: rows of like length together, dealt in turn; empty ones fill up to `accumulation`."""
    by_length = sorted(batch, key=lambda r: -(len(r.prompt_ids) + len(r.response_ids)))
    micro_batches = [by_length[i : i + micro_batch_size] for i in range(0, len(by_length), micro_batch_size)]
    mine = micro_batches[ranks.rank :: ranks.world_size]
    return [*mine, *([[]] * (accumulation - len(mine)))]


def _shortest(batch: Sequence[Rollout]) -> Rollout:
    return min(batch, key=lambda r: len(r.prompt_ids) + len(r.response_ids))


def _tensors(rows: Sequence[Rollout], pad_id: int, device: torch.device) -> ResponseBatch:
    return response_batch([r.prompt_ids for r in rows], [r.response_ids for r in rows], pad_id, device)


def _check_finite(value: float | None, what: str) -> None:
    if value is not None and not math.isfinite(value):
        raise TrainingError(
            f"the {what} is {value}: training diverged. Lower training.lr, then start a new run; "
            "the checkpoints so far are intact"
        )


def _unclipped_norm(engine: Any) -> float | None:
    """The global gradient norm of a plain fp32 engine at its boundary; the other engines report their own.

    Without ZeRO in fp32, DeepSpeed clips with torch and keeps no record of the norm.
    """
    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
