"""What crosses the wire in scoring: conversations as JSON texts, rewards as a column of float32."""

import json
import math
from collections.abc import Sequence
from typing import Any

from alignment.errors import RewardRequestError, RewardServerError

CANARY = json.dumps([{"role": role, "content": "canary"} for role in ("user", "assistant")])
"""A conversation that every model can score."""


def to_json(conversation: Any, index: int) -> str:
    """A conversation as the server reads it. Raises RewardRequestError, naming `index`."""
    if isinstance(conversation, Sequence) and not isinstance(conversation, str):
        parts = list(conversation)
        if len(parts) == 2 and all(isinstance(part, str) for part in parts):
            parts = [{"role": "user", "content": parts[0]}, {"role": "assistant", "content": parts[1]}]
        if parts and all(_is_message(part) for part in parts):
            return json.dumps([{"role": part["role"], "content": part["content"]} for part in parts])
    raise RewardRequestError(
        f"conversation {index} must be a non-empty list of {{role, content}} messages or a (prompt, response) pair "
        f"of strings, got {str(conversation)[:80]!r}"
    )


def _is_message(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("role"), str) and isinstance(part.get("content"), str)


def text_tensor(texts: Sequence[str]) -> Any:
    """B texts as tritonclient's input tensor. Shape: (B, 1)."""
    import numpy as np
    import tritonclient.grpc as triton

    tensor = triton.InferInput("conversation", [len(texts), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=np.object_).reshape(-1, 1))
    return tensor


def reward_column(result: Any) -> list[float] | None:
    """The rewards of an answer; None where it holds no float32 column of them. How many they are is not looked at."""
    output = result.get_output("reward")
    if output is None or output.datatype != "FP32" or len(output.shape) != 2 or output.shape[1] != 1:
        return None
    try:
        rewards: list[float] = result.as_numpy("reward").reshape(-1).tolist()
    except ValueError:  # the data are not of the shape that they are said to have
        return None
    return rewards


def checked(rewards: list[float], expected: int, who: str, offset: int) -> list[float]:
    """The rewards that `who` gave to `expected` conversations, the first of index `offset`.

    Raises RewardServerError where they are more or fewer, RewardRequestError for one that is not finite.
    """
    if len(rewards) != expected:
        raise RewardServerError(f"{who} gave {len(rewards)} rewards for {expected} conversations")
    for index, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise RewardRequestError(f"{who} gave the reward {reward} to conversation {offset + index}")
    return rewards
