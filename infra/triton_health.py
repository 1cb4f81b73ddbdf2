"""Whether a tritonserver still does its work: its own word is not enough, since it says "ready" for a dead model."""

import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from alignment.errors import RewardServerError
from infra.triton_setup import KEY_HEADER

CANARY_S = 10.0
PULSE_S, HUNG_S, POLICY_HUNG_S = 20.0, 60.0, 600.0
"""Seconds between canaries to a server that is ready, and without an answer to anybody until it is called hung. A
policy may take minutes: it answers nobody before the longest response of a batch is drawn."""


@dataclass(frozen=True)
class IndexEntry:
    """What a server says of one version. `state` is READY, LOADING, UNLOADING, UNAVAILABLE; "" without a config."""

    name: str
    version: str
    state: str
    reason: str

    @property
    def failure(self) -> str:
        """Why it cannot be served; "" where it can, or was let go in order."""
        if self.state != "UNAVAILABLE" or self.reason in ("", "unloaded"):
            return ""
        return f"{self.name} version {self.version} cannot be served ({self.reason.splitlines()[0]})"

    @property
    def process_died(self) -> bool:
        """Whether it failed because its process was lost, which says nothing of the version."""
        return bool(self.failure) and ("not healthy" in self.reason or "Stub process" in self.reason)


def model_index(url: str, key: str) -> list[IndexEntry] | None:
    """All versions that the server knows of; None while it does not say. `key` opens its management protocols."""
    import tritonclient.grpc as triton

    if not _listens(url):
        return None
    try:
        with triton.InferenceServerClient(url) as client:
            index: Any = client.get_model_repository_index(headers={KEY_HEADER: key}, client_timeout=CANARY_S)
    except triton.InferenceServerException:
        return None
    return [IndexEntry(m.name, m.version, m.state, m.reason) for m in index.models]


def loading_failure(url: str, key: str, models: list[str]) -> str:
    """Why a model could not be loaded where a new start may mend it: its process was lost. "" while there is nothing.

    Raises RewardServerError, with Triton's own words if it has any, where a new start would fail as well.
    """
    index = model_index(url, key)
    # It loads all models before it listens.
    if index is None:
        return ""
    failed = [entry for entry in index if entry.failure]
    if failed:
        reason = "; ".join(entry.failure for entry in failed)
        if all(entry.process_died for entry in failed):
            return reason
        raise RewardServerError(reason)
    unread = sorted(set(models) - {entry.name for entry in index if entry.state})
    if unread:
        raise RewardServerError(
            f"{', '.join(unread)} cannot be served: tritonserver cannot read its config.pbtxt (its log says where); "
            "mend it, or delete it and export again"
        )
    return ""


def ready_versions(url: str, key: str) -> list[tuple[str, str]]:
    """Name and version of all that the server calls ready, in order; none while it does not say."""
    ready = [(entry.name, entry.version) for entry in model_index(url, key) or [] if entry.state == "READY"]
    return sorted(ready, key=lambda entry: (entry[0], int(entry[1])))


def feel_pulse(url: str, model: str, hung: list[str], ended: threading.Event) -> None:
    """Say in `hung` when a model has answered nobody for `HUNG_S`, a policy for `POLICY_HUNG_S`.

    A queue that is long or full is no reason: then others are answered, and the count of executions grows.
    """
    longest = POLICY_HUNG_S if _takes_prompts(url, model) else HUNG_S
    count, lived = _executions(url, model), monotonic()
    while not ended.wait(PULSE_S):
        answered, latest = responds(url, model, longest), _executions(url, model)
        if answered or latest not in (None, count):
            lived = monotonic()
        count = count if latest is None else latest
        if monotonic() - lived >= longest and not ended.is_set():
            hung.append(f"{model} has answered nobody for {longest:g} s")
            return


def _executions(url: str, model: str) -> int | None:
    """How often a model has been executed; None where the server does not say."""
    import tritonclient.grpc as triton

    try:
        with triton.InferenceServerClient(url) as client:
            statistics = client.get_inference_statistics(model, client_timeout=CANARY_S)
    except triton.InferenceServerException:
        return None
    return sum(int(one.execution_count) for one in statistics.model_stats)


def answers(url: str, model: str, wait_s: float, version: str = "") -> bool:
    """Whether the model answers a canary conversation within `wait_s`. Raises RewardServerError if it never will."""
    if not _listens(url):
        return False
    from alignment.scoring import RewardClient

    is_policy = _takes_prompts(url, model)
    if is_policy is None:
        return False
    if is_policy:
        return _answers_a_prompt(url, model, wait_s, version)
    with RewardClient(url, model, version) as client:
        return client.probe(wait_s) is None


def _takes_prompts(url: str, model: str) -> bool | None:
    """Whether it is a policy; None while the server does not say."""
    import tritonclient.grpc as triton

    try:
        with triton.InferenceServerClient(url) as client:
            metadata: Any = client.get_model_metadata(model, client_timeout=CANARY_S)
    except triton.InferenceServerException:
        return None
    return any(one.name == "prompt" for one in metadata.inputs)


def _answers_a_prompt(url: str, model: str, wait_s: float, version: str) -> bool:
    """Whether a policy answers with one token. Raises RewardServerError where it refuses that."""
    import numpy as np
    import tritonclient.grpc as triton

    inputs = [triton.InferInput("prompt", [1, 1], "BYTES"), triton.InferInput("max_new_tokens", [1, 1], "INT32")]
    inputs[0].set_data_from_numpy(np.array([[b"canary"]], dtype=np.object_))
    inputs[1].set_data_from_numpy(np.array([[1]], dtype=np.int32))
    try:
        with triton.InferenceServerClient(url) as client:
            client.infer(model, inputs, model_version=version, client_timeout=wait_s)
    except triton.InferenceServerException as error:
        if error.status() == "StatusCode.INVALID_ARGUMENT":
            raise RewardServerError(
                f"{model} at {url} cannot answer a plain prompt ({error.message()}): export it again"
            ) from error
        return False
    return True


def responds(url: str, model: str, wait_s: float, version: str = "") -> bool:
    """Whether the model says anything to a canary conversation within `wait_s`: a refusal is an answer, too."""
    try:
        return answers(url, model, wait_s, version)
    except RewardServerError:
        return True


def _listens(url: str) -> bool:
    host, _, port = url.rpartition(":")
    with socket.socket() as s:
        s.settimeout(1.0)
        return s.connect_ex((host, int(port))) == 0


def living_children(pid: int) -> set[int]:
    """Child processes that are no zombies; tritonserver's are the model's processes."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The command name in brackets may hold blanks.
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it ended while we looked
        if int(parent) == pid and state != "Z":
            found.add(int(stat.parent.name))
    return found
