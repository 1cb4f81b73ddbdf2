"""The flow's overhead: an iteration's seconds taken apart and put together again for a longer run, by hand."""

import json

import pytest

from alignment.errors import DataError
from alignment.run_folder import RunFolder
from benchmarks.flow_overhead import Iteration, Pace, iterations, overhead

STEP = {"kind": "step", "step": 1, "seconds": {"rollouts": 6.0, "scoring": 1.0, "update": 2.0}}
TASK = {"kind": "task", "name": "iterate", "seconds": 47.0, "starting": 15.0}
TASK |= {"saving": 4.0, "checkpoints": 1, "ending": 3.0}

ITERATION = Iteration(
    steps=2, work=18.0, validating=3.0, starting=15.0, saving=4.0, checkpoints=1, ending=3.0, seconds=47.0
)


def test_an_iteration_is_taken_apart():
    metrics = [{"kind": "task", "name": "start", "seconds": 5.0}, STEP, STEP, validation(2, 3.0), TASK]
    assert iterations(metrics) == [ITERATION]
    with pytest.raises(DataError, match="interrupted, or written by an older version"):
        iterations([STEP, {"kind": "task", "name": "iterate", "seconds": 1.0}])


def test_a_longer_run_costs_what_its_parts_do():
    # A step: 9 of work and 1 of validation, useful; 2 beside. 100 steps in 4 iterations of 15 + 3 + 1 to start and end,
    # 10 checkpoints of 4, 50 around.
    share = ITERATION.share(Pace(100, per_iteration=25, per_save=10), validation=1.0, between=1.0, around=50.0)
    assert share == pytest.approx(1000 / (1000 + 200 + 10 * 4 + 4 * 19 + 50))


def test_a_run_is_read_from_its_folder(tmp_path):
    run = RunFolder(tmp_path)
    tasks = [{"kind": "task", "name": name, "seconds": s} for name, s in (("start", 10.0), ("evaluate", 20.0))]
    first = {**TASK, "seconds": 51.0}  # of which 4 for the validation before step 1
    for entry in (tasks[0], validation(0, 4.0), STEP, STEP, validation(2, 3.0), first, tasks[1]):
        run.append_metrics(entry)
    run.report_json.write_text(json.dumps({"seconds": {"total": 87.0}}))  # 81 in three tasks: 2 between two
    run.config.write_text(json.dumps({"loop": {"steps_per_iteration": 2, "save_interval": 1}}))
    made = overhead(run, Pace(100, per_iteration=25, per_save=10))
    # Useful: 9 + 3 / 2 a step. Beside: (51 - 15 - 18 - 7 - 4 - 3) / 2. Around: 4 + 10 + 20 + 2 * 2.
    assert made.ratio == pytest.approx(1050 / (1050 + 200 + 10 * 4 + 4 * 20 + 38))
    own = 1050 / (1050 + 200 + 100 * 4 + 50 * 20 + 38)
    assert made.against.endswith(f"with 2 an iteration and 1 a checkpoint, as here, {own:.3f}")


def test_what_is_no_finished_run_is_named(tmp_path):
    with pytest.raises(DataError, match=r"--run \(.*\): holds no report.json"):
        overhead(RunFolder(tmp_path), Pace(100, 25, 10))


def validation(step: int, seconds: float) -> dict[str, object]:
    return {"kind": "validation", "step": step, "seconds": seconds}
