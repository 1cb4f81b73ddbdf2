"""Losses and divergences, as pure functions of tensors.

Legend: N tokens that the loss counts, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor


def response_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over tokens, in nats.

    The sum, not the mean: the update divides by the token count of the whole optimizer step, so that the
    loss does not depend on how the step was cut into micro-batches.

    Shape: logits (N, V), targets (N,); returns a scalar in float32.
    """
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def penalised_loss_sum(
    logits: Tensor, base_logits: Tensor, targets: Tensor, kl_penalty: float
) -> tuple[Tensor, Tensor]:
    """`response_loss_sum` plus `kl_penalty` times the exact KL(policy ‖ base), and that KL; sums over tokens, nats.

    The penalty is that of RLHF's objective (Ziegler et al., "Fine-Tuning Language Models from Human Preferences",
    2019, eq. 2), taken over the whole vocabulary at each position instead of at the sampled token: it costs one
    forward pass of the base and has no sampling noise of its own.

    Shape: logits and base_logits (N, V), targets (N,); returns scalars in float32.
    """
    divergence = token_kl(logits, base_logits).sum()
    return response_loss_sum(logits, targets) + kl_penalty * divergence, divergence


def token_kl(logits: Tensor, base_logits: Tensor) -> Tensor:
    """Exact KL(policy ‖ base) of each position's next-token distribution, in nats.

    KL = Σ_v p(v) (log p(v) − log q(v)) over the whole vocabulary, at temperature 1.

    Shape: both (…, V); returns (…).
    """
    log_p = F.log_softmax(logits.float(), dim=-1)
    log_q = F.log_softmax(base_logits.float(), dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
