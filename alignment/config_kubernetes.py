"""The config of runs on Kubernetes: what the pod of each task is, beside the GPUs, cores and memory of `resources`.

What is left empty here is as Metaflow's own METAFLOW_KUBERNETES_* settings have it. Secrets are named, never held.
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from alignment.config_sections import Section

if TYPE_CHECKING:
    from alignment.config import Config

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
"""What Kubernetes takes for the name of an object."""
Path = Annotated[str, Field(pattern=r"^/[^\s:]+$")]


class KubernetesSection(Section):
    image: Annotated[str, Field(min_length=1)] | None = None
    """Image of the pods, with an exact tag or digest: with one, every task of a flow is a pod; null: none is."""
    namespace: Name | None = None
    """Namespace of the pods; null: METAFLOW_KUBERNETES_NAMESPACE, else `default`."""
    service_account: Name | None = None
    """Service account of the pods; the disaggregated executor starts pods from a pod, and must have one that may."""
    secrets: tuple[Name, ...] = ()
    """Secrets whose keys become environment variables of every task: those of S3, WANDB_API_KEY."""
    image_pull_secrets: tuple[Name, ...] = ()
    """Secrets with which nodes fetch the image."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that tasks may run on."""
    gpu_node_selector: dict[str, str] = Field(default_factory=dict)
    """Further labels of those that tasks with GPUs may run on."""
    tolerations: tuple[dict[Literal["key", "operator", "value", "effect"], str], ...] = ()
    """Taints of nodes that tasks put up with."""
    shared_memory: int | None = Field(None, ge=1)
    """MiB of /dev/shm, which NCCL and Triton use; it counts as memory of the pod. Null: the container's own 64."""
    disk: int = Field(10240, ge=1)
    """MB of the node's disk: the copies of runs and models (run.workspace, RS_CACHE), where these are on no volume."""
    volume_claims: dict[Name, Path] = Field(default_factory=dict)
    """Persistent volume claims, each with the folder where tasks see it: a run.root that all nodes share."""
    retries: int = Field(2, ge=0, le=4)
    """Times that a task is repeated, at once, after its pod was evicted, preempted or failed. Phases of the
    disaggregated executor have phases.<phase>.retries."""

    def pod(self, gpus: int) -> dict[str, Any]:
        """What Metaflow's @kubernetes is told of a task with that many GPUs; what is empty is left out."""
        asked = {
            "image": self.image,
            "namespace": self.namespace,
            "service_account": self.service_account,
            "secrets": list(self.secrets),
            "image_pull_secrets": list(self.image_pull_secrets),
            "node_selector": {**self.node_selector, **(self.gpu_node_selector if gpus else {})},
            "tolerations": [dict(one) for one in self.tolerations],
            "shared_memory": self.shared_memory,
            "disk": self.disk,
            "persistent_volume_claims": self.volume_claims,
        }
        return {name: value for name, value in asked.items() if value}

    def check(self, places: Mapping[str, str | None]) -> None:
        """Raise ValueError where a task would lack something; `places` are what all tasks share, by config key."""
        if self.image is None:
            self._check_unused()
            return
        if not re.search(r"(:[\w.-]+|@sha256:[0-9a-f]{64})$", self.image) or self.image.endswith(":latest"):
            raise ValueError(
                f"kubernetes.image ({self.image}) must end with an exact tag or digest, so that all tasks have "
                "the same: name:0.1.0, say"
            )
        for key, place in places.items():
            if place is not None and not place.startswith("s3://") and not self._on_a_volume(place):
                raise ValueError(
                    f"{key} ({place}) must be seen by all tasks, which kubernetes.image makes pods: set it to a prefix "
                    "s3://…, or to a folder in one of kubernetes.volume_claims"
                )

    def _check_unused(self) -> None:
        unset = KubernetesSection()
        for name in type(self).model_fields:
            if getattr(self, name) != getattr(unset, name):
                raise ValueError(
                    f"kubernetes.{name} ({getattr(self, name)}) is of pods, and kubernetes.image is null, so that no "
                    "task is one: set kubernetes.image, or leave it out"
                )

    def _on_a_volume(self, place: str) -> bool:
        return any(PurePosixPath(place).is_relative_to(mount) for mount in self.volume_claims.values())


def check_kubernetes(config: "Config") -> None:
    """Raise ValueError where `kubernetes` does not go with the rest."""
    own = config.kubernetes
    if own.image and config.phases.run_with:
        raise ValueError(
            f"phases.run_with ({', '.join(config.phases.run_with)}) and kubernetes.image ({own.image}) both say where "
            "phases run: leave one of them out"
        )
    own.check({"run.root": config.run.root, "reward.repository": config.reward.repository})
    if own.image and config.loop.executor == "disaggregated" and own.service_account is None:
        raise ValueError(
            "kubernetes.service_account (null) with loop.executor=disaggregated: the pod of an RS step starts the pods "
            "of its phases, as an account that may. Set it (infra/kubernetes/components/runs makes alignment-runs), or "
            "loop.executor=colocated"
        )
