"""The loop that anyone would write first: transformers' own loss, backward, clipping, AdamW."""

from collections.abc import Sequence
from pathlib import Path

from alignment.types import Rollout
from benchmarks.update_setup import TRAINING


class PlainLoop:
    """One optimizer step on rows of one length, all of whose tokens but the first are learned."""

    def __init__(self, policy: Path, examples: Sequence[Rollout]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).train()
        self._ids = torch.tensor([r.prompt_ids + r.response_ids for r in examples])
        betas = (TRAINING["beta1"], TRAINING["beta2"])
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=TRAINING["lr"], betas=betas, weight_decay=TRAINING["weight_decay"], fused=True
        )

    def step(self) -> list[float]:
        """The step; returns the mean loss."""
        import torch

        loss = self._model(input_ids=self._ids, labels=self._ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), TRAINING["gradient_clip"])
        self._optimizer.step()
        self._optimizer.zero_grad()
        return [float(loss.detach())]
