"""Flows compiled for Argo Workflows, as a cluster would get them, with a stand-in for S3 on loopback."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from flow_runs import ROOT, SMOKE, Place

HOOK = "error-msg-capture-hook"
"""Metaflow's own template, which collects messages at a workflow's end."""
PLACED = ("nodeSelector", "volumes", "tolerations", "serviceAccountName")
"""What a template says of its pod beside the container."""


@contextmanager
def s3_stand_in() -> Iterator[dict[str, str]]:
    """moto in this process stands in for S3; yields the environment that makes Metaflow use it and Kubernetes."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url, keys = f"http://{host}:{port}", {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
        boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="any", aws_secret_access_key="any"
        ).create_bucket(Bucket="bucket")
        yield {
            **keys,
            "AWS_DEFAULT_REGION": "us-east-1",
            "METAFLOW_S3_ENDPOINT_URL": url,
            "METAFLOW_DEFAULT_DATASTORE": "s3",
            "METAFLOW_DATASTORE_SYSROOT_S3": "s3://bucket/metaflow",
            "METAFLOW_DATATOOLS_S3ROOT": "s3://bucket/data",
            "METAFLOW_DEFAULT_METADATA": "local",
            "METAFLOW_KUBERNETES_NAMESPACE": "default",
            "METAFLOW_KUBERNETES_CONTAINER_IMAGE": "image",
        }
    finally:
        server.stop()


def pods(workflow: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod of each step's template, as Argo or JobSet would make it; of a gang's that of its control."""
    found = {}
    for template in _without_nulls(workflow)["spec"]["templates"]:
        if template["name"] == HOOK:
            continue
        if "container" in template:
            placed = {key: template[key] for key in PLACED if key in template}
            spec = {"containers": [{"name": "main", **template["container"]}], "restartPolicy": "Never", **placed}
            found[template["name"]] = {"apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": spec}
        elif "resource" in template:
            control = job_set(template)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
            found[template["name"]] = {"apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": control["spec"]}
    return found


def job_set(template: dict[str, Any]) -> dict[str, Any]:
    """The JobSet that a template of a gang creates, with one worker for what is counted when it runs."""
    return yaml.safe_load(template["resource"]["manifest"].replace("{{=asInt(inputs.parameters.workerCount)}}", "1"))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value if one is not None] if isinstance(value, list) else value


def compiled(flow: str, *arguments: str, environment: dict[str, str]) -> dict[str, Any]:
    """The workflow template that `argo-workflows create` makes of a flow on the smoke preset."""
    command = [sys.executable, str(ROOT / "flows" / f"{flow}.py"), "--config", "config", str(SMOKE), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "argo-workflows", "create", "--only-json"],
            cwd=folder, env=Place(Path(folder)).environment(**environment), text=True, capture_output=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
