"""Where a run stands: at work, waiting, interrupted, failed or finished. The run's folder tells it, nobody is asked.

A task that works on a run holds the lock `.task.lock` and says in `.task.json` which one it is; workers hold `.lock`.
Locks end with their process, whatever ends it, so a run is at work exactly while somebody holds one. Between two tasks
Metaflow takes some seconds to start the next. Other nodes' locks are seen where the file system passes them on, as NFS
does; of a run under s3:// only the nodes that work on it know.
"""

import contextlib
import fcntl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from alignment.atomic_files import disk_errors, write_json
from alignment.errors import DataError, DiskError, StoppedError
from alignment.foreign_json import parse_object
from alignment.run_folder import RunFolder

NEXT_TASK_S = 120.0
"""How long after a task the next one may take to start before the run counts as interrupted; pods may take longer."""

Word = Literal[
    "running", "between tasks", "interrupted", "failed", "finished", "promoted", "not promoted", "unfinished"
]


@dataclass(frozen=True, slots=True)
class RunState:
    """A word, and what there is to add: the task at work, why the run failed, why it was rolled back."""

    word: Word
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.detail}" if self.detail else self.word


@contextlib.contextmanager
def at_work(run: RunFolder, task: str) -> Iterator[None]:
    """Tells that `task` is at work on the run while the body goes on, and how it ended after it. Raises DiskError."""
    said = run.path / ".task.json"
    with disk_errors(said):
        lock = open(run.path / ".task.lock", "ab")  # noqa: SIM115 closed below, after the body
    with lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # waits for nobody but for somebody who looks
        write_json(said, {"task": task, "ended": None})
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(DiskError):  # what ended the task is worth more
                write_json(said, {"task": task, "ended": _ending(error)})
            raise
        write_json(said, {"task": task, "ended": "well"})


def _ending(error: BaseException) -> str:
    if isinstance(error, StoppedError) or not isinstance(error, Exception):
        return "stopped"  # Ctrl-C and a scheduler's notice among them
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def run_state(run: RunFolder, report: Mapping[str, Any] | None, now: float | None = None) -> RunState:
    """Where a run stands; `report` is its report.json, where it has one, `now` in Unix time. Raises DataError."""
    said = _said(run)
    if _held(run, ".task.lock", fcntl.LOCK_EX):
        return RunState("running", said.get("task", ""))
    if _held(run, ".lock", fcntl.LOCK_SH):  # a worker that outlives its task saves what is done
        return RunState("running", "saving")
    if report is not None:
        return _result(report)
    if not said:
        return RunState("unfinished")
    ended, age = said["ended"], (now or time.time()) - (run.path / ".task.json").stat().st_mtime
    if ended == "well":
        return RunState("between tasks" if age < NEXT_TASK_S else "interrupted", f"after {said['task']}")
    if ended is None or ended == "stopped":
        return RunState("interrupted", f"in {said['task']}")
    return RunState("failed", f"in {said['task']}: {ended}")


def _result(report: Mapping[str, Any]) -> RunState:
    promotion = report.get("promotion")
    if promotion is None:
        return RunState("finished")
    back = promotion.get("rolled_back")
    return RunState(promotion["verdict"], f"rolled back to RS step {back['to_step']}" if back else "")


def _said(run: RunFolder) -> dict[str, Any]:
    """What the last task said; nothing where none has yet, or where it is damaged, since a run needs it for nothing."""
    file = run.path / ".task.json"
    try:
        said = parse_object(file.read_bytes()) if file.is_file() else {}
    except ValueError:
        return {}
    return said if {"task", "ended"} <= said.keys() else {}


def _held(run: RunFolder, name: str, kind: int) -> bool:
    """Whether a process holds the lock. A holder's own try to take it, at the same instant, is done again by it."""
    path = run.path / name
    if not path.exists():
        return False
    try:
        with open(path, "r+b") as file:  # NFS locks only what is open for writing
            fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:  # no right to write it, a disk that is mounted read-only
        raise DataError(
            f"{path} says whether somebody works on the run ({error.strerror}): give yourself the right to open it for "
            "writing, or copy the run's folder"
        ) from error
    return False
