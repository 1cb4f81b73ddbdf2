"""The flows as Argo Workflows would get them: compiled, each pod against Kubernetes' schema. No Argo runs them here."""

import functools
import json
from typing import Any

import kubernetes_validate
import pytest

from argo import compiled, job_set, pods, s3_stand_in
from flow_runs import ROOT
from kubernetes_stand_in import VERSION

IMAGE = "registry.example.com/alignment-trainer:0.1.0"
CLAIMS = {"models": "/models"}
SETTINGS = (
    f"kubernetes.image={IMAGE}",
    "run.root=s3://bucket/runs",
    "kubernetes.service_account=alignment-runs",
    "kubernetes.secrets=[run-keys]",
    "kubernetes.image_pull_secrets=[registry-keys]",
    "kubernetes.node_selector={pool: training}",
    "kubernetes.gpu_node_selector={gpu: h100}",
    "kubernetes.tolerations=[{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]",
    "kubernetes.shared_memory=8192",
    "kubernetes.disk=50000",
    f"kubernetes.volume_claims={json.dumps(CLAIMS)}",
    "resources.gpu=8",
)
STEPS = {
    "rs_flow": {"start", "reward-model", "recursive-iterate", "evaluate", "end"},
    "rs_iteration_flow": {
        *("start", "preparation", "sharding", "rollouts", "scoring", "selection", "update"),
        *("gang", "gang-update", "gang-done", "validation", "end"),
    },
    "sft_flow": {"start", "train", "end"},
    "evaluate_flow": {"start", "reward-model", "evaluate", "end"},
    "reward_model_flow": {"start", "reward-model", "end"},
}  # fmt: skip
GPUS = {
    "rs_flow": {"reward-model": "8", "recursive-iterate": "8", "evaluate": "8"},
    # A shard and the validation sample in one process.
    "rs_iteration_flow": {"preparation": "8", "rollouts": "1", "update": "8", "gang-update": "8", "validation": "1"},
    "sft_flow": {"train": "8"},
    "evaluate_flow": {"reward-model": "8", "evaluate": "8"},
    "reward_model_flow": {"reward-model": "8"},
}


@functools.cache
def workflow(flow: str) -> dict[str, Any]:
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    with s3_stand_in() as environment:
        return compiled(flow, *sets, environment=environment)


def gpus_of(pod: dict[str, Any]) -> str | None:
    limits = pod["spec"]["containers"][0]["resources"].get("limits", {})
    return limits.get("nvidia.com/gpu") if limits.get("nvidia.com/gpu") != "0" else None


@pytest.mark.parametrize("flow", STEPS)
def test_every_flow_compiles_to_pods_that_follow_the_schema(flow: str) -> None:
    found = pods(workflow(flow))
    assert workflow(flow)["kind"] == "WorkflowTemplate" and set(found) == STEPS[flow]
    for name, pod in found.items():
        kubernetes_validate.validate(pod, VERSION, strict=True)
        assert not any(str(ROOT) in word for word in pod["spec"]["containers"][0]["command"]), name


@pytest.mark.parametrize("flow", STEPS)
def test_pods_have_what_the_config_says_and_gpus_where_a_step_needs_them(flow: str) -> None:
    found = pods(workflow(flow))
    assert {name: gpus for name, pod in found.items() if (gpus := gpus_of(pod))} == GPUS[flow]
    for name, pod in found.items():
        spec, container = pod["spec"], pod["spec"]["containers"][0]
        assert container["image"] == IMAGE and spec["serviceAccountName"] == "alignment-runs"
        assert {"name": "run-keys"} in [source["secretRef"] for source in container["envFrom"]]
        own = {"gpu": "h100"} if name in GPUS[flow] else {}
        assert spec["nodeSelector"] == {"pool": "training", **own}, name
        assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert container["resources"]["requests"]["ephemeral-storage"] in ("50000M", "50000.0M")
        memory = next(v["emptyDir"] for v in spec["volumes"] if "Memory" in str(v))
        assert memory == {"medium": "Memory", "sizeLimit": "8192Mi"}
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/dev/shm", *CLAIMS.values()} <= mounts


def test_iterate_calls_itself_until_no_step_is_left() -> None:
    templates = {template["name"]: template for template in workflow("rs_flow")["spec"]["templates"]}
    (own,), (again,) = templates["iterate"]["steps"]
    assert (own["template"], again["template"]) == ("recursive-iterate", "iterate")
    assert again["when"] == "{{steps.iterate-internal.outputs.parameters.switch-step}}==iterate"


def test_the_update_of_several_nodes_is_a_jobset() -> None:
    templates = {template["name"]: template for template in workflow("rs_iteration_flow")["spec"]["templates"]}
    made = job_set(templates["gang-update"])
    assert made["apiVersion"].startswith("jobset.x-k8s.io/") and made["kind"] == "JobSet"
    for part in made["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {}, "spec": part["template"]["spec"]}
        kubernetes_validate.validate(job, VERSION, strict=True)
