"""The disaggregated executor: whole runs against the colocated one, lost and slow shards, an owner that is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignment import inner_run
from alignment.config import load_config
from alignment.launch import Gang, _launcher, gang_port
from alignment.lifeline import OVERTIME
from alignment.run_folder import RunFolder
from flow_runs import ROOT, SMOKE, Finished, Place, resuming, wait_for
from interruptions import Bench, decisions, served_bench, steps

SETTINGS = {
    "rollouts__num_rollout_samples": 6,
    "training__global_batch_size": 6,
    "loop__steps_per_iteration": 1,
    "loop__max_steps": 2,
    "loop__val_check_interval": 2,
}
DISAGGREGATED = {**SETTINGS, "loop__executor": "disaggregated", "phases__shards": 3}
ONE_STEP = {**DISAGGREGATED, "loop__max_steps": 1}
FLOAT32 = 1e-6
"""Largest difference between weights whose gradients were summed in another order."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A reward model that is served for all runs, so that no task starts a server."""
    with served_bench(tmp_path_factory.mktemp("executors") / "runs") as bench:
        yield bench


@pytest.fixture(scope="module")
def place(bench: Bench):
    return Place(bench.root.parent)


@pytest.fixture(scope="module")
def colocated(place, bench):
    return place.run("run", reward__url=bench.url, **SETTINGS)


@pytest.fixture(scope="module")
def disaggregated(place, bench):
    return place.run("run", reward__url=bench.url, **DISAGGREGATED)


@pytest.fixture(scope="module")
def one_step(place, bench):
    """A run of one RS step in three shards that nothing disturbs: RSIterationFlow by itself."""
    return place.run("run", flow="rs_iteration_flow", reward__url=bench.url, **ONE_STEP)


def same_run(one: Finished, other: Finished, last: int = 1) -> None:
    """The same responses and decisions in every step up to the last, the same records, weights and moments."""
    first, second = RunFolder(one.folder), RunFolder(other.folder)
    for step in range(1, last + 1):
        assert decisions(first, step) == decisions(second, step)
    for kind, values in {"step": ("loss", "reward_mean", "lr"), "validation": ("reward_mean", "judge_mean")}.items():
        ours, theirs = ([{key: r[key] for key in ("step", *values)} for r in steps(f, kind)] for f in (first, second))
        assert [r["step"] for r in ours] == [r["step"] for r in theirs]
        for mine, other_one in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(other_one, abs=1e-5)
    for file in ("model.safetensors", "optimizer/rank-00000.safetensors"):
        ours, theirs = (load_file(f.checkpoints / f"step-{last:06d}" / file) for f in (first, second))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=FLOAT32, rtol=0)


def shards_done(output: str) -> list[tuple[int, int]]:
    """RS step and number of each shard that was sampled, as often as it was."""
    return sorted((int(step), int(shard)) for step, shard in re.findall(r"RS step (\d+), shard (\d+) of", output))


ONCE_EACH = [(1, 1), (1, 2), (1, 3)]


def test_both_executors_do_the_same(colocated, disaggregated):
    """Moments go on from step to step: without them the second step's weights would differ."""
    same_run(colocated, disaggregated, last=2)
    rewards = [run.report["evaluation"]["aligned"]["reward_mean"] for run in (colocated, disaggregated)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-4)
    assert shards_done(disaggregated.output) == [*ONCE_EACH, (2, 1), (2, 2), (2, 3)]
    step = steps(RunFolder(disaggregated.folder))[0]
    assert step["scoring_server"]["failures"] == 0 and "lost_prompts" not in step
    assert not list((disaggregated.folder / "selected").iterdir())


