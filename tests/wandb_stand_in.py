"""A stand-in for W&B's server: what a run asks of it, by a reading of the protocol; not the vendor's server.

It keeps the rows of each run's history and the artifacts that came, by sequence and digest. `rows_lost` stands for a
network that fails: the rows of the file stream are refused from then on.
"""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NOBODY: dict[str, Any] = {
    "id": "u",
    "entity": "team",
    "username": "ci",
    "email": "",
    "flags": "{}",
    "teams": {"edges": []},
}


@dataclass
class WandbStandIn:
    """What it was given."""

    port: int = 0
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    manifests: list[dict[str, Any]] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    rows_lost: threading.Event = field(default_factory=threading.Event)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables by which a process finds it."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.port}", "WANDB_API_KEY": "0" * 40}

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any] | None:
        """The data of a GraphQL answer; None for what it does not know."""
        run = given.get("name") or ""
        match operation:
            case "UpsertBucket":
                return {"upsertBucket": {"bucket": self._bucket(given), "inserted": run not in self.rows}}
            case "RunResumeStatus":
                return {"model": {"id": "p", "name": "p", "entity": {"name": "team"}, "bucket": self._resumed(run)}}
            case "Viewer":
                return {"viewer": NOBODY}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": self._url(name)} for name in given["files"]]
                return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
            case "CreateArtifact":
                self.artifacts.append(given.get("input", given))
                sequence = {"id": "sequence", "latestArtifact": None}
                made = {"id": f"artifact-{len(self.artifacts)}", "state": "PENDING", "artifactSequence": sequence}
                return {"createArtifact": {"artifact": made}}
            case "CreateArtifactManifest":
                file = {
                    "id": "f",
                    "name": "wandb_manifest.json",
                    "displayName": "m",
                    "uploadUrl": self._url("manifest"),
                }
                return {
                    "createArtifactManifest": {"artifactManifest": {"id": "m", "file": file | {"uploadHeaders": []}}}
                }
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "d"}}}
            case "UseArtifact":
                self.used.append(given["input"]["artifactID"])
                return {"useArtifact": {"artifact": {"id": given["input"]["artifactID"], "digest": "d"}}}
            case "CreateArtifactFiles":
                edges = [{"node": self._file(one)} for one in given["artifactFiles"]]
                return {"createArtifactFiles": {"files": {"edges": edges}}}
        return None

    def _url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/upload/{name}"

    def _file(self, given: dict[str, Any]) -> dict[str, Any]:
        node = {"id": "f", "name": given["name"], "displayName": given["name"], "storagePath": None}
        node |= {"uploadUrl": self._url(given["name"]), "uploadHeaders": [], "uploadMultipartUrls": None}
        return node | {"artifact": {"id": given.get("artifactID")}}

    def _bucket(self, given: dict[str, Any]) -> dict[str, Any]:
        name, project = (
            given.get("name") or "r",
            {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "team"}},
        )
        rows = self.rows.setdefault(name, [])
        shown = {
            "id": f"run-{name}",
            "name": name,
            "displayName": name,
            "description": None,
            "config": given.get("config"),
        }
        return shown | {"sweepName": None, "historyLineCount": len(rows), "project": project}

    def _resumed(self, run: str) -> dict[str, Any] | None:
        if run not in self.rows:
            return None
        rows = self.rows[run]
        tails = {"historyTail": json.dumps([json.dumps(rows[-1])] if rows else []), "eventsTail": "[]"}
        counts = {"logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0}
        shown = {
            "id": f"run-{run}",
            "name": run,
            "displayName": run,
            "summaryMetrics": "{}",
            "config": "{}",
            "tags": [],
        }
        return {**shown, **tails, **counts, "wandbConfig": '{"t": {}}'}


@contextmanager
def wandb_stand_in() -> Iterator[WandbStandIn]:
    """The stand-in on a port of its own, for the time of the body."""
    held = WandbStandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def reply(self, value: Any, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

        def do_GET(self) -> None:
            self.reply({})

        def do_PUT(self) -> None:
            data = self.body()
            held.uploads.append(self.path.removeprefix("/upload/"))
            if self.path.endswith("manifest"):
                held.manifests.append(json.loads(data))
            self.reply({})

        def do_POST(self) -> None:
            data, stream = self.body(), re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
            if stream and held.rows_lost.is_set():
                self.reply({}, 503)
            elif stream:
                files = json.loads(data).get("files", {})
                lines = files.get("wandb-history.jsonl", {}).get("content", [])
                held.rows.setdefault(stream[1], []).extend(json.loads(line) for line in lines)
                self.reply({"limits": {}})
            elif self.path.startswith("/graphql"):
                asked = json.loads(data)
                found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
                operation = found[1] if found else asked["query"].strip()[:40]
                try:
                    answer = held.answer(operation, asked.get("variables") or {})
                except KeyError as error:
                    operation, answer = f"{operation} without {error}", None
                if answer is None:
                    held.unknown.append(operation)
                self.reply(
                    {"data": answer} if answer else {"data": None, "errors": [{"message": f"unknown {operation}"}]}
                )
            else:
                self.reply({})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    held.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()
