"""Running the flows on the stand-in for Kubernetes, with a real S3 server: keys reach pods by a secret alone."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kubernetes_stand_in import KubernetesStandIn, kubernetes_stand_in
from s3_flow_runs import Node
from s3_servers import S3Server, new_bucket
from test_images import DOCKER, instructions

IMAGE = "registry.example.com/alignment-trainer:0.1.0"
KEYS = "run-keys"


@dataclass(frozen=True)
class Cluster(Node):
    """A user's machine whose flows run as pods of `api`; `begun` are the commands that were not waited for."""

    api: KubernetesStandIn
    begun: list[subprocess.Popen[str]] = field(default_factory=list)

    def environment(self, **extra: str) -> dict[str, str]:
        return super().environment(KUBECONFIG=str(self.api.kubeconfig), **extra)

    def command(self, flow: str, *arguments: str, **settings: object) -> list[str]:
        own = {"kubernetes__image": IMAGE, "kubernetes__namespace": "team", "kubernetes__secrets": f"[{KEYS}]"}
        return super().command(flow, *arguments, **{**own, **settings})

    def begin(self, command: list[str], **extra: str) -> subprocess.Popen[str]:
        self.begun.append(super().begin(command, **extra))
        return self.begun[-1]

    def close(self) -> None:
        """End what a test that failed has left running."""
        for process in self.begun:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def cluster(folder: Path, server: S3Server) -> Iterator[Cluster]:
    """A new bucket and a stand-in whose secret `KEYS` has what boto3 needs; this process uses the server too.

    What runs there ends with it.
    """
    with kubernetes_stand_in(folder / "kubernetes", image_environment(), {KEYS: server.environment()}) as api:
        place = folder / "place"
        place.mkdir()
        with contextlib.closing(Cluster(place, new_bucket(), api)) as machine:
            yield machine


def image_environment() -> dict[str, str]:
    """What trainer.Dockerfile sets, with this environment's programs in the place of the image's."""
    words = [rest for keyword, rest in instructions(DOCKER / "trainer.Dockerfile") if keyword == "ENV"][-1].split()
    programs = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    # Else Metaflow forks a process with a client of its own for each of a task's dozen of artifacts.
    return {**dict(word.split("=", 1) for word in words), "PATH": programs, "METAFLOW_S3_WORKER_COUNT": "2"}
