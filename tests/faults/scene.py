"""Where a campaign happens: a folder of its own, the run in it, and the processes that work there, by their role."""

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alignment.run_folder import RunFolder
from flow_runs import Place
from models.checkpoints import finished

STEPS = 8
SETTINGS = (
    *("rollouts.num_rollout_samples=8", "rollouts.max_new_tokens=96", "training.global_batch_size=8"),
    *(f"loop.max_steps={STEPS}", f"loop.steps_per_iteration={STEPS}", "loop.save_interval=2"),
    *("loop.val_check_interval=4", "loop.keep_last=3", "loop.stop_grace_s=30", "evaluation.num_prompts=4"),
    *("wandb.mode=disabled", "reward.timeout_s=10"),
)
"""Of every run: steps of about a second, checkpoints at 2, 4, 6 and 8, validations at 4 and 8."""
GONE_S = 120.0
"""Longer than workers take to save after their owner's end, Triton to end, and a busy machine to notice."""


@dataclass
class Scene:
    """A campaign's folder, in which all of its processes work, and the run that is under way there.

    `root` is where the run's folder is made; `remote` its URI under s3:// where it lives there.
    """

    path: Path
    name: str
    root: Path
    settings: tuple[str, ...] = SETTINGS
    environment: dict[str, str] = field(default_factory=dict)
    remote: str | None = None

    @property
    def run(self) -> RunFolder:
        """The run's folder on this machine, a flow's by its link."""
        folder = self.root / self.name
        return RunFolder(folder if folder.exists() else (self.root / "latest").resolve())

    def processes(self, role: str) -> list[int]:
        """Pids of the processes here that play a role, or of all."""
        return sorted(pid for pid in Place(self.path).processes() if role in ("all processes", role_of(pid)))

    def signal(self, role: str, number: int) -> list[int]:
        """Send a signal to those processes; returns the pids that were there to get it."""
        reached = []
        for pid in self.processes(role):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                reached.append(pid)
        return reached

    def is_quiet(self, wait_s: float = GONE_S) -> bool:
        """Whether no process is left here after that long: nothing may outlive its owner."""
        deadline = time.monotonic() + wait_s
        while self.processes("all processes"):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def clear(self) -> None:
        """End what is left, stopped processes too."""
        self.signal("all processes", signal.SIGKILL)

    def steps(self) -> int:
        """RS steps that are recorded."""
        with contextlib.suppress(OSError):
            return self.run.metrics.read_bytes().count(b'"kind": "step"')
        return 0

    def saving(self) -> Sequence[str]:
        """Names of checkpoints that are finished or being written."""
        checkpoints = self.run.checkpoints
        return [p.name for p in (*finished(checkpoints), *checkpoints.glob(".step-*.partial"))]


def role_of(pid: int) -> str:
    """What a process is to its run, by its command line; "" for others and those that have ended."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    for role, sign in SIGNS.items():
        if any(word == sign or word.endswith(f"/{sign}") for word in words):
            return _in_flow(words) if role == "flow" else role
    return ""


def _in_flow(words: Sequence[str]) -> str:
    return "task" if "step" in words else "metaflow" if {"run", "resume"} & set(words) else ""


SIGNS = {
    "owner": "faults.owner",
    "launcher": "alignment.one_node",
    "worker": "alignment.worker",
    "reward worker": "alignment.reward_worker",
    "supervisor": "infra.triton",
    "tritonserver": "tritonserver",
    "stub": "triton_python_backend_stub",
    "flow": "rs_flow.py",
}
"""A word of each role's command line; the first role that fits is meant, since a launcher names its worker's module."""
