"""The manifests against Kubernetes' own schema, strictly, and against what they promise. No cluster runs them here."""

import re
import shutil
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from alignment.config import load_config
from infra.triton_options import parser
from manifests import MANIFESTS, ROOT, objects_of, only, rendered, rendered_together

KUBERNETES = "1.29"
NAME = {"app.kubernetes.io/name": "reward-model"}
PLAIN = [
    path
    for folder in ("base", "components/run-progress", "components/runs")
    for path in (MANIFESTS / folder).glob("*.yaml")
    if path.name != "kustomization.yaml"
]
"""Files whose objects are whole; those of overlays are patches."""
OVERLAYS = ("one-gpu", "eight-gpus")

needs_kustomize = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders, is not installed")


def check(objects: list[dict]) -> None:
    assert objects
    for one in objects:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)


def own_kustomization() -> str:
    """The example of a deployment in docs/kubernetes.md."""
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    return next(block for block in blocks if "kind: Kustomization" in block)


def triton(objects: list[dict]) -> dict:
    return only(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]


def test_no_folder_of_manifests_is_empty() -> None:
    assert {path.parent.name for path in PLAIN} == {"base", "run-progress", "runs"}


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.stem)
def test_each_file_follows_the_schema(path: Path) -> None:
    check(objects_of(path.read_text()))


def test_the_schema_is_strict() -> None:
    service = yaml.safe_load((MANIFESTS / "base" / "service.yaml").read_text())
    service["spec"]["prots"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="prots"):
        check([service])


@needs_kustomize
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_overlay_follows_the_schema(overlay: str) -> None:
    check(rendered(MANIFESTS / "overlays" / overlay))


@needs_kustomize
def test_the_example_of_the_docs_reads_s3_and_mounts_no_volume(tmp_path: Path) -> None:
    objects = rendered_together(tmp_path, own_kustomization())
    check(objects)
    container, pod = triton(objects), only(objects, "Deployment")["spec"]["template"]["spec"]
    assert "--repository=$(MODEL_REPOSITORY)" in container["args"] and "--repository=/models" not in container["args"]
    assert not parser().parse_args(container["args"]).follow  # which the launcher refuses of a prefix in S3
    assert not any(one["kind"] == "PersistentVolumeClaim" and "repository" in str(one) for one in objects)
    assert {volume["name"] for volume in pod["volumes"]} == {"scratch", "shared-memory"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {"scratch", "shared-memory"}
    assert 443 in {port["port"] for rule in only(objects, "NetworkPolicy")["spec"]["egress"] for port in rule["ports"]}
    settings = next(one for one in objects if one["kind"] == "ConfigMap")
    assert settings["data"]["uri"] == "s3://my-bucket/triton_repo"
    only(objects, "Deployment", "run-progress")


@needs_kustomize
def test_keys_are_references_and_no_secret_is_in_the_manifests(tmp_path: Path) -> None:
    objects = rendered_together(tmp_path, own_kustomization())
    assert not any(one["kind"] == "Secret" for one in objects)
    keys = {e["name"]: e for e in triton(objects)["env"] if e["name"].startswith("AWS_") and "KEY" in e["name"]}
    assert set(keys) == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert all("value" not in one and "secretKeyRef" in one["valueFrom"] for one in keys.values())


@needs_kustomize
def test_a_namespace_of_runs_gets_an_account_that_may_start_pods_there_alone(tmp_path: Path) -> None:
    own = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: team\n"
    objects = rendered_together(tmp_path, own + "components: [alignment/infra/kubernetes/components/runs]\n")
    check(objects)
    assert {(one["kind"], one["metadata"]["namespace"]) for one in objects} == {
        ("ServiceAccount", "team"), ("Role", "team"), ("RoleBinding", "team")
    }  # fmt: skip
    name = only(objects, "ServiceAccount", "alignment-runs")["metadata"]["name"]
    assert only(objects, "RoleBinding", name)["subjects"] == [
        {"kind": "ServiceAccount", "name": name, "namespace": "team"}
    ]
    assert load_config(ROOT / "configs" / "kubernetes.yaml").kubernetes.service_account == name


@needs_kustomize
@pytest.mark.parametrize(("overlay", "gpus"), zip(OVERLAYS, ("1", "8"), strict=True))
def test_selectors_meet_the_pods_and_each_overlay_has_its_gpus(overlay: str, gpus: str) -> None:
    objects = rendered(MANIFESTS / "overlays" / overlay)
    template = only(objects, "Deployment")["spec"]["template"]
    assert template["metadata"]["labels"].items() >= NAME.items()
    assert only(objects, "Deployment")["spec"]["selector"]["matchLabels"] == NAME
    assert only(objects, "Service")["spec"]["selector"] == NAME
    assert only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == NAME
    policy = only(objects, "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == NAME
    # Whom it lets in is nobody with the server's own labels.
    clients, prometheus = (rule["from"][0] for rule in policy["ingress"])
    assert clients == {"namespaceSelector": {"matchLabels": {"alignment/reward-clients": "true"}}}
    assert prometheus["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}
    assert policy["egress"] == [] and set(policy["policyTypes"]) == {"Ingress", "Egress"}
    resources = triton(objects)["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == gpus


def test_pods_have_no_rights_and_probes_by_canary() -> None:
    for path in (
        MANIFESTS / "base" / "deployment.yaml",
        MANIFESTS / "components" / "run-progress" / "run-progress.yaml",
    ):
        pod = objects_of(path.read_text())[0]["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
    container = triton(objects_of((MANIFESTS / "base" / "deployment.yaml").read_text()))
    for kind in ("startup", "readiness", "liveness"):
        probe = container[f"{kind}Probe"]
        words = probe["exec"]["command"]
        assert words[:3] == ["python3", "-m", "infra.triton_canary"]
        within = next(float(word.partition("=")[2]) for word in words if word.startswith("--within="))
        assert within < probe["timeoutSeconds"]  # it says why before it is killed
    # A busy server must not be killed for being late.
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 600


@needs_kustomize
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_launcher_takes_the_containers_arguments(overlay: str) -> None:
    container = triton(rendered(MANIFESTS / "overlays" / overlay))
    options = parser().parse_args(container["args"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert (options.grpc_port, options.metrics_port) == (ports["grpc"], ports["metrics"])
    assert options.host == "0.0.0.0" and options.follow and options.model == "reward_model"
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts[str(options.repository)]["readOnly"] is True
    assert {"/tmp", "/dev/shm"} <= set(mounts)  # all that is written


def test_the_autoscaler_asks_for_the_metric_that_the_adapter_tells() -> None:
    scaler = yaml.safe_load((MANIFESTS / "base" / "autoscaler.yaml").read_text())
    adapter = yaml.safe_load((ROOT / "infra" / "monitoring" / "prometheus-adapter.yml").read_text())
    asked = {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]}
    assert asked == {rule["name"]["as"] for rule in adapter["rules"]}