def test_the_inner_runs_are_found_by_their_tags(place, disaggregated):
    script = (
        "from metaflow import Flow, namespace; namespace(None); import sys; "
        "print(*sorted(','.join(sorted(r.user_tags)) for r in Flow('RSIterationFlow').runs(sys.argv[1])))"
    )
    parent = f"parent:{disaggregated.folder.name}"
    out = subprocess.run(
        [sys.executable, "-c", script, parent], cwd=place.path, env=place.environment(),
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert out.split() == [f"iteration:{step},{parent}" for step in (1, 2)]


@pytest.mark.long
@pytest.mark.parametrize("shards", [1, 2])
def test_the_number_of_shards_changes_nothing(place, bench, one_step, shards):
    settings = {**ONE_STEP, "phases__shards": shards, "reward__url": bench.url}
    same_run(one_step, place.run("run", flow="rs_iteration_flow", **settings))


@pytest.mark.long
def test_two_nodes_update_as_two_workers_do(place, bench):
    """The gang's nodes are processes of this machine, which is what Metaflow makes of one here."""
    own = {**ONE_STEP, "reward__url": bench.url, "training__zero_stage": 2}
    two_workers = place.run("run", flow="rs_iteration_flow", **own, resources__cpu_workers=2)
    two_nodes = place.run("run", flow="rs_iteration_flow", **own, phases__update_nodes=2)
    same_run(two_workers, two_nodes)
    for run in (two_workers, two_nodes):
        manifest = json.loads((run.folder / "checkpoints" / "step-000001" / "manifest.json").read_text())
        assert manifest["ranks"] == 2
    assert not place.processes()


@pytest.mark.long
def test_shards_that_are_lost_or_slow_are_repeated_alone(place, bench, one_step):
    """The second shard's process is killed, the third hangs until its time is over."""
    settings = {**ONE_STEP, "reward__url": bench.url, "phases__rollouts__timeout_s": 60}
    hanging = {"PYTHONPATH": str(ROOT / "tests" / "hanging"), "HANGING_SHARD": "2"}
    started = place.begin(place.command("rs_iteration_flow", "run", **settings), **hanging)
    os.kill(shard_task(place, 1), signal.SIGKILL)
    output, _ = started.communicate(timeout=600)
    assert started.returncode == 0, output
    assert "timed out after" in output
    assert shards_done(output) == ONCE_EACH
    assert place.latest() != one_step.folder
    same_run(one_step, Finished(0, output, place.latest()))


@pytest.mark.long
def test_a_step_that_failed_is_resumed_where_it_failed(place, bench, one_step):
    """Shards run one after another here, so that two have ended when the third is lost."""
    cores = len(os.sched_getaffinity(0))
    settings = {**ONE_STEP, "phases__rollouts__retries": 0, "phases__rollouts__cpu": cores}
    started = place.start("run", **settings, reward__url=bench.url)
    os.kill(shard_task(place, 2), signal.SIGKILL)
    output, _ = started.communicate(timeout=600)
    assert started.returncode != 0 and "RS step 1 failed in a run of RSIterationFlow of its own" in output
    assert shards_done(output) == [(1, 1), (1, 2)]
    assert not place.processes()
    resumed = place.resume()
    assert resumed.status == 0, resumed.output
    assert shards_done(resumed.output) == [(1, 3)]
    same_run(one_step, resumed)


@pytest.mark.long
@pytest.mark.parametrize("end", ["kill -9", "SIGTERM", "Ctrl-C"])
def test_a_run_whose_owner_is_killed_leaves_nothing_and_is_resumed(place, bench, one_step, end):
    before = place.latest()
    started = place.start("run", **ONE_STEP, reward__url=bench.url)
    folder = wait_for(lambda: place.latest() if place.latest() != before else None, what="the run's folder")
    wait_for(lambda: place.processes("alignment.update_worker"), 300, "the update")
    if end == "Ctrl-C":  # a terminal sends it to all that it started
        os.killpg(started.pid, signal.SIGINT)
    else:
        os.kill(started.pid, signal.SIGKILL if end == "kill -9" else signal.SIGTERM)
    output, _ = started.communicate(timeout=120)
    assert started.returncode != 0 and shards_done(output) == ONCE_EACH
    wait_for(lambda: not place.processes(), 90, "the end of all processes")
    resumed = place.resume()
    assert resumed.folder == folder
    assert not shards_done(resumed.output)
    same_run(one_step, resumed)


@pytest.mark.long
def test_a_step_goes_on_without_a_shard_that_may_be_lost_but_not_without_two(place, bench, one_step):
    allowed = {"phases__max_lost_shards": 1, "phases__rollouts__retries": 0, "phases__scoring__retries": 0}
    started = place.start("run", **ONE_STEP, **allowed, reward__url=bench.url)
    for shard in (1, 2):
        os.kill(shard_task(place, shard), signal.SIGKILL)
    output, _ = started.communicate(timeout=600)
    assert started.returncode != 0
    assert "RS step 1 lost the shards 2, 3 of 3, more than phases.max_lost_shards (1)" in output
    resumed = place.begin(resuming("rs_flow"))  # anew, with all shards
    os.kill(shard_task(place, 1), signal.SIGKILL)
    output, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, output
    run, whole = RunFolder(place.latest()), RunFolder(one_step.folder)
    lost = steps(whole)[0]["prompt_ids"][1::3]
    assert steps(run)[0]["lost_prompts"] == lost
    assert decisions(run, 1) == [row for row in decisions(whole, 1) if row[0] not in lost]
    assert "RS step 1 goes on without the shards 2 and their 2 prompts" in output
    assert shards_done(output) == [(1, 1), (1, 3)]


@pytest.mark.long
def test_more_shards_than_metaflow_allows_by_default(place, bench):
    """Sampling is a stand-in; the tasks, scoring and the update are real."""
    prompts = place.path / "many.jsonl"
    prompts.write_text("".join(json.dumps({"text": f"question {i}"}) + "\n" for i in range(120)))
    many = {
        **ONE_STEP, "prompts__train": prompts, "rollouts__num_rollout_samples": 120,
        "rollouts__num_rollouts_per_prompt": 1, "phases__shards": 120, "reward__url": bench.url,
    }  # fmt: skip
    options = inner_run.command(
        config("rollouts.num_rollout_samples=120", "phases.shards=120"), RunFolder(Path()), 1, None, []
    )
    words = place.command("rs_iteration_flow", "run", *options[-4:], **many)
    words[1] = str(ROOT / "tests" / "cheap_shards.py")
    path = os.pathsep.join(str(ROOT / name) for name in (".", "flows"))
    done = place.execute(words, PYTHONPATH=path)
    assert done.status == 0, done.output
    assert shards_done(done.output) == [(1, shard) for shard in range(1, 121)]
    assert len(RunFolder(done.folder).read_rollouts(1)) == 120


def shard_task(place: Place, index: int) -> int:
    """The process of the task of a shard, the first of which is 0, as soon as there is one."""

    def find() -> int | None:
        for pid in place.processes("step rollouts"):
            try:
                words = (Path("/proc") / str(pid) / "cmdline").read_bytes().decode().split("\0")
            except OSError:  # it has ended meanwhile
                continue
            if "--split-index" in words and words[words.index("--split-index") + 1] == str(index):
                return pid
        return None

    return wait_for(find, 300, f"a task of shard {index}")


def config(*overrides: str):
    return load_config(SMOKE, ["loop.steps_per_iteration=1", "loop.executor=disaggregated", *overrides])


def test_the_inner_command(tmp_path):
    run, options = RunFolder(tmp_path / "7"), ["--datastore", "s3"]
    many = config("rollouts.num_rollout_samples=200", "phases.shards=200", "phases.run_with=[kubernetes, 'a:b=1']")
    words = inner_run.command(many, run, 3, None, options)
    assert words[2:7] == ["--watch-stdin", "120", "--no-pylint", "--datastore", "s3"]
    assert words[words.index("run") :] == [
        "run", "--run_path", str(run.path), "--tag", "parent:7", "--tag", "iteration:3",
        "--with", "kubernetes", "--with", "a:b=1", "--max-num-splits", "200", "--max-workers", "200",
    ]  # fmt: skip
    words = inner_run.command(config("resources.cpu=4096"), run, 3, "12", [])
    assert words[words.index("resume") : -4] == [
        "resume", "--origin-run-id", "12", "--tag", "parent:7", "--tag", "iteration:3"
    ]  # fmt: skip
    assert words[-4:] == ["--max-num-splits", "100", "--max-workers", "1"]  # one at a time on this node
    task = ["flow.py", "--metadata", "local", "--datastore", "s3", "step", "iterate", "--run-id", "7"]
    assert inner_run.inherited(task) == ["--metadata", "local", "--datastore", "s3"]


def test_nodes_of_a_gang_meet_at_the_first_one():
    assert _launcher(None) == _launcher(Gang(0, 1, "10.0.0.1", 1)) == ["alignment.one_node"]
    words = " ".join(_launcher(Gang(1, 4, "10.0.0.1", 29000)))
    assert words == "alignment.gang_node --node-rank 1 --nnodes 4 --master-addr 10.0.0.1 --master-port 29000"
    ports = {gang_port(f"{run}/0") for run in range(100)}
    assert len(ports) > 90 and all(20_000 <= port < 30_000 for port in ports)
    assert gang_port("7/0") == gang_port("7/0") != gang_port("7/1")


def test_a_task_that_hangs_outside_python_is_ended():
    script = "import time; from alignment.lifeline import end_after\nwith end_after(0.2): time.sleep(60)"
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == OVERTIME and time.monotonic() - begun < 50
    assert "has taken more than 0 s: it is ended" in done.stderr
