"""The output head and the loss behind it, some tokens at a time: a batch's logits are never held whole.

A head's gradient is linear in the loss's, so each chunk's is taken right after its logits, in the forward pass, and
nothing is computed twice; what is kept for the backward pass is one gradient of the head and one of its inputs. That
asks for logits which are the head's output as it is. `has_plain_head` finds architectures that change it afterwards
(soft caps, scales); their logits are held whole.

Legend: N tokens that the loss counts, D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.losses import penalised_loss_sum, response_loss_sum

CHUNK = 512
"""Tokens whose logits are held at a time; see docs/performance.md for the measurement."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The base's side of the KL penalty: last hidden states (N, D) and its output head, None where that is shared."""

    hidden: Tensor
    head: Any | None


class TokenHead(nn.Module):
    """A causal LM's output head as a module whose forward is the summed loss; it shares the head's parameters.

    A module of its own with direct parameters, since that is what ZeRO-3 gathers.
    """

    def __init__(self, head: nn.Module, kl_penalty: float) -> None:
        super().__init__()
        self.weight, self.bias, self.kl_penalty = head.weight, getattr(head, "bias", None), kl_penalty

    def forward(self, hidden: Tensor, targets: Tensor, base: Reference | None) -> Tensor:
        """The loss, and with a base the KL to it, as sums over the tokens, in nats. Shape: returns (1,) or (2,)."""
        sums: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            hidden, self.weight, self.bias, targets, base, self.kl_penalty, torch.is_grad_enabled()
        )
        return sums


class _ChunkedLoss(torch.autograd.Function):
    """Only the first of the sums has a gradient: the second is for the record."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        base: Reference | None,
        kl_penalty: float,
        with_gradient: bool,
    ) -> Tensor:
        to_hidden, to_weight, to_bias = (with_gradient and needed for needed in ctx.needs_input_grad[:3])
        slope_hidden = torch.empty_like(hidden) if to_hidden else None
        # Sums over chunks in float32: bfloat16 would lose the later ones.
        slope_weight = torch.zeros_like(weight, dtype=torch.float32) if to_weight else None
        slope_bias = torch.zeros_like(bias, dtype=torch.float32) if to_bias and bias is not None else None
        sums = torch.zeros(1 if base is None else 2, device=hidden.device)
        for start in range(0, len(targets), CHUNK):
            tokens = slice(start, start + CHUNK)
            logits, base_logits = F.linear(hidden[tokens], weight, bias), None
            if base is not None:
                own = (weight, bias) if base.head is None else (base.head.weight, base.head.bias)
                base_logits = F.linear(base.hidden[tokens], *own)
            if not with_gradient:
                sums += loss_sums(logits, targets[tokens], base_logits, kl_penalty)
                continue
            parts, slope = _loss_and_slope(logits, targets[tokens], base_logits, kl_penalty)
            sums += parts
            if slope_hidden is not None:
                slope_hidden[tokens] = slope @ weight
            if slope_weight is not None:
                _add_product(slope_weight, slope, hidden[tokens])
            if slope_bias is not None:
                slope_bias += slope.sum(0)
        ctx.slopes = (
            slope_hidden,
            None if slope_weight is None else slope_weight.to(weight.dtype),
            None if slope_bias is None else slope_bias.to(weight.dtype),
        )
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slopes, ctx.slopes = ctx.slopes, None  # as large as the head: they must not outlive the backward pass
        scaled = [None if slope is None else slope.mul_(gradients[0][0]) for slope in slopes]
        return (*scaled, None, None, None, None)


def _loss_and_slope(
    logits: Tensor, targets: Tensor, base_logits: Tensor | None, kl_penalty: float
) -> tuple[Tensor, Tensor]:
    """The sums of some tokens and the gradient of their loss at the logits. Shape: (1,) or (2,), and (n, V)."""
    with torch.enable_grad():
        logits.requires_grad_()
        sums = loss_sums(logits, targets, base_logits, kl_penalty)
        (slope,) = torch.autograd.grad(sums[0], logits)
    return sums.detach(), slope


def _add_product(total: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """Adds slopeᵀ hidden. Shape: total (V, D) in float32, slope (n, V), hidden (n, D)."""
    if slope.dtype == total.dtype:
        total.addmm_(slope.T, hidden)
    else:
        total += slope.T @ hidden


def loss_sums(logits: Tensor, targets: Tensor, base_logits: Tensor | None, kl_penalty: float) -> Tensor:
    """The loss of logits (N, V), and with those of a base the KL to it, summed, in nats. Shape: (1,) or (2,)."""
    if base_logits is None:
        return response_loss_sum(logits, targets)[None]
    return torch.stack(penalised_loss_sum(logits, base_logits, targets, kl_penalty))


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Whether a causal LM's logits are its output head's product with the last hidden state, and nothing more.

    The model must be in evaluation mode, and whole.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    logits = model(input_ids=ids, use_cache=False).logits
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if not hidden.dtype == head.weight.dtype == logits.dtype:  # some compute or give logits in float32
        return False
    return bool(torch.equal(F.linear(hidden, head.weight, head.bias), logits))
