"""Pods as processes of this machine, for the stand-in for Kubernetes.

As in a container: the environment is the image's and the manifest's alone, secrets come by reference, the end of the
first process is the end of all, and a pod that is ended gets no time. Not as there: no image, no cgroup, no GPU, the
files of this machine, and the names of services are loopback.
"""

import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Manifest = dict[str, Any]
POD = "METAFLOW_KUBERNETES_POD_NAME"
"""Environment variable by which all processes of a pod are known: Metaflow has every pod get it."""
OTHER_FIELDS = {"status.hostIP": "127.0.0.1", "spec.nodeName": "this-machine"}
SERVICE = r"[\w.-]+\.svc\.cluster\.local"


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Pod:
    """A pod from its start to its end; `changed` is called after each change of its status."""

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        environment: Mapping[str, str],
        secrets: Mapping[str, Mapping[str, str]],
        changed: Callable[[], None],
    ) -> None:
        self.manifest, self.log = manifest, folder / "log"
        self._folder, self._image_environment, self._secrets, self._changed = folder, environment, secrets, changed
        self._ended_as: tuple[str, str] | None = None
        self._thread = threading.Thread(target=self._live, daemon=True)

    @property
    def name(self) -> str:
        return self.manifest["metadata"]["name"]

    @property
    def step(self) -> str:
        """The Metaflow step whose task it is."""
        return self.manifest["metadata"]["annotations"]["metaflow/step_name"]

    @property
    def phase(self) -> str:
        return self.manifest["status"]["phase"]

    def start(self) -> None:
        """Start its process, unless the container lacks something: then it waits, as the kubelet has it, for good."""
        lacking = self._lacking(self.manifest["spec"]["containers"][0])
        if lacking:
            self._told("Pending", {"waiting": {"reason": "CreateContainerConfigError", "message": lacking}})
        else:
            self._thread.start()

    def end(self, reason: str, message: str) -> None:
        """End it at once, as an eviction or a limit of time does."""
        if self.phase in ("Succeeded", "Failed"):
            return
        self._ended_as = (reason, message)
        self.kill()
        if not self._thread.is_alive():
            self._told("Failed", reason=reason, message=message)

    def kill(self) -> None:
        """Kill all its processes, whatever groups and sessions they have made."""
        while pids := self.processes():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)

    def processes(self) -> list[int]:
        """Pids of its live processes."""
        mark, found = f"{POD}={self.name}".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if mark in (entry / "environ").read_bytes().split(b"\0") and _is_alive(entry):
                        found.append(int(entry.name))
                except OSError:  # it has ended meanwhile
                    continue
        return found

    def _live(self) -> None:
        container = self.manifest["spec"]["containers"][0]
        home = self._folder / "home"
        home.mkdir(parents=True)
        begun = now()
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [*container["command"], *container.get("args", [])], cwd=home, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True, env=self._environment(container, home),
            )  # fmt: skip
        self._told("Running", {"running": {"startedAt": begun}})
        timer = self._limit()
        if self._ended_as:  # before there was a process to kill
            self.kill()
        status = process.wait()
        timer.cancel()
        self.kill()
        if self._ended_as:
            self._told("Failed", reason=self._ended_as[0], message=self._ended_as[1])
            return
        code = status if status >= 0 else 128 - status
        end = {"exitCode": code, "reason": "Error" if code else "Completed", "startedAt": begun, "finishedAt": now()}
        self._told("Failed" if code else "Succeeded", {"terminated": end})

    def _limit(self) -> threading.Timer:
        seconds = self.manifest["spec"].get("activeDeadlineSeconds", 10**6)
        message = "Pod was active on the node longer than the specified deadline"
        timer = threading.Timer(seconds, self.end, ("DeadlineExceeded", message))
        timer.daemon = True
        timer.start()
        return timer

    def _lacking(self, container: Manifest) -> str:
        """What keeps the container from being created; "" where all is there."""
        for source in container.get("envFrom", []):
            if source["secretRef"]["name"] not in self._secrets:
                return f'secret "{source["secretRef"]["name"]}" not found'
        for mount in container.get("volumeMounts", []):
            if not Path(mount["mountPath"]).is_dir():
                return f"nothing is mounted at {mount['mountPath']} of this machine"
        return ""

    def _environment(self, container: Manifest, home: Path) -> dict[str, str]:
        found = {**self._image_environment, "HOME": str(home)}
        for source in container.get("envFrom", []):
            found.update(self._secrets[source["secretRef"]["name"]])
        for one in container.get("env", []):
            value = one["value"] if "value" in one else self._field(one["valueFrom"]["fieldRef"]["fieldPath"])
            found[one["name"]] = re.sub(SERVICE, "127.0.0.1", value)
        return found

    def _field(self, path: str) -> str:
        """A field of the pod by the downward API's name: metadata.uid, metadata.annotations['key']."""
        if path in OTHER_FIELDS:
            return OTHER_FIELDS[path]
        key = re.fullmatch(r"(metadata)\.(annotations|labels)\['(.+)'\]", path)
        value: Any = self.manifest
        for name in key.groups() if key else path.split("."):
            value = value.get(name, "")
        return value

    def _told(self, phase: str, state: Manifest | None = None, **others: str) -> None:
        container = self.manifest["spec"]["containers"][0]
        own = {"name": container["name"], "image": container["image"], "imageID": "", "restartCount": 0}
        statuses = [{**own, "ready": phase == "Running", "state": state}] if state else None
        self.manifest["status"] = {"phase": phase, "startTime": now(), **others}
        if statuses:
            self.manifest["status"]["containerStatuses"] = statuses
        self._changed()


def new_pod(name: str, namespace: str, template: Manifest, **labels: str) -> Manifest:
    """The manifest of a pod that a template makes; labels are annotations too, as JobSet has them."""
    given = template.get("metadata", {})
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": str(uuid.uuid4()),
            "creationTimestamp": now(),
            "labels": {**given.get("labels", {}), **labels},
            "annotations": {**given.get("annotations", {}), **labels},
        },
        "spec": template["spec"],
        "status": {"phase": "Pending"},
    }


def _is_alive(entry: Path) -> bool:
    """Whether a process of /proc is more than a status that nobody has asked for yet."""
    return (entry / "stat").read_text().rpartition(") ")[2][0] not in "ZX"
