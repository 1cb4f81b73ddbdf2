"""Runs on the cluster of tests/slurm_rig.py, and the fixtures that their tests share."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.run_folder import RunFolder
from flow_runs import Finished, Place, wait_for
from interruptions import steps
from slurm_rig import GPUS, Slurm, slurm

ON_SLURM = {
    "slurm__enabled": "true",
    "slurm__partition": "gpu",
    "slurm__extra_args": json.dumps([f"--gres=gpu:{GPUS}"]),
    "resources__memory": 1500,
}
"""Each step takes a whole node, of whose GPUs, which are stand-ins, it uses none."""
LONG = {
    "loop__max_steps": 20,
    "loop__steps_per_iteration": 20,
    "loop__save_interval": 20,
    "loop__val_check_interval": 20,
}
"""One iteration that lasts; a checkpoint within it is one that was saved because the task was to end."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    with slurm(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_reward_model(tmp_path_factory: pytest.TempPathFactory, cluster: Slurm) -> tuple[Path, str]:
    """The smoke preset's reward model, trained on the cluster once for all runs: its repository, the run's lines."""
    place = Place(tmp_path_factory.mktemp("exports"))
    done = place.execute(place.command("reward_model_flow", "run", **ON_SLURM), **cluster.environment)
    assert done.status == 0, done.output
    return place.root / "triton_repo", done.output


@pytest.fixture(scope="session")
def slurm_exports(slurm_reward_model: tuple[Path, str]) -> Path:
    return slurm_reward_model[0]


@pytest.fixture(scope="session")
def slurm_undisturbed(tmp_path_factory: pytest.TempPathFactory, slurm_exports: Path) -> Finished:
    """The long run on this machine, without a cluster."""
    place = Place(tmp_path_factory.mktemp("undisturbed"))
    command = place.command("rs_flow", "run", reward__repository=slurm_exports, **LONG)
    return trained(place, started(place, command))


def started(place: Place, command: list[str], **extra: str) -> subprocess.Popen[str]:
    """A command in a session of its own, whose lines go to a file (see `output_of`)."""
    with open(place.path / "output", "w") as output:
        return subprocess.Popen(
            command, cwd=place.path, env=place.environment(**extra), text=True, stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def begun(place: Place, cluster: Slurm, exports: Path, **settings: object) -> subprocess.Popen[str]:
    """A long run on the cluster, begun, with its second RS step behind it."""
    command = place.command("rs_flow", "run", reward__repository=exports, **{**ON_SLURM, **LONG, **settings})
    process = started(place, command, **cluster.environment)
    more_steps(place, process, 2)
    return process


def more_steps(place: Place, process: subprocess.Popen[str], number: int) -> None:
    """Wait until that many RS steps are done."""

    def are_done() -> bool:
        assert process.poll() is None, output_of(place)
        return steps_of(place) >= number

    wait_for(are_done, 240, f"RS step {number}")


def trained(place: Place, process: subprocess.Popen[str]) -> Finished:
    """Wait until a run has all its RS steps, and end it there: what it makes of its evaluation, other tests look at."""

    def is_trained() -> bool:
        assert process.poll() is None, output_of(place)
        return "/evaluate/" in output_of(place)

    wait_for(is_trained, 400, "the evaluation")
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    return Finished(0, output_of(place), place.latest())


def output_of(place: Place) -> str:
    return (place.path / "output").read_text()


def steps_of(place: Place) -> int:
    """RS steps of the newest run."""
    return len(steps(RunFolder(place.latest()))) if (place.root / "latest").exists() else 0


def saved_step(place: Place) -> int:
    """The RS step of the newest checkpoint; 0 without any."""
    done = [int(p.parent.name[5:]) for p in place.latest().glob("checkpoints/step-*/DONE")]
    return max(done, default=0)


def job_ids(place: Place, step: str = "iterate") -> list[str]:
    """Ids of the jobs that the attempts of a step of the newest run had, in order."""
    script = (
        "import sys; from metaflow import Flow, namespace; namespace(None); run = Flow('RSFlow').latest_run\n"
        "for task in run[sys.argv[1]]:\n"
        "    print(*[m.value for m in sorted(task.metadata, key=lambda m: m.created_at) if m.name == 'slurm_job_id'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, step], cwd=place.path, env=place.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
