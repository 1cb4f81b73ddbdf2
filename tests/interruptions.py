"""Runs of the smoke preset without Metaflow around them: real workers, a real Triton server, one call an iteration."""

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment import colocated
from alignment.config import Config, load_config
from alignment.reward_server import reward_server
from alignment.run_folder import RunFolder
from alignment.scoring import RewardClient
from alignment.stages import begin, prepare_scorers
from alignment.task import START_S
from alignment.types import Checkpoint, JudgeRef, RewardModelRef
from flow_runs import SMOKE

# Steps of about half a second, so that a signal finds one under way long before the last.
SETTINGS = (
    *("rollouts.num_rollout_samples=8", "rollouts.max_new_tokens=160", "training.global_batch_size=8"),
    *("loop.max_steps=6", "loop.steps_per_iteration=6", "loop.save_interval=2", "loop.val_check_interval=3"),
    *("loop.keep_last=3", "wandb.mode=disabled"),
)


@dataclass(frozen=True)
class Bench:
    """A root of runs whose reward model is served at `url` by a server of the tests."""

    root: Path
    url: str

    def config(self, *overrides: str) -> Config:
        return load_config(SMOKE, [f"run.root={self.root}", f"reward.url={self.url}", *SETTINGS, *overrides])

    def begin(self, name: str, *overrides: str) -> tuple[Config, RunFolder]:
        """A new run with its prompts and scorers."""
        config = self.config(*overrides)
        with contextlib.redirect_stdout(io.StringIO()):
            run = RunFolder(Path(begin(config, name)[0]))
            prepare_scorers(config, str(run.path))
        return config, run


def iterate(config: Config, run: RunFolder) -> Checkpoint:
    """What the flow's `iterate` does in its task."""
    scorers = json.loads(run.scorers.read_text())
    return colocated.iterate(config, run, RewardModelRef(**scorers["reward_model"]), JudgeRef(**scorers["judge"]))


@contextlib.contextmanager
def served_bench(root: Path, *overrides: str) -> Iterator[Bench]:
    """The smoke preset's reward model, trained and served for as long as the context lasts."""
    with contextlib.redirect_stdout(io.StringIO()):
        config = load_config(SMOKE, [f"run.root={root}", "wandb.mode=disabled", *overrides])
        reference, _ = prepare_scorers(config, begin(config, "exporting")[0])
    with reward_server(
        repository=Path(reference["repository"]),
        name=reference["name"],
        version=reference["version"],
        url=None,
        grpc_port=0,
        log=root / "triton.log",
        threads=1,
    ) as server:
        wait_until_served(server.url)
        yield Bench(root, server.url)


def wait_until_served(url: str) -> None:
    """Until the reward model at `url` answers: a server that is named by its URL is expected to be there."""
    with RewardClient(url) as client:
        client.wait_ready(START_S)


def steps(run: RunFolder, kind: str = "step") -> list[dict[str, Any]]:
    """The records of metrics.jsonl of a kind."""
    return [record for record in run.read_metrics() if record["kind"] == kind]


def consumed(run: RunFolder) -> list[list[str]]:
    """The prompts of each RS step, in the order read."""
    assert [record["step"] for record in steps(run)] == list(range(1, len(steps(run)) + 1))
    return [record["prompt_ids"] for record in steps(run)]


def decisions(run: RunFolder, step: int) -> list[tuple[Any, ...]]:
    """Every response of an RS step with its decision; the reason holds the reward as it was compared."""
    keys = ("prompt_id", "rollout_index", "response", "selected", "reason")
    return [tuple(row[key] for key in keys) for row in run.read_rollouts(step)]


def copy_up_to(run: RunFolder, name: str, step: int) -> RunFolder:
    """A copy of a run's folder that has lost all checkpoints after RS step `step`."""
    copy = RunFolder(run.path.with_name(name))
    shutil.copytree(run.path, copy.path)
    for folder in copy.checkpoints.glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return copy


def main() -> None:
    """`python interruptions.py RUN OVERRIDE…`: one iteration of a run, as an owner that a test can kill."""
    run = RunFolder(Path(sys.argv[1]))
    iterate(load_config(SMOKE, sys.argv[2:]), run)


if __name__ == "__main__":
    main()
