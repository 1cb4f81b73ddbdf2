"""The loop that anyone would write first: transformers' own loss, backward, clipping, AdamW."""

from collections.abc import Sequence
from pathlib import Path

from alignment.types import Rollout
from benchmarks.update_setup import TRAINING


class PlainLoop:
    """One optimizer step on rows of one length, all of whose tokens but the first are learned.

    With `autocast` products run in bfloat16 and weights stay as they are, in `dtype`.
    """

    def __init__(
        self,
        policy: Path,
        examples: Sequence[Rollout],
        *,
        micro_batch_size: int | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        autocast: bool = False,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype).train().to(device)
        ids = torch.tensor([r.prompt_ids + r.response_ids for r in examples], device=device)
        self._ids, self._parts, self._autocast = ids, ids.split(micro_batch_size or len(ids)), autocast
        betas = (TRAINING["beta1"], TRAINING["beta2"])
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=TRAINING["lr"], betas=betas, weight_decay=TRAINING["weight_decay"], fused=True
        )

    def step(self) -> list[float]:
        """The step; returns the mean loss."""
        import torch

        total = 0.0
        for ids in self._parts:
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=self._autocast):
                loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss
            loss = loss * (len(ids) / len(self._ids))
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), TRAINING["gradient_clip"])
        self._optimizer.step()
        self._optimizer.zero_grad()
        return [float(total)]
