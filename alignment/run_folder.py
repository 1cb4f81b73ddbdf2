"""The files of a run, `<root>/<run id>/`, written so that a kill at any moment leaves whole files.

    config.json  metrics.jsonl  rollouts/step-000001.parquet  checkpoints/step-*/  report.json  report.html

`metrics.jsonl` grows by one line per record; a line that a killed writer left unfinished is cut off by the
next one that writes. All other files replace their predecessor whole. A record's NaN becomes null (see
`alignment.atomic_files`).
"""

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from alignment.atomic_files import disk_errors, json_text, write_atomically
from alignment.atomic_files import write_json as write_json
from alignment.config import same_config
from alignment.errors import AlignmentError, ConfigError, DataError
from alignment.metrics_file import end_of_records, locked, mend, parse_record
from alignment.rollout_table import read_rows, write_rows
from alignment.types import Decision, ScoredRollout


class Remote(Protocol):
    """Where a run lives whose folder is a copy (see `alignment.workspace`)."""

    @property
    def uri(self) -> str:
        """s3://bucket/prefix/RUN."""

    def send(self) -> None:
        """Send what is new, in the background; raises what the sending before met."""


@dataclass(frozen=True)
class RunFolder:
    """One run's folder. Making the object touches no file."""

    path: Path
    remote: Remote | None = field(default=None, compare=False)
    """Where the run lives, if this folder is a copy."""

    @property
    def uri(self) -> str:
        """What names the run on every node: its folder, or where it lives under s3://."""
        return self.remote.uri if self.remote else str(self.path)

    def uri_of(self, path: Path) -> str:
        """What names a file or folder of the run on every node."""
        return f"{self.uri}/{path.relative_to(self.path)}"

    def local(self, uri: str) -> str:
        """The path of what `uri_of` named; anything else as it is."""
        return str(self.path / uri.removeprefix(f"{self.uri}/")) if uri.startswith(f"{self.uri}/") else uri

    def send(self) -> None:
        """Send what is new to where the run lives, in the background; nothing for a run that lives here."""
        if self.remote:
            self.remote.send()

    @property
    def config(self) -> Path:
        """The resolved config, JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON record per line; its "kind" is "step", "validation", "task" or "rollback"."""
        return self.path / "metrics.jsonl"

    @property
    def prompts(self) -> Path:
        """Folder of the prompt sets, one .jsonl each."""
        return self.path / "prompts"

    @property
    def scorers(self) -> Path:
        """References to the run's reward model and judge, JSON."""
        return self.path / "scorers.json"

    @property
    def lineage(self) -> Path:
        """Folder of the manifests of all checkpoints that the run has had."""
        return self.path / "lineage"

    @property
    def rollouts(self) -> Path:
        """Folder of one parquet file per RS step."""
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step-*` folders."""
        return self.path / "checkpoints"

    @property
    def report_json(self) -> Path:
        """The numbers of the finished run."""
        return self.path / "report.json"

    @property
    def report_html(self) -> Path:
        """The same for people."""
        return self.path / "report.html"

    @property
    def reused(self) -> Path:
        """Folder of the rollouts of another run that this one trains on, where `reuse.rollouts` names one."""
        return self.path / "reused"

    def rollouts_file(self, step: int) -> Path:
        """Where the rollouts of an RS step are kept."""
        return self.rollouts / f"step-{step:06d}.parquet"

    def reused_file(self, step: int) -> Path:
        """Where the rollouts of an RS step are that another run drew, with that run's decisions."""
        return self.reused / f"step-{step:06d}.parquet"

    def write_rollouts(self, step: int, scored: Sequence[ScoredRollout], decisions: Sequence[Decision]) -> Path:
        """Keeps every rollout of an RS step with its reward and decision; a replayed step replaces its file.

        Raises DataError where the decisions do not belong to the rollouts, one each and in order, or where a
        text cannot be stored as UTF-8; DiskError where the file cannot be written.
        """
        path = self.rollouts_file(step)
        write_rows(path, step, scored, decisions)
        return path

    def read_rollouts(self, step: int, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows of an RS step, one dict per rollout in the order written; `columns`: all. Raises DataError."""
        path = self.rollouts_file(step)
        if not path.is_file():
            raise DataError(f"{path} is not there: RS step {step} has not been selected in this run")
        return read_rows(path, columns)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Adds one record to metrics.jsonl and flushes it to disk. Raises DiskError."""
        line = (json_text(record) + "\n").encode()
        with disk_errors(self.metrics), locked(self.metrics), open(self.metrics, "ab+") as file:
            mend(file)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records in the order written; an unfinished last line is left out, no file is no record.

        Raises DataError, naming the line, for any other line that is not a JSON object.
        """
        try:
            data = self.metrics.read_bytes()
        except FileNotFoundError:
            return []
        lines = data[: end_of_records(data)].splitlines()
        return [parse_record(self.metrics, number, line) for number, line in enumerate(lines, start=1)]

    def truncate_metrics(self, after_step: int) -> None:
        """Forgets the "step" and "validation" records beyond RS step `after_step`, and an unfinished last line.

        A run that resumes from the checkpoint of `after_step` calls this before it appends.
        """
        with disk_errors(self.metrics), locked(self.metrics):
            kept = [
                r for r in self.read_metrics() if r.get("kind") not in ("step", "validation") or r["step"] <= after_step
            ]
            text = "".join(json_text(r) + "\n" for r in kept)
            write_atomically(self.metrics, lambda file: file.write(text.encode()))

    def validations(self) -> dict[int, float]:
        """Mean reward of each validation by RS step; 0 is the base's. Those of steps that failed badly are left out."""
        failed = self.failed_step()
        return {
            r["step"]: r["reward_mean"]
            for r in self.read_metrics()
            if r.get("kind") == "validation"
            and isinstance(r.get("reward_mean"), int | float)
            and (failed is None or r["step"] < failed)
        }

    def rollback(self) -> dict[str, Any] | None:
        """The record of why the run's loop ended early (see `alignment.rollback`); None where it did not."""
        return next((r for r in self.read_metrics() if r.get("kind") == "rollback"), None)

    def failed_step(self) -> int | None:
        """The RS step that failed badly and ended the loop; None where none did."""
        record = self.rollback()
        return None if record is None else int(record["step"])

    @contextlib.contextmanager
    def lock(self, wait_s: float = 0.0) -> Iterator[None]:
        """Holds the run for this process; it is free again when the process ends, however it ends.

        Raises AlignmentError, naming the process, where another one still holds it after `wait_s` seconds.
        """
        path = self.path / ".lock"
        with disk_errors(path):
            file = open(path, "a+")  # noqa: SIM115 closed below, after the body
        with file:
            until = time.monotonic() + wait_s
            while not _try_lock(file):
                if time.monotonic() >= until:
                    file.seek(0)
                    raise AlignmentError(
                        f"the run {self.path} is being written by {file.read().strip() or 'another process'}: "
                        "wait until it ends, or stop it, before you resume this run"
                    )
                time.sleep(0.2)
            with disk_errors(path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
            yield


def create(root: str | Path, run_id: str, config_json: str) -> RunFolder:
    """Makes `<root>/<run id>/` with its config.json, and points `<root>/latest` at it.

    Calling it again is harmless: a retried start or a resume finds what is there. A root under s3:// is
    `alignment.workspace`'s. Raises ConfigError for any other root that is no local folder, DataError for a run id that
    is no folder name or another run's, DiskError.
    """
    if "://" in str(root):
        raise ConfigError(f"run.root ({root}) must be a local folder or s3://bucket/prefix")
    check_id(run_id)
    folder = RunFolder(Path(root) / run_id)
    with disk_errors(folder.path):
        for path in (folder.path, folder.checkpoints):
            path.mkdir(parents=True, exist_ok=True)
    if folder.config.exists() and not same_config(folder.config.read_bytes(), config_json.encode()):
        raise DataError(f"{folder.path} holds another run's files: set run.root to another folder, or move them away")
    write_atomically(folder.config, lambda file: file.write(config_json.encode()))
    latest, waiting = Path(root) / "latest", Path(root) / f".latest-{os.getpid()}"
    with disk_errors(latest):
        waiting.unlink(missing_ok=True)
        waiting.symlink_to(run_id)
        waiting.replace(latest)
    return folder


def check_id(run_id: str) -> None:
    """Raise DataError for a run id that cannot name a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run_id) or run_id == "latest":
        raise DataError(f"run id {run_id!r} cannot name a folder: use letters, digits, '.', '_' and '-', not 'latest'")


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
