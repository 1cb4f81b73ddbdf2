"""The final evaluation: one response of the aligned policy against one of the base, on prompts nothing has seen.

Samples are drawn at temperature 1 from the whole distribution, so that the KL, measured along the aligned
samples, is that of the policies themselves. The base samples n + 1 responses: the first is the opponent,
the other n the pool of the best-of-n baseline, so that the opponent is not in the pool.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignment import statistics
from alignment.ensemble import Ensemble
from alignment.preference_statistics import length_controlled_win_rate, sign_test
from alignment.response_quality import refusal_fraction, repetition, self_bleu, truncated_fraction
from alignment.rollouts import generate, in_prompt_order
from alignment.types import Prompt, ScoredRollout
from models.batching import response_batch, response_logits
from models.judge import Judge, judge_text
from models.losses import token_kl
from models.policy import Policy
from models.sampling import Sampling

KL_ROWS = 16
"""Responses per forward pass of the KL: bounds the memory of the (rows, R, V) logits."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Samples:
    """Scored responses of one policy, one list a prompt, and the judge's scores beside them."""

    rollouts: list[list[ScoredRollout]]
    judged: list[list[float]]

    def first(self) -> list[ScoredRollout]:
        """The first response to each prompt."""
        return [group[0] for group in self.rollouts]


def sample_and_score(
    policy: Policy,
    prompts: Sequence[Prompt],
    ensemble: Ensemble,
    judge: Judge,
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    batch_tokens: int,
    stream: str,
    on_progress: Progress,
) -> Samples:
    """Responses at temperature 1 with rewards and judge scores, in the order of `prompts`."""
    rollouts = []
    for batch in generate(
        policy,
        prompts,
        samples_per_prompt=samples_per_prompt,
        sampling=Sampling(max_new_tokens),
        batch_tokens=batch_tokens,
        stream=stream,
    ):
        rollouts.extend(batch)
        on_progress(len(rollouts), len(prompts) * samples_per_prompt)
    scored = ensemble.score(in_prompt_order(rollouts, prompts))
    judged = judge.score([judge_text(r.conversation) for r in scored])
    groups = range(0, len(scored), samples_per_prompt)
    return Samples(
        [list(scored[i : i + samples_per_prompt]) for i in groups],
        [list(judged[i : i + samples_per_prompt]) for i in groups],
    )


def same_tokens(aligned: Policy, base: Policy) -> bool:
    """Whether a token id means the same to both policies: without that there is no KL from one to the other."""
    sizes = {policy.model.config.get_text_config().vocab_size for policy in (aligned, base)}
    return len(sizes) == 1 and aligned.reader.tokenizer.get_vocab() == base.reader.tokenizer.get_vocab()


@torch.inference_mode()
def kl_to_base(
    aligned: Policy, base: Policy, samples: Sequence[ScoredRollout], on_progress: Progress | None = None
) -> list[float]:
    """Exact KL to the base along each sample, in nats: the sum over its tokens, the ending one included."""
    values: list[float] = []
    for start in range(0, len(samples), KL_ROWS):
        rows = samples[start : start + KL_ROWS]
        batch = response_batch(
            [r.prompt_ids for r in rows], [r.response_ids for r in rows], aligned.eos_ids[0], aligned.device
        )
        divergence = token_kl(response_logits(aligned.model, batch), response_logits(base.model, batch))
        values.extend(torch.where(batch.response_mask, divergence, 0.0).sum(-1).tolist())
        if on_progress is not None:
            on_progress(len(values), len(samples))
    return values


