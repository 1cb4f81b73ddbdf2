"""The stand-in for Kubernetes by itself: what pods get, and how they end."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from flow_runs import wait_for
from kubernetes_stand_in import KubernetesStandIn, kubernetes_stand_in
from pod_processes import POD

pytestmark = pytest.mark.cluster

JOBS = "/apis/batch/v1/namespaces/team/jobs"
JOB_SETS = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/team/jobsets"
LONG = "sleep 300 & setsid sleep 300"
"""Two processes, one of them in a session of its own."""


@pytest.fixture
def api(tmp_path: Path):
    with kubernetes_stand_in(tmp_path / "kubernetes", {"PATH": "/usr/bin:/bin"}, {"keys": {"KEY": "planted"}}) as api:
        yield api


def asked(api: KubernetesStandIn, method: str, path: str, body: Any = None) -> dict[str, Any]:
    """The API's answer. Raises HTTPError."""
    server = json.loads(api.kubeconfig.read_text())["clusters"][0]["cluster"]["server"]
    request = urllib.request.Request(server + path, json.dumps(body).encode() if body else None, method=method)
    return json.load(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20))


def template(command: str, **others: Any) -> dict[str, Any]:
    """Of a pod whose container runs a command of a shell."""
    name = {"name": POD, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    container = {"name": "main", "image": "x:1", "command": ["bash", "-c", command], "env": [name]}
    container.update({key: others.pop(key) for key in ("envFrom",) if key in others})
    annotations = {"metaflow/step_name": "start"}
    return {
        "metadata": {"annotations": annotations},
        "spec": {"containers": [container], "restartPolicy": "Never", **others},
    }


def job(command: str, **others: Any) -> dict[str, Any]:
    spec = {"backoffLimit": 0, "template": template(command, **others)}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"generateName": "t-"}, "spec": spec}


def begun(api: KubernetesStandIn, command: str, **others: Any) -> tuple[str, Any]:
    """A new job's path and its pod."""
    name = asked(api, "POST", JOBS, job(command, **others))["metadata"]["name"]
    return f"{JOBS}/{name}", api.pods[-1]


def phase(pod: Any, *expected: str) -> None:
    wait_for(lambda: pod.phase in expected, 20, f"{expected} of a pod that is {pod.phase}")


def test_a_pod_has_its_secrets_and_nothing_of_this_process(api, monkeypatch):
    monkeypatch.setenv("OF_THIS_PROCESS", "1")
    path, pod = begun(api, "env; exit 3", envFrom=[{"secretRef": {"name": "keys"}}])
    phase(pod, "Failed")
    lines = pod.log.read_text().splitlines()
    assert "KEY=planted" in lines and f"{POD}={pod.name}" in lines and "OF_THIS_PROCESS=1" not in lines
    assert pod.manifest["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 3
    assert asked(api, "GET", path)["status"] == {"active": 0, "succeeded": 0, "failed": 1}
    assert "planted" not in json.dumps(asked(api, "GET", "/api/v1/namespaces/team/pods"))


@pytest.mark.parametrize("how", ["parallelism", "deadline", "eviction"])
def test_the_end_of_a_pod_is_that_of_all_its_processes(api, how):
    limit = {"activeDeadlineSeconds": 1} if how == "deadline" else {}
    path, pod = begun(api, LONG, **limit)
    if how != "deadline":
        wait_for(lambda: len(pod.processes()) >= 3, 20, "the pod's processes")
    if how == "parallelism":
        asked(api, "PATCH", path, {"spec": {"parallelism": 0}})
    if how == "eviction":
        pod.end("Evicted", "the node was low on memory")
    phase(pod, "Failed")
    assert not pod.processes()
    reasons = {"parallelism": "Killed", "deadline": "DeadlineExceeded", "eviction": "Evicted"}
    assert pod.manifest["status"]["reason"] == reasons[how]


def test_what_breaks_the_schema_is_refused(api):
    wrong = job("true")
    wrong["spec"]["template"]["spec"]["contaners"] = []
    with pytest.raises(urllib.error.HTTPError) as caught:
        asked(api, "POST", JOBS, wrong)
    assert caught.value.code == 422 and "contaners" in json.load(caught.value)["message"] and not api.pods


def job_set(name: str, control: str, worker: str) -> dict[str, Any]:
    def part(kind: str, replicas: int, command: str) -> dict[str, Any]:
        return {"name": kind, "replicas": replicas, "template": {"spec": job(command)["spec"]}}

    parts = [part("worker", 2, worker), part("control", 1, control)]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {"replicatedJobs": parts},
    }


def test_a_jobset_is_done_when_all_its_pods_are(api):
    asked(api, "POST", JOB_SETS, job_set("js-1", "true", "true"))
    assert [pod.name.split("-")[2] for pod in api.pods] == ["control", "worker", "worker"]
    wait_for(lambda: asked(api, "GET", f"{JOB_SETS}/js-1")["status"]["conditions"], 20, "the end of the JobSet")
    found = asked(api, "GET", f"{JOB_SETS}/js-1")["status"]
    assert found["conditions"][0]["type"] == "Completed"
    counts = {part["name"]: part["succeeded"] for part in found["replicatedJobsStatus"]}
    assert counts == {"control": 1, "worker": 2}


def test_one_pod_of_a_jobset_that_fails_ends_the_others(api):
    asked(api, "POST", JOB_SETS, job_set("js-2", "sleep 1; exit 1", LONG))
    for pod in api.pods:
        phase(pod, "Failed")
    assert not any(pod.processes() for pod in api.pods)
    assert asked(api, "GET", f"{JOB_SETS}/js-2")["status"]["conditions"][0]["type"] == "Failed"
