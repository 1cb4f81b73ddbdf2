"""Measuring a trained reward model, in process, on the sets that were held out for it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignment.config import Config
from alignment.reward_data import Example
from alignment.reward_quality import as_json, pair_quality, regression_quality

UNCUT = 1_000_000
"""Tokens that no text has: lengths are those of what was written, not of what the model read of it."""


def measure(
    config: Config, model: Any, tokenizer: Any, sets: Mapping[str, Sequence[Example]]
) -> dict[str, dict[str, Any]]:
    """The quality of each set by name, as it stands in the model card."""
    return {name: _quality(config, model, tokenizer, examples) for name, examples in sets.items()}


def num_cut(config: Config, tokenizer: Any, examples: Sequence[Example]) -> int:
    """How many texts are longer than what the model reads of them."""
    from models.reward_model import encode

    rows = encode(tokenizer, [text for example in examples for text in example.texts], UNCUT)
    return sum(len(row) > config.reward.max_tokens for row in rows)


def _quality(config: Config, model: Any, tokenizer: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """Of pairs the lengths are those of the answers, which the rules "shorter wins" and "longer wins" look at."""
    import torch

    from models.reward_losses import merged_reward
    from models.reward_model import encode, score_outputs

    texts = [text for example in examples for text in example.texts]
    outputs = score_outputs(model, tokenizer, texts, max_tokens=config.reward.max_tokens)
    rewards = np.array(merged_reward(torch.tensor(outputs), torch.tensor(config.merge_weights)).tolist())
    if examples[0].labels:
        labels = [example.labels for example in examples]
        measured = as_json(regression_quality(outputs, labels, config.reward_training.attributes))
        return {**measured, "reward_mean": float(rewards.mean()), "reward_std": float(rewards.std())}
    lengths = [len(row) for row in encode(tokenizer, [a for example in examples for a in example.answers], UNCUT)]
    sides = (rewards[::2].tolist(), rewards[1::2].tolist(), lengths[::2], lengths[1::2])
    return as_json(pair_quality(*sides, seed=config.seed))
