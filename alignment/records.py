"""The lines that an RS step and a validation leave in metrics.jsonl: all rollouts beside the selected ones.

The judge scores the same rollouts as the reward model, in every step: it is a shadow that selects nothing, and
`alignment.over_optimisation` compares the two.
"""

from collections.abc import Mapping, Sequence
from typing import Any

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
) -> dict[str, Any]:
    """The RS step's line. `scoring_server` is what `triton_metrics.difference` found, or its keys with None."""
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
        "response_length_mean": tokens / len(drawn),
        "truncated_fraction": mean([scored[i].finish_reason == "length" for i in drawn]),
        "duplicate_fraction": 1 - len(distinct) / len(drawn),
        "num_rollouts": len(drawn),
        "num_selected": len(chosen),
        "num_selected_references": sum(scored[i].is_reference for i in chosen),
        "optimizer_steps": result.optimizer_steps,
        "response_tokens": result.response_tokens,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "seconds": dict(seconds),
        "scoring_server": dict(scoring_server),
        "tokens_per_second": tokens / seconds["rollouts"],
        "prompt_ids": list(dict.fromkeys(r.prompt_id for r in scored)),
    }


def validation_record(step: int, scored: Sequence[ScoredRollout], judge: Judge, seconds: float) -> dict[str, Any]:
    """The validation's line; `rewards` and `judged` are one score per validation prompt, in the prompts' order."""
    rewards, judged = [r.reward for r in scored], _judged(judge, scored)
    return {
        "kind": "validation",
        "step": step,
        "reward_mean": mean(rewards),
        "judge_mean": mean(judged),
        "rewards": rewards,
        "judged": judged,
        "seconds": seconds,
    }


def mean(values: Sequence[float]) -> float | None:
    """The mean; None where there is nothing to average."""
    return sum(values) / len(values) if values else None


def _judged(judge: Judge, scored: Sequence[ScoredRollout]) -> list[float]:
    return judge.score([judge_text(r.conversation) for r in scored])
