"""Selection: which scored responses the policy is trained on, and the reason for each decision.

Pure Python. Filters come first and in this order, so that each response that is left out has one reason:

1. `truncated`: a response cut at max_new_tokens may be refused;
2. duplicates: of the same response text to one prompt only the lowest rollout index stays;
3. `min_reward`: rewards below the bound are refused.

What passes is eligible and is ranked within its prompt (`*_per_prompt`) or within the whole RS step
(`*_overall`). Truncation comes before duplicates so that a cut response never displaces a finished one
with the same text.
"""

import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal

from alignment.errors import ConfigError, DataError
from alignment.types import Decision, ScoredRollout

Strategy = Literal["top_per_prompt", "top_k_overall", "random_per_prompt", "random_k_overall"]
Truncated = Literal["allow", "prefer_finished", "refuse"]

STRATEGIES = ("top_per_prompt", "top_k_overall", "random_per_prompt", "random_k_overall")
TRUNCATED = ("allow", "prefer_finished", "refuse")
REWARD_DECIMALS = 4
"""Rewards are compared rounded to this many decimals: batching moves a score by about 1e-6, which may not decide."""


def select(
    scored: Sequence[ScoredRollout],
    *,
    strategy: Strategy,
    top_n: int = 1,
    top_k: int | None = None,
    min_reward: float | None = None,
    truncated: Truncated = "allow",
    seed: int = 0,
) -> list[Decision]:
    """Decides about every rollout of one RS step; returns one `Decision` per rollout, in the given order.

    `top_per_prompt` keeps the `top_n` best rewards of each prompt, `top_k_overall` the `top_k` best of the
    step. `random_per_prompt` and `random_k_overall` keep as many, ranked by a hash of (seed, prompt id,
    rollout index): they look at no reward but for `min_reward`, and a prompt's ranking depends neither on
    the order of the rollouts nor on other prompts. Ties of rounded rewards go to the lowest rollout index,
    then to the prompt that comes first in `scored`. `top_n` is read by the per-prompt strategies, `top_k`
    by the overall ones. Fewer than asked for are selected where fewer are eligible.

    Raises ConfigError for a bad argument, DataError for a reward that is not finite or for two rollouts
    with the same prompt id and rollout index.
    """
    _check_arguments(strategy, top_n, top_k, min_reward, truncated)
    _check_rollouts(scored)
    reasons = _refusals(scored, truncated, min_reward)
    eligible = [i for i in range(len(scored)) if i not in reasons]
    per_prompt = strategy.endswith("per_prompt")
    keep = top_n if per_prompt else top_k or 0
    groups = _group(eligible, lambda i: scored[i].prompt_id) if per_prompt else [eligible]
    random = strategy.startswith("random")
    selected: set[int] = set()
    place = {prompt_id: n for n, prompt_id in enumerate(dict.fromkeys(r.prompt_id for r in scored))}

    def order(i: int) -> tuple[float | str, int, int]:
        r = scored[i]
        first = _hash(seed, r.prompt_id, r.rollout_index) if random else -rounded(r.reward)
        return first, r.rollout_index, place[r.prompt_id]

    for group in groups:
        ranking = sorted(group, key=order)
        selected.update(ranking[:keep])
        for rank, i in enumerate(ranking, start=1):
            what = "random rank" if random else f"reward {_shown(scored[i].reward)} ranks"
            reasons[i] = f"{what} {rank} of {len(ranking)}"
    for i, r in enumerate(scored):
        if r.is_reference:  # what is kept of a step must tell what the policy did not say
            reasons[i] = f"reference answer: {reasons[i]}"
    return [Decision(r.prompt_id, r.rollout_index, i in selected, reasons[i]) for i, r in enumerate(scored)]


def _check_arguments(strategy: str, top_n: int, top_k: int | None, min_reward: float | None, truncated: str) -> None:
    if strategy not in STRATEGIES:
        raise ConfigError(f"selection.strategy ({strategy}) is unknown: use one of {', '.join(STRATEGIES)}")
    if truncated not in TRUNCATED:
        raise ConfigError(f"selection.truncated ({truncated}) is unknown: use one of {', '.join(TRUNCATED)}")
    if top_n < 1:
        raise ConfigError(f"selection.top_n_rollouts ({top_n}) must be >= 1: set it to the responses kept per prompt")
    if strategy.endswith("overall") and (top_k is None or top_k < 1):
        raise ConfigError(f"selection.top_k ({top_k}) must be >= 1 with selection.strategy {strategy}: set it")
    if min_reward is not None and math.isnan(min_reward):
        raise ConfigError(f"selection.min_reward ({min_reward}) must be a number, or null for no bound")


def _check_rollouts(scored: Sequence[ScoredRollout]) -> None:
    seen: set[tuple[Hashable, int]] = set()
    for r in scored:
        if not math.isfinite(r.reward):
            raise DataError(
                f"the reward of prompt_id {r.prompt_id!r}, rollout_index {r.rollout_index} is {r.reward}, "
                "not a finite number: check the reward model, then score this response again"
            )
        if (r.prompt_id, r.rollout_index) in seen:
            raise DataError(
                f"prompt_id {r.prompt_id!r}, rollout_index {r.rollout_index} occurs twice: "
                "every rollout of a prompt needs its own index, and every prompt its own id"
            )
        seen.add((r.prompt_id, r.rollout_index))


def _refusals(scored: Sequence[ScoredRollout], truncated: str, min_reward: float | None) -> dict[int, str]:
    """The reason of each rollout that may not be selected, by position."""
    reasons: dict[int, str] = {}
    finished = {r.prompt_id for r in scored if r.finish_reason == "stop"}
    for i, r in enumerate(scored):
        if r.finish_reason == "length" and truncated == "refuse":
            reasons[i] = "cut at max_new_tokens: refused"
        elif r.finish_reason == "length" and truncated == "prefer_finished" and r.prompt_id in finished:
            reasons[i] = "cut at max_new_tokens: a finished response exists"
    rest = [i for i in range(len(scored)) if i not in reasons]
    for twins in _group(rest, lambda i: (scored[i].prompt_id, scored[i].response)):
        first = min(scored[i].rollout_index for i in twins)
        for i in twins:
            if scored[i].rollout_index != first:
                reasons[i] = f"duplicate of rollout {first}"
    for i in rest:
        if i not in reasons and min_reward is not None and rounded(scored[i].reward) < rounded(min_reward):
            reasons[i] = f"reward {_shown(scored[i].reward)} below min_reward {_shown(min_reward)}"
    return reasons


def rounded(reward: float) -> float:
    """A reward as it is compared: rounded to 4 decimals, without a negative zero."""
    return round(float(reward), REWARD_DECIMALS) + 0.0


def _shown(reward: float) -> str:
    return repr(rounded(reward))


def _hash(seed: int, prompt_id: Hashable, rollout_index: int) -> str:
    return hashlib.sha256(repr((seed, prompt_id, rollout_index)).encode()).hexdigest()


def _group(positions: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for i in positions:
        groups.setdefault(key(i), []).append(i)
    return list(groups.values())
