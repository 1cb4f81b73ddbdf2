"""Which part of a data set an item belongs to: train, validation, test or any other names, by its prompt alone.

A part is found by hashing, not by shuffling: an item stays in its part when others are added, removed or
reordered, and a prompt met in two files falls into the same part of both. So a part's size is its share only on
average: of n distinct prompts, n·share ± √(n·share·(1 − share)).
"""

import hashlib
import json
import math
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import TypeVar

from alignment.errors import ConfigError, DataError
from alignment.types import Conversation

T = TypeVar("T")


def split_by_prompt(
    items: Iterable[T], prompt_of: Callable[[T], Conversation], shares: Mapping[str, float], seed: int
) -> dict[str, list[T]]:
    """Every item in one of the named parts, each in the order of the items; equal prompts share a part.

    Two prompts are equal when roles and contents of their messages are. `shares` are fractions that sum to 1, as
    {"train": 0.8, "validation": 0.1, "test": 0.1}; a part of share 0 stays empty, and one of few prompts may.

    Raises ConfigError for other shares, DataError for an item without a prompt: nothing would tell whether its
    answers' prompt occurs in another part.
    """
    _check(shares)
    names = [name for name, share in shares.items() if share > 0]
    # The last part takes what is left, so that the rounding of the sum leaves no gap.
    bounds = list(accumulate(shares[name] for name in names[:-1]))
    parts: dict[str, list[T]] = {name: [] for name in shares}
    for number, item in enumerate(items, start=1):
        prompt = prompt_of(item)
        if not prompt:
            raise DataError(
                f"item {number} has no prompt to split by: give each item its prompt, or one file for each part"
            )
        parts[names[bisect(bounds, _position(prompt, seed))]].append(item)
    return parts


def _position(prompt: Conversation, seed: int) -> float:
    """Where a prompt lies in [0, 1): uniform over prompts, a function of (seed, messages)."""
    key = json.dumps([seed, [[message["role"], message["content"]] for message in prompt]])
    # 53 bits: as many as a float holds without rounding, so that 1 is never reached.
    return (int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 11) / (1 << 53)


def _check(shares: Mapping[str, float]) -> None:
    if not all(0 <= share <= 1 for share in shares.values()) or not math.isclose(sum(shares.values()), 1):
        raise ConfigError(
            f"shares ({', '.join(f'{name}={share}' for name, share in shares.items())}) must each be from 0 to 1 "
            f"and sum to 1; their sum is {sum(shares.values()):g}"
        )
