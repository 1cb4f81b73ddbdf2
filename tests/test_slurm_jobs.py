"""`@srun` on a real Slurm: what a step gets, whole runs, and what becomes of a run whose job or owner ends."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flow_runs import ROOT, Finished, Place, resuming, wait_for
from slurm_fixtures import (
    LONG,
    ON_SLURM,
    begun,
    job_ids,
    more_steps,
    output_of,
    saved_step,
    started,
    steps_of,
    trained,
)
from slurm_rig import GPUS, Slurm, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(why_not()), reason=why_not() or "it is installed")]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def small(place: Place, cluster: Slurm, what: str) -> subprocess.Popen[str]:
    """The small flow, begun."""
    command = [sys.executable, str(ROOT / "tests" / "slurm_small_flow.py"), "--no-pylint", "run", "--what", what]
    return place.begin(command, **cluster.environment)


def small_seen(place: Place, cluster: Slurm, what: str) -> tuple[list[dict[str, str]], list[int], str]:
    """What the small flow's tasks saw, at which attempt, and all of its lines."""
    process = small(place, cluster, what)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    found = json.loads(re.search(r"seen (\{.*\})", output)[1])
    return found["seen"], found["attempts"], output


def test_resources_become_gres_and_tasks_spread_over_nodes(place: Place, cluster: Slurm) -> None:
    seen, attempts, output = small_seen(place, cluster, "look")
    assert sorted(one["SLURMD_NODENAME"] for one in seen) == list(cluster.nodes)
    assert {one["CUDA_VISIBLE_DEVICES"] for one in seen} == {",".join(map(str, range(GPUS)))}
    assert {one["SLURM_CPUS_PER_TASK"] for one in seen} == {"2"}
    assert attempts == [0, 0, 0] and output.count("has begun") == 3
    assert cluster.queue() == []


def test_a_task_that_fails_is_repeated_in_another_job(place: Place, cluster: Slurm) -> None:
    _, attempts, output = small_seen(place, cluster, "fail")
    assert attempts == [1, 1, 1]
    assert len(set(re.findall(r"Granted job allocation (\d+)", output))) == 6


def test_within_an_allocation_tasks_are_its_steps(place: Place, cluster: Slurm) -> None:
    flow = [sys.executable, str(ROOT / "tests" / "slurm_small_flow.py"), "--no-pylint", "run"]
    held = ["salloc", "--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=2", f"--gres=gpu:{GPUS}"]
    done = place.execute([*held, *flow], **cluster.environment)
    assert done.status == 0, done.output
    seen = json.loads(re.search(r"seen (\{.*\})", done.output)[1])["seen"]
    assert len({one["SLURM_JOB_ID"] for one in seen}) == 1
    assert sorted(one["SLURMD_NODENAME"] for one in seen) == list(cluster.nodes)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_jobs_that_wait_for_nodes_go_with_their_flow(place: Place, cluster: Slurm, how: signal.Signals) -> None:
    blocker = subprocess.Popen(
        ["srun", "--nodes=3", "--exclusive", "sleep", "600"], env={**os.environ, **cluster.environment}
    )
    wait_for(lambda: "R" in cluster.queue("%t"), 60, "the job in the way")
    process = small(place, cluster, "look")
    wait_for(lambda: cluster.queue("%t").count("PD") == 3, 120, "three jobs that wait")
    os.killpg(process.pid, how) if how == signal.SIGINT else process.send_signal(how)
    process.wait(60)
    wait_for(lambda: len(cluster.queue()) == 1, 60, "a queue without them")
    cluster.ask("scancel", "--user", "root")
    blocker.wait(60)
    wait_for(lambda: cluster.queue() == [], 60, "an empty queue")


def test_a_run_on_the_cluster_is_the_run_without_one(
    place: Place, cluster: Slurm, slurm_undisturbed: Finished, slurm_exports: Path
):
    done = place.execute(
        place.command("rs_flow", "run", reward__repository=slurm_exports, **ON_SLURM, **LONG), **cluster.environment
    )
    assert done.digest == slurm_undisturbed.digest
    assert (done.folder / "report.json").exists()
    jobs = [job_ids(place, step) for step in ("reward_model", "iterate", "evaluate")]
    assert [len(ids) for ids in jobs] == [1, 1, 1] and job_ids(place, "start") == []
    assert "continuing" not in done.output and cluster.queue() == []


def test_the_reward_model_is_trained_on_the_cluster_too(slurm_reward_model: tuple[Path, str]) -> None:
    repository, output = slurm_reward_model
    assert (repository / "reward_model" / "1").is_dir()
    assert len(re.findall(r"Granted job allocation", output)) == 1


