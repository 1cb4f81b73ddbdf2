"""Runs on the cluster of tests/slurm_rig.py, and the fixtures that their tests share."""

import json
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
    "loop__max_steps": 14,
    "loop__steps_per_iteration": 14,
    "loop__save_interval": 14,
    "loop__val_check_interval": 14,
}
"""One iteration that lasts; a checkpoint within it is one that was saved because the task was to end."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    with slurm(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the smoke preset's reward model, so that runs need not train theirs."""
    place = Place(tmp_path_factory.mktemp("exports"))
    done = place.run("run", flow="reward_model_flow")
    assert done.status == 0, done.output
    return place.root / "triton_repo"


@pytest.fixture(scope="session")
def slurm_undisturbed(tmp_path_factory: pytest.TempPathFactory, slurm_exports: Path) -> Finished:
    """The long run on this machine, without a cluster."""
    return Place(tmp_path_factory.mktemp("undisturbed")).run("run", reward__repository=slurm_exports, **LONG)


def begun(place: Place, cluster: Slurm, exports: Path, **settings: object) -> subprocess.Popen[str]:
    """A long run on the cluster, begun, with its second RS step behind it."""
    command = place.command("rs_flow", "run", reward__repository=exports, **{**ON_SLURM, **LONG, **settings})
    with open(place.path / "output", "w") as output:
        process = subprocess.Popen(
            command, cwd=place.path, env=place.environment(**cluster.environment), text=True, stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip

    def two_steps() -> bool:
        assert process.poll() is None, output_of(place)
        return (place.root / "latest").exists() and len(steps(RunFolder(place.latest()))) >= 2

    wait_for(two_steps, 240, "the second RS step")
    return process


def output_of(place: Place) -> str:
    return (place.path / "output").read_text()


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
