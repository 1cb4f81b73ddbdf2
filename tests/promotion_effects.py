"""What the gate and the rollback do under a config, on made-up rows and records; see config_effects.py."""

import contextlib
import io
import itertools
from pathlib import Path
from typing import Any
from unittest.mock import patch

from alignment import evaluation_stage, promotion, rollback, stages
from alignment.config import Config
from alignment.types import Checkpoint
from models import registry

_numbers = itertools.count(1)
SCORES = [0.0, 2.0] * 4
"""Scores of the base; their standard deviation is 1."""


def rows(**changes: Any) -> list[dict[str, Any]]:
    """Rows of evaluation.json: every prompt has gained 0.25 of reward and lost half a standard deviation of judge."""
    return [
        {
            "base_response": f"{i} a {i} b",
            "aligned_response": "a b c" if i % 2 else f"{i} a {i} b",
            "base_reward": score,
            "aligned_reward": score + 0.25,
            "base_judge": score,
            "aligned_judge": score - 0.5,
            "base_tokens": 10,
            "aligned_tokens": 12,
            "kl_to_base": 0.5,
            **changes,
        }
        for i, score in enumerate(SCORES)
    ]


def gate(config: Config) -> dict[str, Any]:
    return promotion.gate(config.promotion, rows(), 2, None)


def passed(name: str) -> Any:
    """Whether a rule passes; None where it is left out."""
    return lambda config: next(rule["passed"] for rule in gate(config)["rules"] if rule["name"] == name)


def validation(step: int, shift: float) -> dict[str, Any]:
    rewards = [score + shift for score in SCORES]
    return {"kind": "validation", "step": step, "reward_mean": 1.0 + shift, "rewards": rewards}


def failing_step(config: Config) -> int | None:
    """The RS step that fails badly: the second one's validation lies 1.5 standard deviations below the base's."""
    metrics = [validation(0, 0.0), {"kind": "step", "step": 1, "kl": 0.3}, validation(2, -1.5)]
    found = rollback.first_failure(config.promotion, metrics)
    return found and found["step"]


def aliases(config: Config) -> dict[str, int]:
    """The aliases of the policy of a run whose gate passed; the evaluation is a stand-in."""
    root = str(Path(config.run.root) / f"promoting-{next(_numbers)}")
    run = config.model_copy(update={"run": config.run.model_copy(update={"root": root})})
    reward = {"name": "reward_model", "version": "1", "digest": "", "repository": "", "accuracy": None}
    judge = {"name": "", "uri": "", "accuracy": 1.0}
    report = {"run_id": "7", "promotion": gate(config)}

    def evaluate_stand_in(*_: Any) -> Any:
        return report, Checkpoint("/models/1", "1" * 64, 1)

    with patch.object(evaluation_stage, "evaluate", evaluate_stand_in), contextlib.redirect_stdout(io.StringIO()):
        stages.run_evaluation(run, f"{root}/7", reward, judge, 0.0)
    return registry.aliases(root, "policy")
