"""Whole flows whose tasks are pods, on a stand-in for Kubernetes that runs pods as processes, and on Ceph.

No container, no scheduler and no GPU is here: pod_processes.py and kubernetes_stand_in.py say what is.
"""

import json
import os
import signal
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from alignment.s3_objects import read_bytes
from alignment.workspace import find_run
from flow_runs import wait_for
from interruptions import served_bench
from kubernetes_runs import IMAGE, KEYS, cluster
from pod_processes import Pod
from s3_flow_runs import LONGER_STEPS, Node, names
from s3_servers import use
from test_packaging import FEW_MB

pytestmark = pytest.mark.cluster

STEPS = {"start": 1, "reward_model": 1, "iterate": 3, "evaluate": 1, "end": 1}
"""Pods of the one whole run: two iterations, of which the first is repeated."""
LIMIT_S = 900
"""Of each wait: a pod is half a dozen Pythons, and takes minutes on a machine that is busy."""
LESS_TO_DO = {"reward_training__num_train": 64, "judge__num_train_pairs": 64, "evaluation__num_prompts": 4}
BENCH_LESS = ("reward_training.num_train=64", "judge.num_train_pairs=64")


@pytest.fixture(scope="module")
def place(ceph_server, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use(ceph_server, patch)
        with cluster(tmp_path_factory.mktemp("cluster"), ceph_server) as place:
            yield place


@pytest.fixture(scope="module")
def aligned(place):
    """A run with every task a pod, whose first `iterate` is evicted after RS step 2 of 3; what it printed."""
    settings = {**LONGER_STEPS, **LESS_TO_DO, "loop__max_steps": 4, "loop__steps_per_iteration": 3}
    started = place.begin(
        place.command("rs_flow", "run", kubernetes__disk=20000, kubernetes__shared_memory=64, **settings)
    )
    run = reached(started, lambda: find_run(place.root, "latest"), "the run")
    reached(started, lambda: read_bytes(f"{run}/checkpoints/step-000002/DONE"), "RS step 2")
    place.api.of("iterate", "Running")[0].end("Evicted", "the node was low on memory")
    said = started.communicate(timeout=LIMIT_S)[0]
    assert started.returncode == 0, said[-6000:] + place.api.logs()
    return said


@pytest.fixture
def fresh(ceph_server, tmp_path, monkeypatch):
    """A cluster and a bucket of its own."""
    use(ceph_server, monkeypatch)
    with cluster(tmp_path, ceph_server) as place:
        yield place


def env(pod: Pod) -> dict[str, str]:
    """The values that a pod's manifest gives its container."""
    return {e["name"]: e["value"] for e in pod.manifest["spec"]["containers"][0]["env"] if "value" in e}


def step_numbers(run: str) -> list[int]:
    """The RS steps that a run has records of, in their order."""
    records = [json.loads(line) for line in read_bytes(f"{run}/metrics.jsonl")[0].splitlines()]
    return [record["step"] for record in records if record["kind"] == "step"]


def test_every_task_is_a_pod_and_the_run_is_whole(place, aligned):
    assert Counter(pod.step for pod in place.api.pods) == STEPS
    run = find_run(place.root, "latest")
    report = json.loads(read_bytes(f"{run}/report.json")[0])
    assert step_numbers(run) == [1, 2, 3, 4] and report["checkpoint"]["step"] in (3, 4)
    assert {"report.html", "checkpoints/step-000004/DONE"} <= set(names(run))
    assert not any(pod.processes() for pod in place.api.pods)


def test_a_pod_that_is_evicted_costs_the_steps_since_its_last_checkpoint(place, aligned):
    """And is repeated by the config alone. Why it ended, Metaflow says only with a service."""
    assert [pod.phase for pod in place.api.of("iterate")] == ["Failed", "Succeeded", "Succeeded"]
    assert [pod.step for pod in place.api.pods if pod.phase != "Succeeded"] == ["iterate"]
    assert "Task is starting (retry)" in aligned and "continuing after RS step" in aligned, aligned


def test_pods_are_what_the_config_asks_for(place, aligned):
    for pod in place.api.pods:
        container = pod.manifest["spec"]["containers"][0]
        assert (container["image"], pod.manifest["metadata"]["namespace"]) == (IMAGE, "team")
        assert container["envFrom"] == [{"secretRef": {"name": KEYS}}]
        assert container["resources"]["requests"]["ephemeral-storage"] in ("20000M", "20000.0M")
        assert {"name": "dhsm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    limits = {pod.step: pod.manifest["spec"]["containers"][0]["resources"]["limits"] for pod in place.api.pods}
    assert limits["iterate"].get("nvidia.com/gpu") == "0" and "nvidia.com/gpu" not in limits["start"]


def test_pods_know_when_the_command_began(place, aligned):
    """What loop.max_time_per_run counts from is one time for all tasks."""
    told = [env(pod)["RS_COMMAND_STARTED"] for pod in place.api.pods]
    assert len(told) == sum(STEPS.values()) and len(set(told)) == 1


def test_no_key_is_in_what_is_posted_or_packed(place, aligned, ceph_server):
    said = json.dumps(place.api.posted) + aligned
    assert ceph_server.secret_key not in said and ceph_server.access_key not in said


def test_pods_work_from_the_code_package_which_holds_no_weights(place, aligned):
    homes = [pod.log.parent / "home" for pod in place.api.pods]
    for home in homes:
        with tarfile.open(home / "metaflow" / "job.tar") as package:
            sizes = {m.name: m.size for m in package if not m.name.startswith(".mf_")}
        assert "alignment/stages.py" in sizes and sum(sizes.values()) < FEW_MB
        assert {Path(name).suffix for name in sizes} <= {".py", ".pbtxt", ".yaml", ".json", ".jinja"}


def test_metaflow_knows_the_pods_and_the_log_says_what_it_cannot_know(place, aligned):
    known = {path.name.rpartition("_")[0] for path in (place.path / ".metaflow").rglob("sysmeta_kubernetes-pod-name_*")}
    assert known == {"sysmeta_kubernetes-pod-name"}
    assert "the run is not tagged reward_model:reward_model/1: this task sees no Metaflow service" in aligned


def test_an_error_that_would_only_come_again_costs_one_pod(fresh):
    done = fresh.run("run", flow="sft_flow", sft__train="{no_such_file.jsonl: 1}")
    assert done.status != 0 and "no_such_file.jsonl" in done.output, done.output
    assert [pod.phase for pod in fresh.api.pods] == ["Failed"], done.output


def test_an_interrupt_ends_the_pods_and_a_resume_goes_on_in_pods(fresh):
    started = fresh.begin(fresh.command("sft_flow", "run", sft__epochs=40))
    run = reached(started, lambda: find_run(fresh.root, "sft/latest"), "the run")
    reached(started, lambda: [name for name in names(run) if name.endswith("/DONE")], "a checkpoint")
    interrupted(started)
    wait_for(lambda: not any(pod.processes() for pod in fresh.api.pods), 30, "the end of all pods")
    before = Counter(pod.step for pod in fresh.api.pods)
    assert before == {"start": 1, "train": 1}
    resumed = fresh.resume("sft_flow")
    assert resumed.status == 0, resumed.output[-6000:]
    assert Counter(pod.step for pod in fresh.api.pods) - before == {"train": 1, "end": 1}
    assert find_run(fresh.root, "sft/latest") == run and {"report.json", "model/config.json"} <= set(names(run))


def test_a_secret_that_is_not_there_keeps_its_pod_waiting_and_an_interrupt_takes_it_away(fresh):
    """Metaflow says how the pod is as it starts, once: why it waits, the cluster knows."""
    started = fresh.begin(fresh.command("sft_flow", "run", kubernetes__secrets="[not-there]"))
    line = next(line for line in started.stdout if "Task is starting (Pod is pending" in line)
    (pod,) = fresh.api.pods
    assert f"pod {pod.name}" in line and pod.manifest["status"]["containerStatuses"][0]["state"]["waiting"] == {
        "reason": "CreateContainerConfigError",
        "message": 'secret "not-there" not found',
    }
    interrupted(started)
    assert pod.phase == "Failed"


def test_bare_with_kubernetes_takes_metaflows_own_settings(fresh):
    own = {f"METAFLOW_KUBERNETES_{key}": value for key, value in
           {"CONTAINER_IMAGE": IMAGE, "SECRETS": KEYS, "NAMESPACE": "team"}.items()}  # fmt: skip
    command = Node.command(fresh, "reward_model_flow", "run", "--with", "kubernetes")
    done = fresh.execute(command, **own)
    assert done.status == 0, done.output[-6000:] + fresh.api.logs()
    assert Counter(pod.step for pod in fresh.api.pods) == {"start": 1, "reward_model": 1, "end": 1}
    assert "reward_model/1/card.json" in names(f"{fresh.root}/triton_repo")


def test_the_phases_of_a_step_are_pods_that_a_pod_starts_and_the_update_is_a_gang_on_two(fresh, tmp_path):
    """The run's folder is a volume that all pods see. What follows the first of its two steps, other tests do."""
    volume = tmp_path / "volume"
    volume.mkdir()
    settings = {
        "run__root": volume / "runs",
        "kubernetes__volume_claims": json.dumps({"runs": str(volume)}),
        "kubernetes__service_account": "alignment-runs",
        "loop__executor": "disaggregated",
        "loop__steps_per_iteration": 1,
        "loop__max_steps": 2,
        "phases__shards": 2,
        "phases__update_nodes": 2,
        **LESS_TO_DO,
    }
    ended = ("Succeeded", "Failed")
    with served_bench(tmp_path / "bench" / "runs", *BENCH_LESS) as bench:
        started = fresh.begin(fresh.command("rs_flow", "run", reward__url=bench.url, **settings))
        reached(started, lambda: any(pod.phase in ended for pod in fresh.api.of("iterate")), "the first step's end")
        said = interrupted(started)
    pods = Counter(pod.step for pod in fresh.api.pods if pod.phase == "Succeeded")
    assert pods["iterate"] == 1, said[-6000:] + fresh.api.logs()
    assert (pods["rollouts"], pods["scoring"], pods["gang_update"], pods["gang_done"]) == (2, 1, 2, 1)
    gangs = [one for one in fresh.api.posted if one["kind"] == "JobSet"]
    assert [[part["replicas"] for part in gang["spec"]["replicatedJobs"]] for gang in gangs] == [[1, 1]]
    run = next((volume / "runs").glob("[0-9]*"))
    manifest = json.loads((run / "checkpoints" / "step-000001" / "manifest.json").read_text())
    assert manifest["ranks"] == 2


def reached(process: subprocess.Popen[str], condition, what: str):
    """Poll until `condition()` is true while a flow runs; returns its value."""

    def value():
        has_ended = process.poll() is not None
        found = condition()
        assert found or not has_ended, f"{what} did not come: {process.communicate()[0][-6000:]}"
        return found

    return wait_for(value, LIMIT_S, what)


def interrupted(process: subprocess.Popen[str]) -> str:
    """Ctrl-C to a flow; what it prints until its end."""
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=60)[0]
