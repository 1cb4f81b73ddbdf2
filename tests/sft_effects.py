"""What supervised fine-tuning does under a config, seen from outside; a config that has been run is not run again."""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sft_runs
from alignment.config import Config, parse_config
from alignment.fitting import WEIGHTS
from alignment.sft_training import build_trainer, step_examples
from alignment.sft_worker import trainable_policy

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Run:
    """What one run left behind."""

    folder: Path
    trainers: list[Any]
    summaries: list[dict[str, Any]]
    events: list[dict[str, Any]]


def run(config: Config) -> Run:
    return _run(config.model_dump_json())


@functools.cache
def _run(text: str) -> Run:
    trainers = []

    def build_stand_in(*arguments: Any, **others: Any) -> Any:
        trainers.append(build_trainer(*arguments, **others))
        return trainers[0]

    folder, summaries = sft_runs.begun(parse_config(text), f"sft-{next(_numbers)}")
    with patch("alignment.sft_training.build_trainer", build_stand_in):
        return Run(folder, trainers, summaries, sft_runs.work(folder))


def told(role: str, key: str) -> Any:
    """What is said of the sets of a role."""
    return lambda config: [s[key] for s in run(config).summaries if s["role"] == role]


def first_example(config: Config) -> bytes:
    """Text of the example that is read first."""
    _, tokenizer = trainable_policy(config)
    return tokenizer.decode(step_examples(run(config).trainers[0], 1)[0].ids).encode()


def steps(config: Config) -> int:
    return run(config).trainers[0].total_steps


def packed(config: Config) -> bool:
    return run(config).trainers[0].engine.module.packed


def keeps_layer_inputs_only(config: Config) -> bool:
    return run(config).trainers[0].engine.module.policy.is_gradient_checkpointing


def rates(config: Config) -> list[float]:
    return [round(e["lr"], 6) for e in run(config).events if e["kind"] == "sft_step"]


def validations(config: Config) -> list[int]:
    return [e["step"] for e in run(config).events if e["kind"] == "sft_validation"]


def checkpoints(config: Config) -> list[str]:
    return sorted(path.name for path in (run(config).folder / "checkpoints").glob("step-*"))


def weights(config: Config) -> bytes:
    """The last checkpoint's."""
    return (run(config).folder / "checkpoints" / checkpoints(config)[-1] / WEIGHTS).read_bytes()


def engine(method: str) -> Any:
    """What DeepSpeed's engine says of itself."""
    return lambda config: getattr(run(config).trainers[0].engine, method)()


def trained_weights(config: Config) -> int:
    """How many weights of the policy are trained."""
    model, _ = trainable_policy(config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapter_scale(config: Config) -> list[float]:
    model, _ = trainable_policy(config)
    scales = [m.scaling for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    return sorted({scale for by_adapter in scales for scale in by_adapter.values()})
