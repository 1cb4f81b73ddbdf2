"""What the flow around the work costs: useful over all seconds of a long run, extrapolated from a short one.

    python -m benchmarks.flow_overhead [--run FOLDER] [--steps N] [--steps-per-iteration N]

Without --run it runs the default task for nine RS steps in three iterations. Useful are the seconds of rollouts,
scoring, updates and validations. The rest is what an iteration starts with (a Metaflow task, the reward server, a
worker, its model) and what each step leaves besides (files, checkpoints); both are measured for each iteration and
give a ratio each. What comes before the first step and after the last is counted once, as lost.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import AlignmentError, DataError
from alignment.run_folder import RunFolder
from benchmarks.results import Result, record, result, table

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python -m benchmarks.flow_overhead"
RUN = ("loop.max_steps=9", "loop.steps_per_iteration=3", "loop.val_check_interval=3", "loop.save_interval=3")
STEPS, STEPS_PER_ITERATION = 1000, 50


@dataclass(frozen=True)
class Iteration:
    """An iteration's seconds: `useful` work of its `steps`, `starting` before the first, `seconds` in all."""

    steps: int
    useful: float
    starting: float
    seconds: float

    def share(self, *, steps: int, steps_per_iteration: int, between: float, around: float) -> float:
        """Useful over all seconds of a run of `steps` whose steps and iterations cost what these did.

        `between` are the seconds from one iteration's end to the next one's start, `around` those of the run outside
        its iterations.
        """
        useful = self.useful / self.steps * steps
        beside = (self.seconds - self.starting - self.useful) / self.steps * steps
        return useful / (useful + beside + (self.starting + between) * steps / steps_per_iteration + around)


def iterations(metrics: Sequence[Mapping[str, Any]]) -> list[Iteration]:
    """The iterations that metrics.jsonl tells of. Raises DataError where one does not say how long it was starting."""
    found: list[Iteration] = []
    steps, useful = 0, 0.0
    for entry in metrics:
        if entry["kind"] == "step":
            steps, useful = steps + 1, useful + sum(entry["seconds"].values())
        elif entry["kind"] == "validation":
            useful += entry["seconds"]
        elif entry["kind"] == "task" and entry["name"] == "iterate":
            if "starting" not in entry or not steps:
                raise DataError(
                    "an iteration of this run was interrupted, or written by an older version: name another"
                )
            found.append(Iteration(steps, useful, entry["starting"], entry["seconds"]))
            steps, useful = 0, 0.0
    return found


def overhead(run: RunFolder, *, steps: int, steps_per_iteration: int) -> Result:
    """The result of a finished run. Raises DataError."""
    metrics, report = run.read_metrics(), json.loads(run.report_json.read_text())
    measured = iterations(metrics)
    tasks = [entry for entry in metrics if entry["kind"] == "task"]
    # Starting a task is not in any task's own seconds; each costs the same.
    between = (report["seconds"]["total"] - sum(t["seconds"] for t in tasks)) / len(tasks)
    around = sum(t["seconds"] + between for t in tasks if t["name"] != "iterate")
    shares = [
        i.share(steps=steps, steps_per_iteration=steps_per_iteration, between=between, around=around) for i in measured
    ]
    one = measured[0]
    against = (
        f"a run of {steps} RS steps, {steps_per_iteration} an iteration, each as long as here: "
        f"{one.useful / one.steps:.1f} s of work, {one.starting:.1f} s to start an iteration, {between:.1f} s between"
    )
    return result("flow_overhead", shares, target=0.97, against=against, command=COMMAND)


def main() -> int:
    """Measure, record, print; 1 where it could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run of this version; null makes one")
    parser.add_argument("--steps", type=int, default=STEPS, help="RS steps of the long run")
    parser.add_argument("--steps-per-iteration", type=int, default=STEPS_PER_ITERATION)
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="flow-overhead-") as scratch:
            run = options.run or _run(Path(scratch))
            made = overhead(RunFolder(run), steps=options.steps, steps_per_iteration=options.steps_per_iteration)
    except AlignmentError as error:
        print(error, file=sys.stderr)
        return 1
    record([made])
    print(table([made]))
    return 0


def _run(root: Path) -> Path:
    sets = [word for override in (*RUN, f"run.root={root}") for word in ("--set", override)]
    if subprocess.run([sys.executable, str(ROOT / "flows" / "rs_flow.py"), *sets, "run"]).returncode:
        raise DataError("the run failed, its message is above; nothing was measured")
    return (root / "latest").resolve()


if __name__ == "__main__":
    sys.exit(main())
