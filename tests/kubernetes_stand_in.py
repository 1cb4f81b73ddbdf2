"""A stand-in for Kubernetes on loopback: the part of its API that Metaflow's @kubernetes asks, pods as processes.

Jobs and JobSets are checked against Kubernetes' own schema as they come. Their controllers are as small as Metaflow
needs them: a Job is one pod, a JobSet one pod for each replica, control first, and one that fails ends all. There is no
scheduler: every pod starts at once. What a pod is here says pod_processes.py.
"""

import contextlib
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import kubernetes_validate

from pod_processes import Manifest, Pod, new_pod, now

VERSION = "1.29"
JOB_SET = "jobset.sigs.k8s.io/"


class Unanswered(Exception):
    """`status` is the HTTP status of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class KubernetesStandIn:
    """What was posted, and the pods that came of it."""

    def __init__(
        self, folder: Path, image_environment: Mapping[str, str], secrets: Mapping[str, Mapping[str, str]]
    ) -> None:
        self.folder, self.secrets, self.pods = folder, secrets, list[Pod]()
        self.posted: list[Manifest] = []
        self._image_environment = dict(image_environment)
        self._jobs: dict[str, Manifest] = {}
        self._job_sets: dict[str, Manifest] = {}
        self._lock = threading.RLock()

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "kubeconfig.json"

    def of(self, step: str, phase: str | None = None) -> list[Pod]:
        """The pods of a step's tasks, in the order of their start."""
        return [pod for pod in self.pods if pod.step == step and phase in (None, pod.phase)]

    def logs(self) -> str:
        """What the pods wrote, one after the other; for messages of failed tests."""
        return "\n".join(f"--- {p.name} ({p.step})\n{p.log.read_text()[-3000:]}" for p in self.pods if p.log.exists())

    def close(self) -> None:
        for pod in self.pods:
            pod.kill()

    # What the API answers; bodies and answers are Kubernetes' own objects.

    def create_job(self, namespace: str, job: Manifest) -> Manifest:
        kubernetes_validate.validate(job, VERSION, strict=True)
        metadata = job["metadata"]
        name = metadata.setdefault("name", metadata.get("generateName", "") + uuid.uuid4().hex[:5])
        metadata.update(namespace=namespace, uid=str(uuid.uuid4()), creationTimestamp=now())
        job["spec"].setdefault("parallelism", 1)
        job["status"] = {}
        with self._lock:
            self.posted.append(job)
            self._jobs[name] = job
            pod = self._pod(f"{name}-{uuid.uuid4().hex[:5]}", namespace, job["spec"]["template"], {"job-name": name})
            pod.start()
        return job

    def job(self, name: str) -> Manifest:
        if name not in self._jobs:
            raise Unanswered(404, f"there is no job {name}")
        return {**self._jobs[name], "status": self._counts({"job-name": name})}

    def patch_job(self, name: str, change: Manifest) -> Manifest:
        """Its parallelism is all that can be changed: 0 ends and removes its pod."""
        job = self.job(name)
        self._jobs[name]["spec"].update(change["spec"])
        if self._jobs[name]["spec"]["parallelism"] == 0:
            self._remove({"job-name": name})
        return job

    def create_job_set(self, namespace: str, job_set: Manifest) -> Manifest:
        name, parts = job_set["metadata"]["name"], job_set["spec"]["replicatedJobs"]
        for part in parts:
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {}, "spec": part["template"]["spec"]}
            kubernetes_validate.validate(job, VERSION, strict=True)
        job_set["metadata"].update(namespace=namespace, uid=str(uuid.uuid4()), creationTimestamp=now())
        with self._lock:
            self.posted.append(job_set)
            self._job_sets[name] = job_set
            for part in sorted(parts, key=lambda one: one["name"] != "control"):
                for i in range(part["replicas"]):
                    self._replica(name, namespace, part, i).start()
        return self.job_set(name)

    def job_set(self, name: str) -> Manifest:
        if name not in self._job_sets:
            raise Unanswered(404, f"there is no jobset {name}")
        every = {JOB_SET + "jobset-name": name}
        names = [part["name"] for part in self._job_sets[name]["spec"]["replicatedJobs"]]
        counts = [self._counts({**every, JOB_SET + "replicatedjob-name": part}) for part in names]
        parts = [{"name": part, "suspended": 0, **count} for part, count in zip(names, counts, strict=True)]
        failed = any(part["failed"] for part in parts)
        done = all(pod.phase == "Succeeded" for pod in self._labelled(every))
        ended = [{"type": "Failed" if failed else "Completed", "status": "True"}] if failed or done else []
        return {**self._job_sets[name], "status": {"replicatedJobsStatus": parts, "conditions": ended}}

    def delete_job_set(self, name: str) -> Manifest:
        self._job_sets.pop(name, None)
        self._remove({JOB_SET + "jobset-name": name})
        return {"kind": "Status", "status": "Success"}

    def list_pods(self, query: Mapping[str, list[str]]) -> Manifest:
        wanted = dict(one.split("=", 1) for one in query.get("labelSelector", [""])[0].split(",") if one)
        ended = re.findall(r"status\.phase!=(\w+)", query.get("fieldSelector", [""])[0])
        found = [pod.manifest for pod in self._labelled(wanted) if pod.phase not in ended]
        return {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": found}

    def _replica(self, job_set: str, namespace: str, part: Manifest, index: int) -> Pod:
        own = {"jobset-name": job_set, "replicatedjob-name": part["name"], "job-index": str(index)}
        labels = {JOB_SET + key: value for key, value in {**own, "restart-attempt": "0"}.items()}
        name = f"{job_set}-{part['name']}-{index}-0-{uuid.uuid4().hex[:5]}"
        return self._pod(name, namespace, part["template"]["spec"]["template"], labels)

    def _pod(self, name: str, namespace: str, template: Manifest, labels: Mapping[str, str]) -> Pod:
        manifest = new_pod(name, namespace, template, **labels)
        # With a service account also the way to this API, which a real pod finds by its account's token.
        own = {"KUBECONFIG": str(self.kubeconfig)} if manifest["spec"].get("serviceAccountName") else {}
        environment = {**self._image_environment, **own}
        pod = Pod(manifest, self.folder / "pods" / name, environment, self.secrets, self._end_job_sets)
        self.pods.append(pod)
        return pod

    def _end_job_sets(self) -> None:
        """One pod of a JobSet that fails ends the others."""
        for name in list(self._job_sets):
            pods = self._labelled({JOB_SET + "jobset-name": name})
            if any(pod.phase == "Failed" for pod in pods):
                for pod in pods:
                    if pod.phase in ("Pending", "Running"):
                        pod.end("JobSetFailed", "another pod of the JobSet has failed")

    def _labelled(self, labels: Mapping[str, str]) -> list[Pod]:
        return [pod for pod in list(self.pods) if labels.items() <= pod.manifest["metadata"]["labels"].items()]

    def _remove(self, labels: Mapping[str, str]) -> None:
        for pod in self._labelled(labels):
            pod.end("Killed", "its owner was removed")

    def _counts(self, labels: Mapping[str, str]) -> Manifest:
        """How many pods with these labels are active, have succeeded, have failed."""
        phases = [pod.phase for pod in self._labelled(labels)]
        kinds = {"active": ("Pending", "Running"), "succeeded": ("Succeeded",), "failed": ("Failed",)}
        return {kind: sum(phase in those for phase in phases) for kind, those in kinds.items()}


BATCH = r"/apis/batch/v1/namespaces/([^/]+)/jobs"
JOB_SETS = r"/apis/jobset\.x-k8s\.io/v1alpha2/namespaces/([^/]+)/jobsets"
Answer = Callable[[KubernetesStandIn, re.Match[str], Any], Manifest]
ROUTES: list[tuple[str, str, Answer]] = [
    ("POST", BATCH, lambda api, found, body: api.create_job(found[1], body)),
    ("GET", BATCH + "/([^/]+)", lambda api, found, _: api.job(found[2])),
    ("PATCH", BATCH + "/([^/]+)", lambda api, found, body: api.patch_job(found[2], body)),
    ("POST", JOB_SETS, lambda api, found, body: api.create_job_set(found[1], body)),
    ("GET", JOB_SETS + "/([^/]+)", lambda api, found, _: api.job_set(found[2])),
    ("DELETE", JOB_SETS + "/([^/]+)", lambda api, found, _: api.delete_job_set(found[2])),
    ("GET", r"/api/v1/namespaces/[^/]+/pods", lambda api, _, query: api.list_pods(query)),
]
"""What is asked, and what answers. `exec` into a pod is not there: Metaflow then ends the Job or the JobSet."""


def _handler(api: KubernetesStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            parts = urlparse(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            given = json.loads(body) if body else parse_qs(parts.query)
            try:
                status, answer = 200, self._routed(parts.path, given)
            except Unanswered as error:
                status, answer = error.status, _status(error.status, str(error))
            except kubernetes_validate.ValidationError as error:
                status, answer = 422, _status(422, error.message)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _routed(self, path: str, given: Any) -> Manifest:
            for method, pattern, answer in ROUTES:
                if method == self.command and (found := re.fullmatch(pattern, path)):
                    return answer(api, found, given)
            raise Unanswered(404, f"the stand-in knows no {self.command} {path}")

        do_GET = do_POST = do_PATCH = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            """Nothing: the tests look at what was posted."""

    return Handler


def _status(code: int, message: str) -> Manifest:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message}


@contextlib.contextmanager
def kubernetes_stand_in(
    folder: Path, image_environment: Mapping[str, str], secrets: Mapping[str, Mapping[str, str]]
) -> Iterator[KubernetesStandIn]:
    """The stand-in at `KubernetesStandIn.kubeconfig`, with these secrets in its namespaces; its pods end with it."""
    folder.mkdir(parents=True)
    api = KubernetesStandIn(folder, image_environment, secrets)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(api))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster = {"server": f"http://127.0.0.1:{server.server_address[1]}"}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "stand-in", "cluster": cluster}],
        "users": [{"name": "tester", "user": {}}],
        "contexts": [{"name": "stand-in", "context": {"cluster": "stand-in", "user": "tester"}}],
        "current-context": "stand-in",
    }
    api.kubeconfig.write_text(json.dumps(config))
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        api.close()
