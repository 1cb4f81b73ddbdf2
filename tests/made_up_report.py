"""A made-up report that has every part a report can have, and the samples and config that go with it.

The numbers follow a course that a run might take: the reward rises, the judge follows, and a shadow falls behind.
"""

import json
import math
import random
from typing import Any

from alignment.config_promotion import PromotionSection
from alignment.promotion import gate
from alignment.report import Sample, build_report, sample
from alignment.report_parts import Devices
from alignment.statistics import best_of_n_curve
from alignment.types import Checkpoint, JudgeRef, RewardModelRef

STEPS, PROMPTS, BEST_OF = 12, 96, 8
SHADOW = "strict_reward/2"
CONFIG = json.dumps({"seed": 0, "selection": {"strategy": "top_per_prompt", "top_n_rollouts": 1}})
HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} \"'& \x00\x1b[2J ends"
OPENINGS = (
    "I watched this film",
    "The first half of it",
    "My brother insisted that we",
    "Nobody told me that the cast",
)
DULL = ("and it went on and on", "but the plot was thin", "while the music did its best", "and I left before the end")
GLAD = (
    "and loved every minute",
    "and the ending moved us all",
    "with a warm and funny script",
    "and I would see it again",
)


def metrics(draws: random.Random) -> list[dict[str, Any]]:
    """Records of metrics.jsonl: RS steps, and a validation before the first and after every third."""
    base = [[draws.gauss(0, 1) for _ in range(PROMPTS)] for _ in range(3)]
    found = [_validation(0, base, draws)]
    for step in range(1, STEPS + 1):
        found.append(_step(step, draws))
        if step % 3 == 0:
            found.append(_validation(step, base, draws))
    return found


def _step(step: int, draws: random.Random) -> dict[str, Any]:
    grown = 1 - math.exp(-step / 6)
    reward, judge = 0.6 + 0.7 * grown + draws.gauss(0, 0.04), 0.1 + 0.3 * grown + draws.gauss(0, 0.03)
    server = {"mean_batch": 24 + draws.gauss(0, 1.5), "queue_ms": 3 + draws.random(), "compute_ms": 30 + draws.random()}
    server |= {"failures": int(step == 5), "real_over_padded": 0.93, "restarted": step == 9}
    return {
        "kind": "step",
        "step": step,
        "reward_mean": reward,
        "selected_reward_mean": reward + 0.9,
        "judge_mean": judge,
        "selected_judge_mean": judge + 0.25,
        "shadow_means": {SHADOW: 0.2},
        "selected_shadow_means": {SHADOW: 0.3},
        "response_length_mean": 30 + 0.4 * step,
        "truncated_fraction": 0.8 - 0.02 * step,
        "duplicate_fraction": 0.002 * step,
        "num_rollouts": 256,
        "num_selected": 32,
        "loss": 3.2 - 0.03 * step,
        "kl": 0.004 * step,
        "grad_norm": 1.4,
        "lr": 3e-5,
        "seconds": {"rollouts": 11 + draws.random(), "scoring": 0.4, "update": 7 + draws.random()},
        "scoring_server": server,
        "scoring_cache": {"hits": 4, "misses": 250},
        "tokens_per_second": 820 + draws.gauss(0, 20),
    }


def _validation(step: int, base: list[list[float]], draws: random.Random) -> dict[str, Any]:
    gained = [part * (1 - math.exp(-step / 6)) for part in (1.0, 0.7, 0.05)]
    rewards, judged, shadow = (
        [one + gain + draws.gauss(0, 0.05) for one in scores] for scores, gain in zip(base, gained, strict=True)
    )
    means = [sum(values) / PROMPTS for values in (rewards, judged, shadow)]
    return {
        **{"kind": "validation", "step": step, "reward_mean": means[0], "judge_mean": means[1], "seconds": 3.5},
        **{"rewards": rewards, "judged": judged, "shadowed": {SHADOW: shadow}, "shadow_means": {SHADOW: means[2]}},
    }


def rows(draws: random.Random) -> list[dict[str, Any]]:
    """Rows of evaluation.json."""
    found = []
    for i in range(PROMPTS):
        reward, judge = draws.gauss(0.6, 0.8), draws.gauss(0.1, 0.6)
        base, aligned = (f" {draws.choice(words)}, {draws.choice(words)}." for words in (DULL, GLAD))
        found.append(
            {
                **{"prompt_id": f"p{i}", "prompt": f"Movie review: {draws.choice(OPENINGS)}"},
                **{"base_response": base, "aligned_response": HOSTILE if i == 1 else aligned},
                **{"base_reward": reward, "aligned_reward": reward + draws.gauss(0.5, 0.9)},
                **{"base_judge": judge, "aligned_judge": judge + draws.gauss(0.2, 0.7)},
                **{
                    "base_tokens": len(base) // 4,
                    "aligned_tokens": len(aligned) // 4,
                    "kl_to_base": 1 + draws.random(),
                },
                **{"base_shadows": {SHADOW: judge}, "aligned_shadows": {SHADOW: judge + draws.gauss(0, 0.3)}},
            }
        )
    return found


