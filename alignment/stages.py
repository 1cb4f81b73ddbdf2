"""What the flow's steps call: plain artifacts in, plain artifacts out, so that any Metaflow client reads them.

Heavy imports stay behind these functions: a flow's `--help` and `show` load none of them.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignment.atomic_files import write_json
from alignment.config import Config
from alignment.run_folder import RunFolder, create
from alignment.task import claim_devices, timed_task
from alignment.types import JudgeRef, RewardModelRef


def begin(config: Config, run_id: str) -> tuple[str, dict[str, int]]:
    """Lay out the run folder and split the prompts; returns its path and the sizes of the prompt sets."""
    from alignment.preparation import prepare

    claim_devices(config)
    run = create(config.run.root, run_id, config.model_dump_json(indent=2))
    with timed_task(run, "start"):
        counts = prepare(config, run.path, print)
    return str(run.path), counts


def prepare_scorers(config: Config, run_path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The reward model, exported, and the judge, saved; returns references to both.

    A run has one of each: they are written to scorers.json and found there by whatever goes on with the run.
    """
    from alignment.reward_stage import prepare_judge, prepare_reward_model

    claim_devices(config)
    run = RunFolder(Path(run_path))
    known = run.path / "scorers.json"
    if not known.exists():
        with timed_task(run, "reward_model"):
            reward = prepare_reward_model(config, print)
            judge = prepare_judge(config, run.path / "judge", print)
        write_json(known, {"reward_model": asdict(reward), "judge": asdict(judge)})
    scorers = json.loads(known.read_text())
    return scorers["reward_model"], scorers["judge"]


def run_iteration(
    config: Config, run_path: str, reward: dict[str, Any], judge: dict[str, Any], iteration: int
) -> dict[str, Any]:
    """RS steps of iteration `iteration` (from 1); returns a reference to its last checkpoint."""
    from alignment.colocated import iterate

    run = RunFolder(Path(run_path))
    return asdict(iterate(config, run, RewardModelRef(**reward), JudgeRef(**judge), iteration))


def run_evaluation(
    config: Config, run_path: str, reward: dict[str, Any], judge: dict[str, Any], started: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate and report; returns the report and a reference to the evaluated checkpoint."""
    from alignment.evaluation_stage import evaluate

    run = RunFolder(Path(run_path))
    report, checkpoint = evaluate(config, run, RewardModelRef(**reward), JudgeRef(**judge), started)
    return report, asdict(checkpoint)
