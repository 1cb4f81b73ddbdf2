"""The loss that the update and supervised fine-tuning train on: a policy as a module whose forward is the loss.

Legend: B rows, T tokens, N tokens that the loss counts, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignment.types import TokenSequence
from models.adapters import causal_lm
from models.head import Reference, TokenHead, has_plain_head, loss_sums
from models.packing import SequenceBatch, sequence_batch


class SequenceLoss(nn.Module):
    """What the engine wraps: a policy, with LoRA adapters or without, and the loss of some of its tokens.

    With a `kl_penalty`, the loss holds that times the KL to the base: to `base`, a model that is kept out of the
    module's parameters (neither trained nor saved, nor sharded), or to the policy without its adapters.
    """

    def __init__(self, policy: Any, *, packed: bool, base: Any = None, kl_penalty: float = 0.0) -> None:
        super().__init__()
        lm = causal_lm(policy)
        self.policy, self.packed, self.kl_penalty = policy, packed, kl_penalty
        self.head = TokenHead(lm.get_output_embeddings(), kl_penalty) if has_plain_head(lm) else None
        self.context = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
        self._others = (lm, base)  # in a tuple, where torch does not look for modules

    def forward(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """The loss, and with a penalty the KL, summed over the counted tokens, in nats. Shape: (1,) or (2,)."""
        device = next(self.policy.parameters()).device
        batch = sequence_batch(sequences, packed=self.packed, context=self.context, device=device)
        lm, base = self._others
        if self.head is None:
            return loss_sums(_logits(lm, batch), batch.targets, self._of_base(_logits, batch), self.kl_penalty)
        reference = None
        if self.kl_penalty:
            reference = Reference(
                self._of_base(hidden_states, batch), None if base is None else base.get_output_embeddings()
            )
        sums: Tensor = self.head(hidden_states(lm, batch), batch.targets, reference)
        return sums

    @torch.no_grad()
    def _of_base(self, look: Any, batch: SequenceBatch) -> Any:
        """What `look` finds in the base, in evaluation mode; None without a penalty."""
        if not self.kl_penalty:
            return None
        lm, base = self._others
        if base is not None:
            return look(base, batch)
        training = self.policy.training
        self.policy.eval()
        with self.policy.disable_adapter():
            found = look(lm, batch)
        self.policy.train(training)
        return found


def hidden_states(lm: Any, batch: SequenceBatch) -> Tensor:
    """Last hidden states of the places that predict a counted token. Shape: (N, D)."""
    output = lm.base_model(input_ids=batch.input_ids, use_cache=False, **_positions(batch))
    hidden: Tensor = output.last_hidden_state.flatten(0, 1)[batch.predicts]
    return hidden


def _logits(lm: Any, batch: SequenceBatch) -> Tensor:
    """Logits of the places that predict a counted token. Shape: (N, V)."""
    columns, place = (batch.predicts % batch.input_ids.shape[1]).unique(return_inverse=True)
    output = lm(input_ids=batch.input_ids, use_cache=False, logits_to_keep=columns, **_positions(batch))
    logits: Tensor = output.logits[batch.predicts // batch.input_ids.shape[1], place]
    return logits


def _positions(batch: SequenceBatch) -> dict[str, Tensor]:
    return {} if batch.position_ids is None else {"position_ids": batch.position_ids}
