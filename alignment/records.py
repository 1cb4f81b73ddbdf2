"""The lines that an RS step and a validation leave in metrics.jsonl: all rollouts beside the selected ones.

The judge scores the same rollouts as the reward model, in every step: it is a shadow that selects nothing, and
`alignment.over_optimisation` compares the two. Served shadows (`reward_ensemble.shadows`) stand beside it, and so do
the members of a reward that several models make; their keys are "name/version", and there where the models are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.statistics import expected_best
from alignment.types import Decision, ScoredRollout, StepUpdate
from models.judge import Judge, judge_text


def step_record(
    step: int,
    scored: Sequence[ScoredRollout],
    decisions: Sequence[Decision],
    result: StepUpdate,
    seconds: Mapping[str, float],
    *,
    judge: Judge,
    scoring_server: Mapping[str, Any],
    scoring_cache: Mapping[str, int] | None = None,
    lost_prompts: Sequence[str] = (),
    reused_from: str | None = None,
    gpu_memory_bytes: int | None = None,
) -> dict[str, Any]:
    """The RS step's line. `scoring_server` is what `triton_metrics.difference` found, or its keys with None.

    The line has these where there are any: what `scoring_cache` answered (`hits`) and did not (`misses`),
    `lost_prompts`, the ids of prompts whose shard was lost, and `reused_from`, the run that drew the rollouts, where it
    was another one. Then no tokens were drawn here, and `tokens_per_second` is None. `best_of_n` is the expected best
    reward of 1, 2, … of a prompt's own responses. `entropy` is nats per response token, estimated by the mean −log p of
    the tokens drawn: the policy's entropy where they were drawn at temperature 1 from the whole vocabulary, None for
    rollouts without probabilities. `gpu_memory_bytes` is the most that a worker's GPU held.
    """
    judged = _judged(judge, scored)
    chosen = [i for i, d in enumerate(decisions) if d.selected]
    drawn = [i for i, r in enumerate(scored) if not r.is_reference]  # what the policy itself said
    distinct = {(scored[i].prompt_id, scored[i].response) for i in drawn}
    tokens = sum(scored[i].num_tokens for i in drawn)
    return {
        "kind": "step",
        "step": step,
        "reward_mean": mean([scored[i].reward for i in drawn]),
        "selected_reward_mean": mean([scored[i].reward for i in chosen]),
        "judge_mean": mean([judged[i] for i in drawn]),
        "selected_judge_mean": mean([judged[i] for i in chosen]),
        **_means_by_model("", [scored[i] for i in drawn]),
        **_means_by_model("selected_", [scored[i] for i in chosen], like=scored),
        "best_of_n": expected_best(_by_prompt([scored[i] for i in drawn])),
        "entropy": _entropy([scored[i] for i in drawn]),
        "prompt_length_mean": mean([len(scored[i].prompt_ids) for i in drawn]),
        "response_length_mean": tokens / len(drawn),
        "selected_response_length_mean": mean([scored[i].num_tokens for i in chosen]),
        "truncated_fraction": mean([scored[i].finish_reason == "length" for i in drawn]),
        "duplicate_fraction": 1 - len(distinct) / len(drawn),
        "num_rollouts": len(drawn),
        "num_selected": len(chosen),
        "num_selected_references": sum(scored[i].is_reference for i in chosen),
        "optimizer_steps": result.optimizer_steps,
        "response_tokens": result.response_tokens,
        "loss": result.loss,
        "kl": result.kl,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "seconds": dict(seconds),
        "scoring_server": dict(scoring_server),
        "tokens_per_second": None if reused_from else tokens / seconds["rollouts"],
        "gpu_memory_bytes": gpu_memory_bytes,
        "prompt_ids": list(dict.fromkeys(r.prompt_id for r in scored)),
        **_cached(scoring_cache),
        **({"lost_prompts": list(lost_prompts)} if lost_prompts else {}),
        **({"reused_from": reused_from} if reused_from else {}),
    }


def validation_record(
    step: int,
    scored: Sequence[ScoredRollout],
    judge: Judge,
    seconds: float,
    *,
    scoring_cache: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The validation's line; `rewards`, `judged` and each of `shadowed` are one score per prompt, in their order.

    `scoring_cache` as in `step_record`.
    """
    rewards, judged = [r.reward for r in scored], _judged(judge, scored)
    return {
        "kind": "validation",
        "step": step,
        "reward_mean": mean(rewards),
        "judge_mean": mean(judged),
        **_means_by_model("", scored),
        "rewards": rewards,
        "judged": judged,
        **_shadowed(scored),
        **_cached(scoring_cache),
        "seconds": seconds,
    }


def mean(values: Sequence[float]) -> float | None:
    """The mean; None where there is nothing to average."""
    return sum(values) / len(values) if values else None


def _by_prompt(rollouts: Sequence[ScoredRollout]) -> list[list[float]]:
    """Rewards of each prompt."""
    found: dict[str, list[float]] = {}
    for one in rollouts:
        found.setdefault(one.prompt_id, []).append(one.reward)
    return list(found.values())


def _entropy(rollouts: Sequence[ScoredRollout]) -> float | None:
    """Mean −log p of all tokens that were drawn, in nats."""
    tokens = sum(len(r.log_probs) for r in rollouts)
    return -sum(sum(r.log_probs) for r in rollouts) / tokens if tokens else None


def _means_by_model(
    prefix: str, rollouts: Sequence[ScoredRollout], *, like: Sequence[ScoredRollout] | None = None
) -> dict[str, Any]:
    """`member_means` and `shadow_means`, where there are such models; which ones, `like` says if given."""
    found = {}
    for key, column in (("member_means", "member_rewards"), ("shadow_means", "shadow_rewards")):
        names = getattr((like or rollouts)[0], column)
        if names:
            found[prefix + key] = {name: mean([getattr(r, column)[name] for r in rollouts]) for name in names}
    return found


def _cached(counts: Mapping[str, int] | None) -> dict[str, Any]:
    return {"scoring_cache": dict(counts)} if counts is not None else {}


def _shadowed(scored: Sequence[ScoredRollout]) -> dict[str, Any]:
    names = scored[0].shadow_rewards
    return {"shadowed": {name: [r.shadow_rewards[name] for r in scored] for name in names}} if names else {}


def _judged(judge: Judge, scored: Sequence[ScoredRollout]) -> list[float]:
    return judge.score([judge_text(r.conversation) for r in scored])