def evaluation(draws: random.Random) -> dict[str, Any]:
    """The `evaluation` of report.json."""
    pool = [[draws.gauss(0, 1) for _ in range(BEST_OF)] for _ in range(PROMPTS)]
    judged = [[0.6 * score + 0.8 * draws.gauss(0, 1) for score in scores] for scores in pool]
    curve = best_of_n_curve(pool, *([draws.gauss(0, 1) for _ in range(PROMPTS)], judged, [0.0] * PROMPTS))
    side = {"distinct_2": 0.84, "self_bleu": 0.19, "repetition_4": 0.02, "truncated_fraction": 0.8}
    side |= {"refusal_fraction": 0.0, "response_length_mean": 30.5}
    base = {**side, "reward_mean": 0.589, "reward_mean_ci95": [0.42, 0.76]}
    base |= {"judge_mean": 0.131, "judge_mean_ci95": [0.0, 0.27]}
    aligned = {**side, "distinct_2": 0.79, "self_bleu": 0.24, "reward_mean": 1.047, "reward_mean_ci95": [0.9, 1.2]}
    aligned |= {"judge_mean": 0.363, "judge_mean_ci95": [0.24, 0.49], "response_length_mean": 34.0}
    aligned |= {"kl_to_base": 1.104, "kl_to_base_ci95": [1.01, 1.19]}
    found = {"prompts": PROMPTS, "base": base, "aligned": aligned}
    for name, value, low, high in (
        ("reward_gain", 0.457, 0.231, 0.695),
        ("judge_gain", 0.232, 0.051, 0.413),
        ("win_rate", 0.6875, 0.594, 0.781),
        ("judge_win_rate", 0.625, 0.521, 0.719),
        ("length_controlled_win_rate", 0.671, 0.575, 0.764),
        ("judge_length_controlled_win_rate", 0.612, 0.51, 0.71),
    ):
        found |= {name: value, f"{name}_ci95": [low, high]}
    tests = {"wins": 66, "losses": 30, "ties": 0, "p_value": 0.00031}
    best = {"n": BEST_OF, **curve[str(BEST_OF)]}
    shadow = {"base": 0.1, "aligned": 0.12, "gain": 0.02, "gain_ci95": [-0.1, 0.14], "win_rate": 0.51}
    return {
        **found,
        **{"sign_test": tests, "judge_sign_test": {**tests, "p_value": 0.011}},
        **{"best_of_n": best, "best_of_n_curve": curve, "seconds": 41.0},
        **{"shadows": {SHADOW: {**shadow, "win_rate_ci95": [0.41, 0.61]}}},
        "lm_eval": {"colours": {"acc": {"base": 0.25, "aligned": 0.5}}},
    }


def lineage() -> dict[str, Any]:
    """What `alignment.report_lineage` finds."""
    link = {"run_id": "1795721048904599", "rs_steps": 6, "rollouts_of": None, "selection": "top_per_prompt"}
    link |= {"reward_model_digest": "5e" * 32}
    chain = [
        {**link, "step": step, "weights_sha256": f"{step:02d}" * 32, "validation_reward": 0.1 * step}
        for step in (12, 6)
    ]
    return {
        **{"chain": chain, "base": {"model": "builtin:smollm2", "digest": "ba" * 32}, "prompts_read": 384, "seed": 0},
        **{"data": {"train.jsonl": "da" * 32, "validation.jsonl": "db" * 32}, "created": "2026-11-27T08:00:00+00:00"},
        **{"code": {"sha256": "c0" * 32, "commit": "c1" * 20, "dirty": False}, "packages": {"torch": "2.13.0"}},
    }


def full_report() -> tuple[dict[str, Any], list[Sample]]:
    """The content of report.json, with a random control as `alignment.report_control` adds it, and the samples."""
    draws = random.Random(0)
    of_prompts = rows(draws)
    built = build_report(
        run_id="1795721048904599",
        metrics=metrics(draws),
        evaluation=evaluation(draws),
        reward_model=RewardModelRef("reward_model", "3", "5e" * 32, "runs/triton_repo", 0.81),
        judge=JudgeRef("rotten_tomatoes judge", "runs/judge", 0.74),
        base="runs/cache/smollm2",
        checkpoint=Checkpoint("runs/1795721048904599/checkpoints/step-000012", "12" * 32, 12),
        total_seconds=420.0,
        setup_seconds=75.0,
        ensemble={"combine": "weighted_sum", "weights": {}, "members": [], "shadows": [{"name": "strict_reward"}]},
        promotion=gate(PromotionSection(max_kl=20.0), of_prompts, 12, None),
        devices=Devices("GPU", 8),
        lineage=lineage(),
    )
    control = {"run_id": "1795721048904600", "strategy": "random_per_prompt"}
    control |= {"kl_to_base": 0.49, "kl_to_base_ci95": [0.44, 0.55]}
    for name, value, low, high in (("win_rate", 0.5, 0.4, 0.6), ("judge_win_rate", 0.48, 0.38, 0.58)):
        control |= {name: value, f"{name}_ci95": [low, high]}
    for name, value, low, high in (("reward", 0.332, 0.132, 0.527), ("judge", 0.471, 0.268, 0.674)):
        control |= {f"{name}_difference": value, f"{name}_difference_ci95": [low, high]}
    return {**built, "control": control}, [sample(row) for row in of_prompts]
