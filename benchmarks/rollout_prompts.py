"""The workload of the benchmarks of rollouts: 16 prompts of 40 to 200 tokens, beginnings of reviews, 8 samples each."""

from pathlib import Path
from typing import TYPE_CHECKING

from alignment.types import Prompt
from benchmarks.texts import whole_reviews

if TYPE_CHECKING:
    from models.policy import Policy

NUM_PROMPTS, SAMPLES_PER_PROMPT, MAX_NEW_TOKENS = 16, 8, 64
SHORTEST, LONGEST = 40, 200
"""Tokens of a prompt; their lengths are evenly spaced."""


def smollm2(cache: Path) -> "Policy":
    """SmolLM2-135M in fp32, which continues texts."""
    from alignment.embedded import policy_folder
    from models.policy import load_policy

    return load_policy(policy_folder("smollm2-135m", cache), prompt_format="text")


def review_prompts(policy: "Policy") -> list[Prompt]:
    """Beginnings of long reviews, cut after so many of the policy's tokens."""
    step = (LONGEST - SHORTEST) / (NUM_PROMPTS - 1)
    prompts = []
    for i, [message] in enumerate(whole_reviews(NUM_PROMPTS, min_words=2 * LONGEST)):
        ids = policy.reader.encode(message["content"])[: round(SHORTEST + i * step)]
        text = policy.reader.decode([], ids)
        prompts.append(Prompt(prompt_id=str(i), messages=({"role": "user", "content": text},)))
    return prompts
