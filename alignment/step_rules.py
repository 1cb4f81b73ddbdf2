"""Which prompts an RS step reads and which rollouts it keeps, by the config: the same for every executor. No torch."""

from collections.abc import Sequence

from alignment.config import Config
from alignment.prompts import read_order
from alignment.selection import select
from alignment.types import Decision, Prompt, ScoredRollout


def step_prompts(config: Config, prompts: Sequence[Prompt], step: int) -> list[Prompt]:
    """The prompts that RS step `step` (from 1) reads."""
    order = read_order(
        len(prompts), num_rollout_samples=config.rollouts.num_rollout_samples, seed=config.seed, step=step - 1
    )
    return [prompts[i] for i in order]


def without_rollouts(prompts: Sequence[Prompt], scored: Sequence[ScoredRollout]) -> list[str]:
    """Ids of the prompts of a step that have no rollouts, since their shard was lost."""
    found = {r.prompt_id for r in scored}
    return [prompt.prompt_id for prompt in prompts if prompt.prompt_id not in found]


def decide(config: Config, scored: Sequence[ScoredRollout]) -> list[Decision]:
    """Selection by the config's rule."""
    rule = config.selection
    return select(
        scored,
        strategy=rule.strategy,
        top_n=rule.top_n_rollouts,
        top_k=rule.top_k,
        min_reward=rule.min_reward,
        truncated=rule.truncated,
        seed=config.seed,
    )
