"""What the flow around the work costs: useful over all seconds of a long run, extrapolated from a short one.

    python -m benchmarks.flow_overhead [--run FOLDER] [--steps N] [--steps-per-iteration N] [--steps-per-save N]

Without --run it runs the default task for three iterations. Useful are the seconds of rollouts, scoring, updates and
validations. The rest is what an iteration starts and ends with (a Metaflow task, the reward server, a worker, its
model), each checkpoint, and what a step leaves besides (files); all are measured for each iteration and give a ratio
each. What comes before the first step, its validation too, and after the last is counted once, as lost.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import DataError
from alignment.run_folder import RunFolder
from benchmarks.results import Result, record, result, shown

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python -m benchmarks.flow_overhead"
RUN = "loop.max_steps=12"
"""Three iterations of the preset; how often it validates and saves is its own."""
STEPS, STEPS_PER_ITERATION, STEPS_PER_SAVE = 1000, 100, 25
"""The preset is short: four steps to an iteration and to a checkpoint. A long run has no reason to: this one saves
every ten minutes and starts its workers anew every forty."""

OTHER_RUN = "an iteration of this run was interrupted, or written by an older version: name another"


@dataclass(frozen=True)
class Pace:
    """A run of `steps`, so many of them to an iteration and to a checkpoint."""

    steps: int
    per_iteration: int
    per_save: int


@dataclass(frozen=True)
class Iteration:
    """An iteration's seconds: `work` of its `steps`, `validating`, `starting` before the first, `saving` its
    `checkpoints`, `ending` after the last of them, `seconds` in all."""

    steps: int
    work: float
    validating: float
    starting: float
    saving: float
    checkpoints: int
    ending: float
    seconds: float

    def share(self, pace: Pace, *, validation: float, between: float, around: float) -> float:
        """Useful over all seconds of a run whose steps, checkpoints and iterations cost what these did.

        `validation` are the seconds of validations per step, `between` those from one iteration's end to the next
        one's start, `around` those of the run outside its iterations.
        """
        useful = (self.work / self.steps + validation) * pace.steps
        known = self.starting + self.work + self.validating + self.saving + self.ending
        beside = (self.seconds - known) / self.steps * pace.steps
        saving = self.saving / self.checkpoints * pace.steps / pace.per_save
        iterations = (self.starting + self.ending + between) * pace.steps / pace.per_iteration
        return useful / (useful + beside + saving + iterations + around)


def iterations(metrics: Sequence[Mapping[str, Any]]) -> list[Iteration]:
    """The iterations that metrics.jsonl tells of; in phases no checkpoint is told apart. Raises DataError."""
    found: list[Iteration] = []
    steps, work, validating = 0, 0.0, 0.0
    for entry in metrics:
        if entry["kind"] == "step":
            steps, work = steps + 1, work + sum(entry["seconds"].values())
        elif entry["kind"] == "validation":
            validating += entry["seconds"]
        elif entry["kind"] == "task" and entry["name"] == "iterate":
            if "starting" not in entry or not steps:
                raise DataError(OTHER_RUN)
            parts = {key: entry.get(key, 0) for key in ("starting", "saving", "checkpoints", "ending", "seconds")}
            found.append(Iteration(steps, work, validating, **parts))
            steps, work, validating = 0, 0.0, 0.0
    return found


def overhead(run: RunFolder, pace: Pace) -> Result:
    """The result of a finished run. Raises DataError."""
    if not run.report_json.exists():
        raise DataError(f"--run ({run.path}): holds no report.json, so it is no finished run: name another, or none")
    metrics, report = run.read_metrics(), json.loads(run.report_json.read_text())
    measured, config = iterations(metrics), json.loads(run.config.read_text())
    if not all(one.checkpoints for one in measured):
        raise DataError(OTHER_RUN)
    tasks = [entry for entry in metrics if entry["kind"] == "task"]
    validations = {entry["step"]: entry["seconds"] for entry in metrics if entry["kind"] == "validation"}
    before_step_1 = validations.pop(0, 0.0)
    # Starting a task is not in any task's own seconds; each costs the same.
    between = (report["seconds"]["total"] - sum(t["seconds"] for t in tasks)) / len(tasks)
    costs = {
        "validation": sum(validations.values()) / sum(one.steps for one in measured),
        "between": between,
        "around": before_step_1 + sum(t["seconds"] + between for t in tasks if t["name"] != "iterate"),
    }
    loop = config["loop"]
    own = Pace(pace.steps, loop["steps_per_iteration"], loop["save_interval"])
    shares, as_here = ([one.share(each, **costs) for one in measured] for each in (pace, own))
    one = measured[-1]
    against = (
        f"a run of {pace.steps} RS steps, {pace.per_iteration} an iteration and {pace.per_save} a checkpoint, each as "
        f"long as here: {one.work / one.steps:.1f} s of work; {one.starting:.1f} s to start an iteration, "
        f"{one.ending:.1f} s to end it, {between:.1f} s between; {one.saving / one.checkpoints:.1f} s a checkpoint; "
        f"with {own.per_iteration} an iteration and {own.per_save} a checkpoint, as here, "
        f"{statistics.median(as_here):.3f}"
    )
    return result("flow_overhead", shares, target=0.97, against=against, command=COMMAND)


def main() -> int:
    """Measure, record, print; 1 where it could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run of this version; without it one is made")
    parser.add_argument("--steps", type=int, default=STEPS, help="RS steps of the long run")
    parser.add_argument("--steps-per-iteration", type=int, default=STEPS_PER_ITERATION)
    parser.add_argument("--steps-per-save", type=int, default=STEPS_PER_SAVE)
    options = parser.parse_args()
    return shown(lambda: measured(options))


def measured(options: argparse.Namespace) -> list[Result]:
    """The result, recorded. Raises DataError."""
    with tempfile.TemporaryDirectory(prefix="flow-overhead-") as scratch:
        run = RunFolder(options.run or _run(Path(scratch)))
        made = [overhead(run, Pace(options.steps, options.steps_per_iteration, options.steps_per_save))]
    record(made)
    return made


def _run(root: Path) -> Path:
    sets = [word for override in (RUN, f"run.root={root}") for word in ("--set", override)]
    if subprocess.run([sys.executable, str(ROOT / "flows" / "rs_flow.py"), *sets, "run"]).returncode:
        raise DataError("the run failed, its message is above; nothing was measured")
    return (root / "latest").resolve()


if __name__ == "__main__":
    sys.exit(main())
