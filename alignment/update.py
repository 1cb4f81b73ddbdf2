"""The update: fine-tune the policy on the selected responses of one RS step.

ceil(selected / global_batch_size) optimizer steps, each normalised by its own response tokens over all
ranks: the gradient does not depend on micro-batches, ranks or padding. Prompts and responses lie as the sequences of
supervised fine-tuning do, and the loss is the same module (see `models.sequence_loss`).
"""

from collections.abc import Sequence
from typing import Any

from alignment.config_training import TrainingSection
from alignment.engine import Ranks, begin_step, gradient_accumulation_steps, optimizer_step
from alignment.micro_batches import sequence_micro_batches
from alignment.types import Rollout, StepUpdate, TokenSequence


def update(
    engine: Any, selected: Sequence[Rollout], training: TrainingSection, ranks: Ranks, *, lr: float, stream: str
) -> StepUpdate:
    """Train on the selected rollouts, the same list on every rank. An empty list updates nothing.

    `stream` names the randomness of dropout, e.g. "<seed>/step-7": like all else it has no state to save.
    Raises TrainingError where the loss or the gradient is not finite: before anything is saved, though under
    ZeRO, which knows its norm only after the step, the weights in memory have changed.
    """
    begin_step(engine, lr=lr, stream=f"{stream}/rank-{ranks.rank}")
    steps = []
    for start in range(0, len(selected), training.global_batch_size):
        batch = [token_sequence(r) for r in selected[start : start + training.global_batch_size]]
        steps.append(_optimizer_step(engine, batch, training, ranks))
    engine.eval()
    tokens = sum(r.num_tokens for r in selected)
    sums = [sum(parts) / tokens for parts in zip(*(sums for sums, _ in steps), strict=True)]
    return StepUpdate(
        optimizer_steps=len(steps),
        response_tokens=tokens,
        loss=sums[0] if sums else None,
        kl=sums[1] if len(sums) > 1 else None,
        grad_norm=max((norm for _, norm in steps), default=None),
        lr=lr,
    )


def _optimizer_step(
    engine: Any, batch: Sequence[TokenSequence], training: TrainingSection, ranks: Ranks
) -> tuple[list[float], float]:
    """One optimizer step; returns the loss (and the KL) summed over all ranks' response tokens (nats), and the norm."""
    passes = gradient_accumulation_steps(training, ranks.world_size)
    dealt = sequence_micro_batches(batch, training.micro_batch_size, ranks, passes, packed=engine.module.packed)
    count = sum(s.num_learned for s in batch)
    return optimizer_step(engine, dealt, count=count, ranks=ranks, section="training")


def token_sequence(rollout: Rollout) -> TokenSequence:
    """A rollout as the loss reads it: its response is learned."""
    prompt, response = rollout.prompt_ids, rollout.response_ids
    return TokenSequence((*prompt, *response), (False,) * len(prompt) + (True,) * len(response))
