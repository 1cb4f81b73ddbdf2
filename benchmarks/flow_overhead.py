"""What the flow around the work costs: useful over all seconds of a long run, extrapolated from a short one.

    python -m benchmarks.flow_overhead [--run FOLDER] [--steps N] [--steps-per-iteration N]

Without --run it runs the default task for three iterations. Useful are the seconds of rollouts, scoring, updates and
validations. The rest is what an iteration starts with (a Metaflow task, the reward server, a worker, its model) and
what each step leaves besides (files, checkpoints); both are measured for each iteration and give a ratio each. What
comes before the first step, its validation too, and after the last is counted once, as lost.
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
STEPS, STEPS_PER_ITERATION = 1000, 50


@dataclass(frozen=True)
class Iteration:
    """An iteration's seconds: `work` of its `steps`, `validating`, `starting` before the first, `seconds` in all."""

    steps: int
    work: float
    validating: float
    starting: float
    seconds: float

    def share(self, *, steps: int, steps_per_iteration: int, validation: float, between: float, around: float) -> float:
        """Useful over all seconds of a run of `steps` whose steps and iterations cost what these did.

        `validation` are the seconds of validations per step, `between` those from one iteration's end to the next
        one's start, `around` those of the run outside its iterations.
        """
        useful = (self.work / self.steps + validation) * steps
        beside = (self.seconds - self.starting - self.work - self.validating) / self.steps * steps
        return useful / (useful + beside + (self.starting + between) * steps / steps_per_iteration + around)


def iterations(metrics: Sequence[Mapping[str, Any]]) -> list[Iteration]:
    """The iterations that metrics.jsonl tells of. Raises DataError where one does not say how long it was starting."""
    found: list[Iteration] = []
    steps, work, validating = 0, 0.0, 0.0
    for entry in metrics:
        if entry["kind"] == "step":
            steps, work = steps + 1, work + sum(entry["seconds"].values())
        elif entry["kind"] == "validation":
            validating += entry["seconds"]
        elif entry["kind"] == "task" and entry["name"] == "iterate":
            if "starting" not in entry or not steps:
                raise DataError(
                    "an iteration of this run was interrupted, or written by an older version: name another"
                )
            found.append(Iteration(steps, work, validating, entry["starting"], entry["seconds"]))
            steps, work, validating = 0, 0.0, 0.0
    return found


def overhead(run: RunFolder, *, steps: int, steps_per_iteration: int) -> Result:
    """The result of a finished run. Raises DataError."""
    if not run.report_json.exists():
        raise DataError(f"--run ({run.path}): holds no report.json, so it is no finished run: name another, or none")
    metrics, report = run.read_metrics(), json.loads(run.report_json.read_text())
    measured, config = iterations(metrics), json.loads(run.config.read_text())
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
    own = config["loop"]["steps_per_iteration"]
    shares, as_here = (
        [one.share(steps=steps, steps_per_iteration=n, **costs) for one in measured] for n in (steps_per_iteration, own)
    )
    one = measured[-1]
    against = (
        f"a run of {steps} RS steps, {steps_per_iteration} an iteration, each as long as here: "
        f"{one.work / one.steps:.1f} s of work, {one.starting:.1f} s to start an iteration, {between:.1f} s between; "
        f"with {own} an iteration, as the preset has it, {statistics.median(as_here):.3f}"
    )
    return result("flow_overhead", shares, target=0.97, against=against, command=COMMAND)


def main() -> int:
    """Measure, record, print; 1 where it could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run of this version; without it one is made")
    parser.add_argument("--steps", type=int, default=STEPS, help="RS steps of the long run")
    parser.add_argument("--steps-per-iteration", type=int, default=STEPS_PER_ITERATION)
    options = parser.parse_args()
    return shown(lambda: measured(options))


def measured(options: argparse.Namespace) -> list[Result]:
    """The result, recorded. Raises DataError."""
    with tempfile.TemporaryDirectory(prefix="flow-overhead-") as scratch:
        run = RunFolder(options.run or _run(Path(scratch)))
        made = [overhead(run, steps=options.steps, steps_per_iteration=options.steps_per_iteration)]
    record(made)
    return made


def _run(root: Path) -> Path:
    sets = [word for override in (RUN, f"run.root={root}") for word in ("--set", override)]
    if subprocess.run([sys.executable, str(ROOT / "flows" / "rs_flow.py"), *sets, "run"]).returncode:
        raise DataError("the run failed, its message is above; nothing was measured")
    return (root / "latest").resolve()


if __name__ == "__main__":
    sys.exit(main())
