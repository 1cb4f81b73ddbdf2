"""What an RS step costs beside its work under each executor, and from which step on the disaggregated one pays.

    python -m benchmarks.executors [--preset FILE] [--steps N]

The same run by both executors on this machine, the colocated one with the preset's steps an iteration: one shard, one
node, a reward server that is there already. So the difference between their steps is what it costs to have a Metaflow
run, and tasks that load the policy anew, for each step. With S shards on S nodes, rollouts take 1/S of their time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from alignment.errors import AlignmentError, DataError
from alignment.reward_server import reward_server
from alignment.run_folder import RunFolder
from alignment.scoring import RewardClient
from alignment.task import START_S
from benchmarks.flow_overhead import ROOT, iterations

EXECUTORS = {"colocated": (), "disaggregated": ("loop.executor=disaggregated", "loop.steps_per_iteration=1")}
SHARDS = (2, 4, 8, 16, 64)


@dataclass(frozen=True)
class StepCost:
    """Median seconds of an RS step, validations apart: in `all`, and of rollouts, scoring and update in `work`."""

    all: float
    work: float


def step_cost(run: RunFolder) -> StepCost:
    """What the steps of a finished run cost, those of its first iteration apart. Raises DataError."""
    metrics = run.read_metrics()
    tasks = [entry for entry in metrics if entry["kind"] == "task"]
    # Starting a task is not in any task's own seconds; each costs the same.
    total = json.loads(run.report_json.read_text())["seconds"]["total"]
    between = (total - sum(task["seconds"] for task in tasks)) / len(tasks)
    measured = iterations(metrics)[1:]
    if not measured:
        raise DataError(f"{run.path} has one iteration only, which begins with what the others do not: raise --steps")
    return StepCost(
        statistics.median((one.seconds - one.validating + between) / one.steps for one in measured),
        statistics.median(one.work / one.steps for one in measured),
    )


def break_even(extra: float, shards: int) -> float:
    """Seconds of rollouts a step, on one node, above which `shards` nodes save more than `extra` seconds."""
    return extra * shards / (shards - 1)


def lines(costs: dict[str, StepCost]) -> list[str]:
    """What a person wants to know about them."""
    told = [
        f"{name}: {cost.all:.1f} s an RS step, {cost.work:.1f} s of them rollouts, scoring and update"
        for name, cost in costs.items()
    ]
    extra = costs["disaggregated"].all - costs["colocated"].all
    return [
        *told,
        f"disaggregated takes {extra:.1f} s more. It pays where the rollouts of a step take longer, on one node, than",
        *(f"  {break_even(extra, shards):6.1f} s with {shards} shards on as many nodes" for shards in SHARDS),
    ]


def main() -> int:
    """Measure and print; 1 where it could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", type=Path, default=ROOT / "configs" / "smoke.yaml", help="default: smoke.yaml")
    parser.add_argument("--steps", type=int, default=4, help="RS steps of each run, more than an iteration has")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="executors-") as scratch:
            print("\n".join(lines(_measured(options, Path(scratch)))))
    except AlignmentError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _measured(options: argparse.Namespace, root: Path) -> dict[str, StepCost]:
    _flow("reward_model_flow", options.preset, root)
    export = max((root / "triton_repo").glob("*/[0-9]*"))
    with reward_server(
        repository=root / "triton_repo",
        name=export.parent.name,
        version=export.name,
        url=None,
        grpc_port=0,
        log=root / "triton.log",
    ) as server:
        with RewardClient(server.url, model_name=export.parent.name) as client:
            client.wait_ready(START_S)
        costs = {}
        for name, own in EXECUTORS.items():
            sets = [f"loop.max_steps={options.steps}", f"reward.url={server.url}", *own]
            _flow("rs_flow", options.preset, root, *sets)
            costs[name] = step_cost(RunFolder((root / "latest").resolve()))
    return costs


def _flow(name: str, preset: Path, root: Path, *sets: str) -> None:
    overrides = [word for one in (f"run.root={root}", "wandb.mode=disabled", *sets) for word in ("--set", one)]
    command = [sys.executable, str(ROOT / "flows" / f"{name}.py"), "--config", "config", str(preset), *overrides, "run"]
    if subprocess.run(command).returncode:
        raise DataError(f"{name} failed, its message is above; nothing was measured")


if __name__ == "__main__":
    sys.exit(main())