def test_phases_of_the_disaggregated_executor_are_jobs(place: Place, cluster: Slurm, slurm_exports: Path) -> None:
    settings = {
        "loop__executor": "disaggregated", "loop__steps_per_iteration": 1, "loop__max_steps": 1, "phases__shards": 2,
        "reward__repository": slurm_exports,
    }  # fmt: skip
    process = started(place, place.command("rs_flow", "run", **ON_SLURM, **settings), **cluster.environment)
    trained(place, process)
    assert steps_of(place) == 1
    wait_for(lambda: cluster.queue() == [], 60, "an empty queue")
    names = set(re.findall(r"JobName?=RSIterationFlow-\d+-(\w+?)-", finished_jobs(cluster)))
    assert {"rollouts", "scoring", "update", "validation"} <= names
    assert job_ids(place) == []  # the step that loops watches them from where the flow runs


def finished_jobs(cluster: Slurm) -> str:
    return re.sub(r"\bName=", "JobName=", (cluster.folder / "finished-jobs.log").read_text())


def test_a_run_whose_flow_ends_is_saved_leaves_no_job_and_is_resumed(
    place: Place, cluster: Slurm, slurm_exports: Path, slurm_undisturbed
) -> None:
    process = begun(place, cluster, slurm_exports)
    for how in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        os.killpg(process.pid, how) if how == signal.SIGINT else process.send_signal(how)
        process.wait(60)
        wait_for(lambda: cluster.queue() == [], 120, "an empty queue")
        saved = saved_step(place)
        assert 20 > saved == steps_of(place) >= 2, how
        process = started(place, resuming("rs_flow"), **cluster.environment)
        more_steps(place, process, min(20, saved + 2))
        assert f"continuing after RS step {saved}" in output_of(place)
    assert trained(place, process).digest == slurm_undisturbed.digest


def test_a_lost_node_is_made_up_for_by_another(
    place: Place, cluster: Slurm, slurm_exports: Path, slurm_undisturbed
) -> None:
    process = begun(place, cluster, slurm_exports, loop__save_interval=1)
    [node] = cluster.queue("%N")
    cluster.lose(node)
    try:
        assert trained(place, process).digest == slurm_undisturbed.digest
    finally:
        cluster.bring_back(node)
    assert len(job_ids(place)) == 2 and "continuing after RS step" in output_of(place)


def test_a_preempted_job_saves_and_goes_on_in_another(
    place: Place, cluster: Slurm, slurm_exports: Path, slurm_undisturbed
) -> None:
    process = begun(place, cluster, slurm_exports)
    [node] = cluster.queue("%N")
    words = ["srun", "--partition=urgent", f"--nodelist={node}", f"--gres=gpu:{GPUS}", "sleep", "5"]
    urgent = subprocess.run(words, env={**os.environ, **cluster.environment}, timeout=200)
    assert urgent.returncode == 0
    assert trained(place, process).digest == slurm_undisturbed.digest
    [step] = re.findall(r"continuing after RS step (\d+)", output_of(place))
    assert len(job_ids(place)) == 2 and int(step) >= 2


def test_before_its_time_limit_a_job_saves_and_goes_on_in_another(
    place, cluster, slurm_exports, slurm_undisturbed
) -> None:
    """The limit is moved nearer once the job has work behind it."""
    settings = {"slurm__time": "00:00:09:00", "loop__stop_grace_s": 5}
    process = begun(place, cluster, slurm_exports, **settings, loop__max_steps=5000, loop__steps_per_iteration=5000)
    [job] = cluster.queue()
    assert cluster.job(job)["TimeLimit"] == "00:09:00"
    cluster.ask("scontrol", "update", f"jobid={job}", "endtime=now+60")
    wait_for(lambda: "continuing after RS step" in output_of(place), 400, "another job")
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    wait_for(lambda: cluster.queue() == [], 120, "an empty queue")
    [step] = re.findall(r"continuing after RS step (\d+)", output_of(place))
    first, second = job_ids(place)
    assert int(step) >= 2 and first != second
    assert cluster.job(first)["JobState"] != "TIMEOUT"


def test_an_error_that_would_come_again_is_not_repeated(place: Place, cluster: Slurm, slurm_exports: Path) -> None:
    gone = {"reward__repository": place.path / "none", "reward__version": 7}
    done = place.execute(place.command("rs_flow", "run", **ON_SLURM, **gone), **cluster.environment)
    assert done.status != 0 and "will not be retried" in done.output
    assert len(re.findall(r"Granted job allocation", done.output)) == 1
