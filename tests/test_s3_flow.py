"""Whole flows whose runs, exports and registry live under s3://, with Metaflow's datastore there too.

moto, over HTTP, stands in for S3; what it cannot show is in tests/test_s3_ceph_flow.py.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from alignment.s3_folders import pull_folder
from alignment.s3_objects import list_objects, read_bytes
from alignment.workspace import find_run
from flow_runs import ROOT, Finished, Place
from s3_stand_in import moto

SECRET = "planted-secret-7f3a9c"
RUNS = "s3://bucket/team/runs"


@dataclass(frozen=True)
class S3Place(Place):
    """A node: a folder with its own workspace and cache, and runs that all nodes share."""

    runs: str = RUNS

    @property
    def root(self):
        return self.runs

    def environment(self, **extra):
        own = {"RS_CACHE": str(self.path / "cache"), "METAFLOW_DEFAULT_METADATA": "local", **datastore()}
        return super().environment(**{**own, **extra})

    def latest(self):
        return self.path


def datastore() -> dict[str, str]:
    """What makes Metaflow keep its artifacts in S3."""
    return {
        "METAFLOW_DEFAULT_DATASTORE": "s3",
        "METAFLOW_DATASTORE_SYSROOT_S3": "s3://bucket/metaflow",
        "METAFLOW_DATATOOLS_S3ROOT": "s3://bucket/data",
        "METAFLOW_S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"],
    }


def tool(place: Place, module: str, *arguments: str) -> Finished:
    """`python -m module …` as on the node."""
    return place.execute([sys.executable, "-m", module, *arguments], PYTHONPATH=str(ROOT))


@pytest.fixture(scope="module", autouse=True)
def bucket():
    with moto(secret=SECRET) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return S3Place(tmp_path_factory.mktemp("node"))


@pytest.fixture(scope="module")
def aligned(place):
    """A run of the smoke preset under s3://."""
    done = place.run("run")
    assert done.status == 0, done.output
    return done


def names(uri):
    return [stored.uri.removeprefix(f"{uri}/") for stored in list_objects(uri)]


def test_a_run_leaves_in_s3_what_a_local_one_leaves_in_its_folder(place, aligned):
    run = find_run(RUNS, "latest")
    files = names(run)
    assert {"config.json", "metrics.jsonl", "scorers.json", "report.json", "report.html", "evaluation.json"} <= set(files)
    assert [name for name in files if name.startswith("rollouts/")] == [f"rollouts/step-{i:06d}.parquet" for i in range(1, 5)]
    assert "checkpoints/step-000004/DONE" in files
    assert {"judge/weights.npz", "lineage/step-000004.json"} & set(files)
    report = json.loads(read_bytes(f"{run}/report.json")[0])
    assert report["checkpoint"]["uri"].startswith(f"{run}/checkpoints/step-")
    assert report["reward_model"]["version"] == "1"
    assert "triton_repo/reward_model/1/card.json" in names(RUNS)
    assert f"{run}/report.html" in aligned.output
    scorers = json.loads(read_bytes(f"{run}/scorers.json")[0])
    assert scorers["judge"]["uri"] == f"{run}/judge"
    assert scorers["reward_model"]["repository"] == f"{RUNS}/triton_repo"
