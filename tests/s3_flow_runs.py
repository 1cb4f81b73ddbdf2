"""Running the flows on S3: a node is a folder with its own workspace and cache; runs and artifacts are shared."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.s3_objects import list_objects
from flow_runs import ROOT, Finished, Place

# Steps of more than a second, so that a kill or an eviction finds one under way.
LONGER_STEPS = {
    "rollouts__num_rollout_samples": 16,
    "rollouts__max_new_tokens": 160,
    "training__global_batch_size": 16,
    "loop__max_steps": 6,
    "loop__steps_per_iteration": 6,
    "loop__val_check_interval": 3,
    "evaluation__num_prompts": 4,
}


@dataclass(frozen=True)
class Node(Place):
    """A node; `bucket` is an s3:// URI that boto3 of this process can use, and Metaflow's datastore lies there too."""

    bucket: str

    @property
    def root(self) -> Any:
        return f"{self.bucket}/team/runs"

    def environment(self, **extra: str) -> dict[str, str]:
        own = {
            "RS_CACHE": str(self.path / "cache"),
            "METAFLOW_DEFAULT_DATASTORE": "s3",
            "METAFLOW_DATASTORE_SYSROOT_S3": f"{self.bucket}/metaflow",
            "METAFLOW_DATATOOLS_S3ROOT": f"{self.bucket}/data",
            "METAFLOW_S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"],
            "METAFLOW_DEFAULT_METADATA": "local",
        }
        return super().environment(**{**own, **extra})

    def latest(self) -> Path:
        return self.path

    def tool(self, module: str, *arguments: str) -> Finished:
        """`python -m MODULE …` on this node."""
        return self.execute([sys.executable, "-m", module, *arguments], PYTHONPATH=str(ROOT))


def names(uri: str) -> list[str]:
    """Names of the objects below a URI."""
    return [stored.uri.removeprefix(f"{uri}/") for stored in list_objects(uri)]
