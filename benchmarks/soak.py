"""A long run watched from outside: memory, open files, /dev/shm and disk should be as flat at its end as at its start.

    python -m benchmarks.soak [--steps N] [--steps-per-iteration N] [--seconds-apart S]

The smoke preset, a tiny model, with many RS steps. Looks come from /proc, of the flow and all that it started. Disk is
told apart: what a run keeps for good (rollouts, metrics, manifests, W&B's files, logs) grows with the steps, the
rest is not to. The looks go to benchmarks/results/soak.json, the plot to soak.svg beside it.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

from alignment.atomic_files import write_json, write_text
from alignment.errors import DataError
from alignment.run_folder import RunFolder
from benchmarks.plot import line_chart
from benchmarks.results import LATEST

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path("/dev/shm")
KEPT_FOR_GOOD = ("rollouts", "metrics.jsonl", "lineage", "wandb", "logs")
"""Names, of a file or of a folder above it, of what grows with a run by its purpose."""
SHARE = 0.2
"""Of a run's steps: the means over so many after the first tenth, which warms up, and over the last are compared."""
FLAT = ("memory_mb", "open_files", "shared_memory_mb", "other_disk_mb")


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a run that has done `steps`; MB are 10^6 bytes.

    `memory_mb` counts what processes share by each one's part (PSS). `shared_memory_mb` are the files in /dev/shm that
    any process of the run has had open and that are still there.
    """

    seconds: float
    steps: int
    processes: int
    memory_mb: float
    open_files: int
    shared_memory_mb: float
    kept_mb: float
    other_disk_mb: float


@dataclass
class Watch:
    """Looks at the processes below `pid` and the files below `root`."""

    pid: int
    root: Path
    begun: float = field(default_factory=time.monotonic)
    shared: set[Path] = field(default_factory=set)
    """All files in /dev/shm that the run has had."""

    def look(self) -> Look:
        """One look, now; numbers of 0 where the run has ended."""
        import psutil

        memory, open_files, count = 0.0, 0, 0
        for process in _family(self.pid):
            try:
                memory += process.memory_full_info().pss / 1e6
                open_files += process.num_fds()
                self.shared |= _mapped(process.pid)
                count += 1
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):  # it ended since it was listed
                continue
        kept, other = _disk(self.root)
        return Look(
            time.monotonic() - self.begun, _steps(self.root), count, memory, open_files, self._left() / 1e6, kept, other
        )

    def _left(self) -> int:
        return sum(size for path in self.shared if (size := _size(path)) is not None)


def growth(looks: Sequence[Look]) -> dict[str, tuple[float, float]]:
    """Each number's mean in an early and in the last part of a run, by name.

    Raises DataError where there are too few looks to say.
    """
    last = max((one.steps for one in looks), default=0)
    running = [one for one in looks if one.processes]
    early = [one for one in running if 0.1 * last <= one.steps <= (0.1 + SHARE) * last]
    late = [one for one in running if one.steps >= (1 - SHARE) * last]
    if min(len(early), len(late)) < 3:
        raise DataError(f"{len(looks)} looks are too few to tell growth: more --steps, or fewer --seconds-apart")
    return {name: tuple(mean(getattr(one, name) for one in part) for part in (early, late)) for name in FLAT}  # type: ignore[misc]


def _family(pid: int) -> list:  # type: ignore[type-arg]
    import psutil

    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _mapped(pid: int) -> set[Path]:
    """Files in /dev/shm that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    names = {line.split(maxsplit=5)[-1] for line in lines if f"{SHARED}/" in line}
    return {Path(name) for name in names if not name.endswith("(deleted)")}


def _disk(root: Path) -> tuple[float, float]:
    """MB on disk of what a run keeps for good under `root`, and of the rest."""
    kept = other = 0
    for path in root.rglob("*"):
        if path.is_symlink() or path.is_dir() or (size := _size(path)) is None:
            continue
        if any(part in KEPT_FOR_GOOD for part in path.relative_to(root).parts):
            kept += size
        else:
            other += size
    return kept / 1e6, other / 1e6


def _size(path: Path) -> int | None:
    """Bytes that a file takes up; None for one that is not there any more."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return None


def _steps(root: Path) -> int:
    return max((r["step"] for r in RunFolder(root / "latest").read_metrics() if r["kind"] == "step"), default=0)


def main() -> int:
    """Run, watch, draw; the flow's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="RS steps")
    parser.add_argument("--steps-per-iteration", type=int, default=200)
    parser.add_argument("--seconds-apart", type=float, default=5.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        settings = {
            "run.root": f"{scratch}/runs",
            "loop.max_steps": options.steps,
            "loop.steps_per_iteration": options.steps_per_iteration,
            "loop.save_interval": 50,
            "loop.val_check_interval": 100,
        }
        chosen = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        command = [sys.executable, "flows/rs_flow.py", "--config", "config", "configs/smoke.yaml", *chosen, "run"]
        flow = subprocess.Popen(command, cwd=ROOT)
        watch, looks = Watch(flow.pid, Path(scratch) / "runs"), []
        while flow.poll() is None:
            looks.append(watch.look())
            write_json(LATEST.with_name("soak.json"), [asdict(one) for one in looks])
            time.sleep(options.seconds_apart)
        left = watch.look()
    if flow.returncode == 0:
        show(looks, left)
    return flow.returncode


def show(looks: Sequence[Look], left: Look) -> None:
    """Write the plot and print the growth; `left` is the look after the run's end."""
    every = max(1, len(looks) // 200)
    named = {**{name.replace("_", " "): name for name in FLAT}, "kept for good, MB": "kept_mb"}
    lines = {
        name.replace(" mb", ", MB"): [(one.steps, float(getattr(one, key))) for one in looks[::every] if one.steps]
        for name, key in named.items()
    }
    title = f"{left.steps} RS steps of the smoke preset"
    write_text(LATEST.with_name("soak.svg"), line_chart(title, "RS step", "MB, or files", lines, logarithmic=False))
    for name, (early, late) in growth(looks).items():
        print(f"{name:18} {early:10.1f} early {late:10.1f} at the end")
    print(f"left behind: {left.processes} processes, {left.shared_memory_mb:.1f} MB in /dev/shm")


if __name__ == "__main__":
    sys.exit(main())
