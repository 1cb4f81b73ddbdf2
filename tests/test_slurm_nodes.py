"""Iterations on two nodes, and the heterogeneous job, on a real Slurm."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.reward_server import reward_server
from alignment.run_folder import RunFolder
from flow_runs import ROOT, Finished, Place, wait_for
from interruptions import decisions, steps, wait_until_served
from slurm_fixtures import LONG, ON_SLURM, job_ids, output_of, saved_step, started, steps_of, trained
from slurm_rig import GPUS, Slurm, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(why_not()), reason=why_not() or "it is installed")]

SHORT = {"loop__max_steps": 8, "loop__steps_per_iteration": 8, "loop__val_check_interval": 8}
COMPONENT = ["--cpus-per-task=2", "--mem=4000"]
"""What the tests' nodes have, in the place of what the script asks for."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def served_url(tmp_path_factory: pytest.TempPathFactory, slurm_exports: Path):
    """Of the reward model, served outside the cluster on the address that all of its nodes share."""
    with reward_server(
        repository=slurm_exports, name="reward_model", version="1", url=None, grpc_port=0,
        log=tmp_path_factory.mktemp("server") / "triton.log", threads=1,
    ) as server:  # fmt: skip
        wait_until_served(server.url)
        yield server.url


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, served_url: str) -> Finished:
    """The short run by two workers of this machine, without a cluster."""
    place = Place(tmp_path_factory.mktemp("two-ranks"))
    command = place.command("rs_flow", "run", reward__url=served_url, resources__cpu_workers=2, **SHORT)
    return trained(place, started(place, command))


def same_decisions(one: Finished, other: Finished) -> bool:
    """Whether both runs sampled, scored and kept the same, in each RS step."""
    first, second = RunFolder(one.folder), RunFolder(other.folder)
    numbers = [record["step"] for record in steps(first)]
    assert numbers == [record["step"] for record in steps(second)] != []
    return all(decisions(first, step) == decisions(second, step) for step in numbers)


def on_two_nodes(place: Place, cluster: Slurm, url: str, **settings: object) -> subprocess.Popen[str]:
    command = place.command("rs_flow", "run", reward__url=url, slurm__nodes=2, **{**ON_SLURM, **SHORT, **settings})
    return started(place, command, **cluster.environment)


