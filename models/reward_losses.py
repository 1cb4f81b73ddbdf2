"""Losses of reward models, as pure functions of tensors.

Each returns the sum over its batch, not the mean: the caller divides by the count of the whole optimizer step,
over all ranks and micro-batches, so that the loss does not depend on how the step was cut. All is computed and
returned in float32, whatever the model's dtype: bfloat16 holds two or three digits.

Legend: B pairs or answers, A attributes. Rewards and margins have no unit, losses of pairs are in nats.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss_sum(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Sum of −log σ(r_chosen − r_rejected): the preferences' negative log-likelihood.

    Bradley and Terry 1952; Ouyang et al. 2022 (arXiv 2203.02155), equation 1.

    Shape: both (B,); returns a scalar.
    """
    return -F.logsigmoid(chosen.float() - rejected.float()).sum()


def margin_loss_sum(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """Sum of −log σ(r_chosen − r_rejected − m): a clear preference asks for a wide gap.

    Touvron et al. 2023 (Llama 2, arXiv 2307.09288), equation 2. The margin is in the unit of the rewards: it
    shifts the gap at which a pair counts as learned.

    Shape: all (B,), margins ≥ 0; returns a scalar.
    """
    return -F.logsigmoid(chosen.float() - rejected.float() - margins.float()).sum()


def scaled_loss_sum(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """Sum of −m log σ(r_chosen − r_rejected): a clear preference counts as m pairs.

    The scaled Bradley-Terry loss of Wang et al. 2024 (HelpSteer2-Preference, arXiv 2410.01257). A pair of
    margin 0 teaches nothing. The caller divides by the number of pairs, as there, not by the sum of margins.

    Shape: all (B,), margins ≥ 0; returns a scalar.
    """
    return -(margins.float() * F.logsigmoid(chosen.float() - rejected.float())).sum()


def regression_loss_sum(predicted: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Sum of (predicted − label)² over the labelled attributes, in the labels' unit squared.

    The reward model of HelpSteer2 (Wang et al. 2024, arXiv 2406.08673) and of NeMo-Aligner's regression
    training. `mask` is true where there is a label; elsewhere loss and gradient are exactly 0, whatever
    stands in `labels` or `predicted`, nan included.

    Shape: all (B, A), mask bool; returns a scalar.
    """
    # where before the square, not a product after it: nan times 0 is nan, in the loss and in the gradient.
    errors = torch.where(mask, predicted.float() - labels.float(), 0.0)
    return errors.square().sum()


def merged_reward(outputs: Tensor, weights: Tensor) -> Tensor:
    """The scalar reward Σ_a w_a · output_a of a model of several attributes.

    Wang et al. 2024 (HelpSteer2, arXiv 2406.08673), NeMo-Aligner's merge weights. A weight may be negative
    (verbosity) or 0 (an attribute that is learned and not used).

    Shape: outputs (B, A), weights (A,); returns (B,) in float32.
    """
    # Not a matmul: on GPUs its products may be rounded to TF32, and a served reward must not depend on that.
    return (outputs.float() * weights.float()).sum(dim=-1)
