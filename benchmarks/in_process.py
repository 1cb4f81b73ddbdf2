"""The ceiling: the reward model called in this process, with the served model's micro-batching and no server.

All texts are sorted together, and rows times the longest stay within the token budget. A server sees only
what is in flight, so this ceiling is a strict one. The forward pass is written out here rather than
shared with the served code, so that a mistake there shows as different rewards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.reward_model import PASS_TOKENS, encode, micro_batches, render


@dataclass(frozen=True)
class LocalRewardModel:
    """An encoder with one output in this process, and how it reads conversations."""

    model: Any
    tokenizer: Any
    template: str
    max_tokens: int
    token_budget: int

    def rows(self, conversations: Sequence[Any]) -> list[list[int]]:
        """Token ids of each conversation, special tokens included."""
        return encode(self.tokenizer, [render(self.template, one) for one in conversations], self.max_tokens)

    def score(self, conversations: Sequence[Any]) -> list[float]:
        """The reward of each conversation, in order."""
        rows = self.rows(conversations)
        rewards = [0.0] * len(rows)
        for indices in micro_batches([len(row) for row in rows], self.token_budget, PASS_TOKENS["cpu"]):
            for index, reward in zip(indices, self._forward([rows[i] for i in indices]), strict=True):
                rewards[index] = reward
        return rewards

    def _forward(self, rows: Sequence[Sequence[int]]) -> list[float]:
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=self.model.config.pad_token_id
        )
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        with torch.inference_mode():
            rewards: list[float] = self.model(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1).tolist()
        return rewards