def test_workers_of_two_nodes_do_what_two_of_one_node_do(place, cluster: Slurm, served_url: str, two_ranks) -> None:
    done = trained(place, on_two_nodes(place, cluster, served_url))
    assert same_decisions(done, two_ranks)
    losses = [[r["loss"] for r in steps(RunFolder(run.folder))] for run in (done, two_ranks)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    [job] = job_ids(place)
    assert cluster.job(job)["NumNodes"] == "2"
    manifest = max((done.folder / "checkpoints").glob("step-*/optimizer"))
    assert len(list(manifest.iterdir())) == 2


def test_a_lost_node_of_two_is_made_up_for(place: Place, cluster: Slurm, served_url: str, two_ranks) -> None:
    process = on_two_nodes(place, cluster, served_url, loop__save_interval=1)
    wait_for(lambda: (place.root / "latest").exists() and saved_step(place) >= 2, 240, "the second checkpoint")
    _, node = cluster.ask("scontrol", "show", "hostnames", *cluster.queue("%N")).split()
    cluster.lose(node)
    try:
        # Two of the three nodes are left, which is what the job needs.
        assert same_decisions(trained(place, process), two_ranks)
    finally:
        cluster.bring_back(node)
    assert len(job_ids(place)) == 2 and "continuing after RS step" in output_of(place)


def submit(place: Place, cluster: Slurm, repository: Path, nodes: int = 1, **settings: object) -> str:
    """Submit the heterogeneous job of a run in `place`, whose steps have that many nodes; its id."""
    command = place.command("rs_flow", **{"loop__save_interval": 20, "resources__memory": 1500, **settings})
    words = command[command.index("--config") :]
    own = {
        "RS_PYTHON": sys.executable,
        "RS_REPOSITORY": str(repository),
        "RS_FLOW": str(ROOT / "flows" / "rs_flow.py"),
        "RS_STATE": str(place.path),
        "RS_SERVER_S": "240",
        "PYTHONPATH": str(ROOT),
    }
    components = [
        *("--nodes=1", "--gres=gpu:1", *COMPONENT), ":", *(f"--nodes={nodes}", f"--gres=gpu:{GPUS}", *COMPONENT)
    ]  # fmt: skip
    script = str(ROOT / "infra" / "slurm" / "rs_hetjob.sbatch")
    done = subprocess.run(
        ["sbatch", "--parsable", f"--output={place.path}/job.log", *components, script, *words],
        env=place.environment(**cluster.environment, **own), cwd=place.path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def log(place: Place) -> str:
    path = place.path / "job.log"
    return path.read_text() if path.exists() else ""


def ended(cluster: Slurm, job: str, place: Place, timeout_s: float = 500) -> dict[str, str]:
    """What Slurm says of the job at its end."""
    final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_for(lambda: cluster.job(job)["JobState"] in final, timeout_s, f"the end of {job}: {log(place)[-3000:]}")
    wait_for(lambda: cluster.queue() == [], 60, "an empty queue")
    return cluster.job(job)


def trained_by(cluster: Slurm, job: str, place: Place) -> Finished:
    """Wait until the job's run has all its RS steps, and cancel the job there."""
    wait_for(lambda: "/evaluate/" in log(place), 400, f"the evaluation: {log(place)[-3000:]}")
    cluster.ask("scancel", job)
    assert ended(cluster, job, place)["JobState"] == "CANCELLED"
    return Finished(0, log(place), place.latest())


def test_the_heterogeneous_job_runs_to_its_end(place: Place, cluster: Slurm, slurm_exports: Path, slurm_undisturbed):
    job = submit(place, cluster, slurm_exports, **LONG)
    assert ended(cluster, job, place)["ExitCode"] == "0:0", log(place)
    done = Finished(0, log(place), place.latest())
    assert done.digest == slurm_undisturbed.digest
    assert re.search(r"the reward model answers at 127\.0\.0\.1:\d+", log(place))
    assert job_ids(place)  # the steps ran on the second component


def test_its_iterations_run_on_two_nodes(place: Place, cluster: Slurm, slurm_exports: Path, two_ranks) -> None:
    job = submit(place, cluster, slurm_exports, nodes=2, slurm__nodes=2, **SHORT)
    done = trained_by(cluster, job, place)
    assert same_decisions(done, two_ranks)
    shards = max((done.folder / "checkpoints").glob("step-*/optimizer"))
    assert len(list(shards.iterdir())) == 2


def test_its_status_is_the_flows(place: Place, cluster: Slurm, slurm_exports: Path) -> None:
    job = submit(place, cluster, slurm_exports, prompts__train=place.path / "none.jsonl", **LONG)
    assert ended(cluster, job, place)["ExitCode"] == "1:0"
    assert "none.jsonl" in log(place)


def test_told_of_its_time_limit_it_saves_requeues_itself_and_resumes(place, cluster, slurm_exports, slurm_undisturbed):
    job = submit(place, cluster, slurm_exports, **LONG)
    wait_for(lambda: steps_of(place) >= 2, 300, "the second RS step")
    cluster.ask("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@180 sends
    assert ended(cluster, job, place)["ExitCode"] == "0:0", log(place)
    assert "requeued, to resume" in log(place)
    [step] = re.findall(r"continuing after RS step (\d+)", log(place))
    assert int(step) >= 2
    assert Finished(0, "", place.latest()).digest == slurm_undisturbed.digest


def test_preempted_it_is_requeued_and_resumes(place: Place, cluster: Slurm, slurm_exports, slurm_undisturbed) -> None:
    job = submit(place, cluster, slurm_exports, **{**LONG, "loop__save_interval": 1})
    wait_for(lambda: steps_of(place) >= 2, 300, "the second RS step")
    urgent = ["srun", "--partition=urgent", "--nodes=3", f"--gres=gpu:{GPUS}", "sleep", "2"]
    assert subprocess.run(urgent, env={**os.environ, **cluster.environment}, timeout=200).returncode == 0
    done = trained_by(cluster, job, place)
    assert "preemption: the flow is asked to save" in log(place) and "continuing after RS step" in log(place)
    assert done.digest == slurm_undisturbed.digest