def evaluation(base: Samples, aligned: Samples, kl: Sequence[float] | None) -> dict[str, Any]:
    """The `evaluation` part of report.json, from n + 1 samples of the base and one of the aligned a prompt.

    `kl` is that of each aligned sample, None where the two have no token ids in common.
    """
    best_of_n = len(base.rollouts[0]) - 1
    base_first, aligned_first = base.first(), aligned.first()
    base_reward, aligned_reward = _rewards(base_first), _rewards(aligned_first)
    base_judge, aligned_judge = [j[0] for j in base.judged], [j[0] for j in aligned.judged]
    kl_mean = None if kl is None else statistics.mean_difference(kl, [0.0] * len(kl))
    lengths = [[float(len(r.response)) for r in side] for side in (aligned_first, base_first)]
    gains = {
        "reward_gain": statistics.mean_difference(aligned_reward, base_reward),
        "judge_gain": statistics.mean_difference(aligned_judge, base_judge),
        "win_rate": statistics.win_rate(aligned_reward, base_reward),
        "judge_win_rate": statistics.win_rate(aligned_judge, base_judge),
        "length_controlled_win_rate": length_controlled_win_rate(aligned_reward, base_reward, *lengths),
        "judge_length_controlled_win_rate": length_controlled_win_rate(aligned_judge, base_judge, *lengths),
    }
    pools = (
        [[r.reward for r in group[1:]] for group in base.rollouts],
        base_reward,
        [group[1:] for group in base.judged],
        base_judge,
    )
    by_reward, by_judge = statistics.best_of_n_win_rate(*pools)
    result: dict[str, Any] = {
        "prompts": len(aligned_first),
        "base": _side(base_first, base_reward, base_judge),
        "aligned": {
            **_side(aligned_first, aligned_reward, aligned_judge),
            "kl_to_base": None if kl_mean is None else kl_mean.value,
            "kl_to_base_ci95": None if kl_mean is None else list(kl_mean.ci95),
        },
        "sign_test": sign_test(aligned_reward, base_reward)._asdict(),
        "judge_sign_test": sign_test(aligned_judge, base_judge)._asdict(),
        "best_of_n": {
            "n": best_of_n,
            "win_rate": by_reward,
            "judge_win_rate": by_judge,
            "kl_bound": statistics.best_of_n_kl_bound(best_of_n),
        },
        "best_of_n_curve": statistics.best_of_n_curve(*pools),
    }
    for name, estimate in gains.items():
        result |= {name: estimate.value, f"{name}_ci95": list(estimate.ci95)}
    return result | _shadows(base_first, aligned_first)


def paired_rows(base: Samples, aligned: Samples, kl: Sequence[float] | None) -> list[dict[str, Any]]:
    """One row a prompt: both responses with their scores; what later comparisons pair on."""
    divergences = [None] * len(base.judged) if kl is None else kl
    return [
        {
            "prompt_id": b.prompt_id,
            "prompt": b.prompt,
            "base_response": b.response,
            "aligned_response": a.response,
            "base_reward": b.reward,
            "aligned_reward": a.reward,
            "base_judge": base_judge[0],
            "aligned_judge": aligned_judge[0],
            "base_tokens": b.num_tokens,
            "aligned_tokens": a.num_tokens,
            "kl_to_base": nats,
            **_shadow_scores(b, a),
        }
        for b, a, base_judge, aligned_judge, nats in zip(
            base.first(), aligned.first(), base.judged, aligned.judged, divergences, strict=True
        )
    ]


def _shadow_scores(base: ScoredRollout, aligned: ScoredRollout) -> dict[str, Any]:
    """What each shadow gave two responses to a prompt, where there are any."""
    if not base.shadow_rewards:
        return {}
    return {"base_shadows": dict(base.shadow_rewards), "aligned_shadows": dict(aligned.shadow_rewards)}


def _shadows(base: Sequence[ScoredRollout], aligned: Sequence[ScoredRollout]) -> dict[str, Any]:
    """What each shadow says of the first responses: `shadows` of the evaluation, where there are any."""
    found = {}
    for name in aligned[0].shadow_rewards:
        before, after = ([r.shadow_rewards[name] for r in side] for side in (base, aligned))
        gain, rate = statistics.mean_difference(after, before), statistics.win_rate(after, before)
        found[name] = {
            "base": sum(before) / len(before),
            "aligned": sum(after) / len(after),
            "gain": gain.value,
            "gain_ci95": list(gain.ci95),
            "win_rate": rate.value,
            "win_rate_ci95": list(rate.ci95),
        }
    return {"shadows": found} if found else {}


def _rewards(rollouts: Sequence[ScoredRollout]) -> list[float]:
    return [r.reward for r in rollouts]


def _side(rollouts: Sequence[ScoredRollout], rewards: Sequence[float], judged: Sequence[float]) -> dict[str, Any]:
    texts = [r.response for r in rollouts]
    return {
        "reward_mean": sum(rewards) / len(rewards),
        "reward_mean_ci95": list(statistics.paired_bootstrap(rewards)),
        "judge_mean": sum(judged) / len(judged),
        "judge_mean_ci95": list(statistics.paired_bootstrap(judged)),
        "response_length_mean": sum(r.num_tokens for r in rollouts) / len(rollouts),
        "distinct_2": statistics.distinct_n(texts, 2),
        "self_bleu": self_bleu(texts),
        "repetition_4": repetition(texts, 4),
        "truncated_fraction": truncated_fraction(rollouts),
        "refusal_fraction": refusal_fraction(texts),
    }
