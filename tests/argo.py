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


def container(template: dict[str, Any]) -> dict[str, Any] | None:
    """What a template runs, if anything: a gang's nodes are jobs of a JobSet, the first of which is its control."""
    if "resource" not in template:
        return template.get("container")
    manifest = template["resource"]["manifest"].replace("{{=asInt(inputs.parameters.workerCount)}}", "0")
    control = yaml.safe_load(manifest)["spec"]["replicatedJobs"][0]
    return control["template"]["spec"]["template"]["spec"]["containers"][0]


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
