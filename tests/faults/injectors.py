"""Faults of processes and of the clock, and the wait for their moment."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.plan import ALL, Fault, Moment
from faults.scene import STEPS, Scene
from flow_runs import ROOT

POLL_S = 0.03
APPEARS_S = 60.0
"""How long a victim may take to appear after the fault's moment: a server that has just been killed starts again."""


@dataclass(frozen=True)
class Mark:
    """What a run had when a command was started or a fault done: moments count from here."""

    at: float
    steps: int
    saving: frozenset[str]
    requests: int


def mark(scene: Scene, requests: int = 0) -> Mark:
    """The scene as it is now; `requests` went to S3 so far."""
    return Mark(time.monotonic(), scene.steps(), frozenset(scene.saving()), requests)


def is_due(moment: Moment, scene: Scene, since: Mark, requests: Callable[[], int]) -> bool:
    """Whether the event of a moment has come, its delay apart."""
    match moment.event:
        case "begun":
            return True
        case "step":
            return scene.steps() not in (0, since.steps)  # fewer, where the run has gone back to its checkpoint
        case "checkpoint":
            return bool(set(scene.saving()) - since.saving)
        case "evaluating":
            return (scene.run.checkpoints / f"step-{STEPS:06d}" / "DONE").exists()
        case "requests":
            return requests() >= since.requests + moment.count


def wait_for_moment(
    moment: Moment, scene: Scene, since: Mark, alive: Callable[[], bool], requests: Callable[[], int] = lambda: 0
) -> bool:
    """Wait for a moment of the running command; false where the command ends before it."""
    while not is_due(moment, scene, since, requests):
        if not alive():
            return False
        time.sleep(POLL_S)
    due = time.monotonic() if moment.event != "begun" else since.at
    while time.monotonic() < due + moment.delay_s:
        if not alive():
            return False
        time.sleep(POLL_S)
    return alive()


def strike(fault: Fault, scene: Scene, alive: Callable[[], bool]) -> str:
    """Send the fault's signals; returns what was done, "" where its victim did not appear before the command ended."""
    deadline = time.monotonic() + APPEARS_S
    while not scene.processes(fault.target):
        if not alive() or time.monotonic() > deadline:
            return ""
        time.sleep(POLL_S)
    if fault.how == "SIGSTOP, then SIGCONT":
        pids = scene.signal(fault.target, signal.SIGSTOP)
        time.sleep(fault.size)
        scene.signal(fault.target, signal.SIGCONT)
    else:
        pids = scene.signal(fault.target, SIGNALS[fault.how])
    return f"{fault.how} {fault.target} {'' if fault.target == ALL else pids}".strip() if pids else ""


SIGNALS = {
    "kill -9": signal.SIGKILL,
    "SIGSEGV": signal.SIGSEGV,
    "SIGABRT": signal.SIGABRT,
    "SIGSTOP": signal.SIGSTOP,
}


class ClockStandIn:
    """The wall clock of a scene's Python processes: this machine's own is everybody's (`jumping/sitecustomize.py`)."""

    def __init__(self, folder: Path) -> None:
        self._file, self._lock, self._offset_s = folder / "clock", threading.Lock(), 0
        self._write()

    def environment(self) -> dict[str, str]:
        """What makes Python read this clock."""
        path = os.pathsep.join(map(str, (Path(__file__).parent / "jumping", ROOT, ROOT / "tests")))
        return {"JUMPING_CLOCK": str(self._file), "PYTHONPATH": path}

    def jump(self, hours: float) -> str:
        """Forward or back from where the clock stands."""
        with self._lock:
            self._offset_s += round(hours * 3600)
            self._write()
        return f"the clock jumps by {hours:+.2f} h"

    def _write(self) -> None:
        waiting = self._file.with_suffix(".new")
        waiting.write_text(str(self._offset_s))
        os.replace(waiting, self._file)
