"""The config of a run's gate (`alignment.promotion`) and of what ends its loop early (`alignment.rollback`)."""

from typing import Annotated

from pydantic import Field

from alignment.config_sections import Number, Section
from alignment.config_training import TrainingSection


class PromotionSection(Section):
    min_reward_gain: Number = 0.0
    """Reward gain over the base, in the reward's own unit, above which its 95 % interval must lie."""
    max_judge_fall: Number | None = Field(0.5, ge=0)
    """Fall of the judge's mean that its interval must rule out, in standard deviations of its scores of the base; the
    same for each of reward_ensemble.shadows. Null leaves these rules out."""
    max_length_ratio: Number | None = Field(None, gt=0)
    """Mean response length over the base's, in tokens, that its interval may reach; null leaves the rule out."""
    max_kl: Number | None = Field(None, gt=0)
    """KL to the base, in nats per response, that its interval may reach; null leaves the rule out."""
    min_distinct_ratio: Number | None = Field(None, gt=0)
    """Least share of the base's distinct_2 that the policy's must have; null leaves the rule out."""
    max_validation_fall: Number | None = Field(1.0, ge=0)
    """Fall below the best validation so far, in standard deviations of the first validation's rewards, that ends the
    loop once its interval lies above it; null never."""
    max_kl_per_token: Number | None = Field(None, gt=0)
    """KL to the base of the texts trained on, in nats per token, above which an RS step ends the loop; null never."""
    alias: Annotated[str, Field(pattern=r"^[a-z]+$")] | None = None
    """Alias of the registry that a promoted policy gets, `promoted` say; null sets none."""


def check_promotion(promotion: PromotionSection, training: TrainingSection) -> None:
    """Raise ValueError for keys that do not go together."""
    if promotion.max_kl_per_token is not None and not training.kl_penalty:
        raise ValueError(
            f"promotion.max_kl_per_token ({promotion.max_kl_per_token:g}) reads the KL that the update measures where "
            "training.kl_penalty (0) is above 0: set the latter, or leave the former null"
        )
    if promotion.alias == "latest":
        raise ValueError(
            "promotion.alias (latest) means the newest version, promoted or not: name another, `promoted` say"
        )
