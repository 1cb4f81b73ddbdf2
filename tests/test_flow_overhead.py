"""The flow's overhead: an iteration's seconds taken apart and put together again for a longer run, by hand."""

import json

import pytest

from alignment.errors import DataError
from alignment.run_folder import RunFolder
from benchmarks.flow_overhead import Iteration, iterations, overhead

STEP = {"kind": "step", "seconds": {"rollouts": 6.0, "scoring": 1.0, "update": 2.0}}
TASK = {"kind": "task", "name": "iterate", "seconds": 40.0, "starting": 15.0}


def test_an_iteration_is_taken_apart():
    metrics = [{"kind": "task", "name": "start", "seconds": 5.0}, STEP, STEP, validation(2, 3.0), TASK]
    assert iterations(metrics) == [Iteration(steps=2, work=18.0, validating=3.0, starting=15.0, seconds=40.0)]
    with pytest.raises(DataError, match="interrupted, or written by an older version"):
        iterations([STEP, {"kind": "task", "name": "iterate", "seconds": 1.0}])


def test_a_longer_run_costs_what_its_parts_do():
    # A step: 9 of work and 1 of validation, useful; 2 beside. 100 steps in 4 iterations of 15 + 1 to start, 50 around.
    one = Iteration(steps=2, work=18.0, validating=3.0, starting=15.0, seconds=40.0)
    share = one.share(steps=100, steps_per_iteration=25, validation=1.0, between=1.0, around=50.0)
    assert share == pytest.approx(1000 / (1000 + 200 + 4 * 16 + 50))


def test_a_run_is_read_from_its_folder(tmp_path):
    run = RunFolder(tmp_path)
    tasks = [{"kind": "task", "name": name, "seconds": s} for name, s in (("start", 10.0), ("evaluate", 20.0))]
    first = {**TASK, "seconds": 44.0}  # of which 4 for the validation before step 1
    for entry in (tasks[0], validation(0, 4.0), STEP, STEP, validation(2, 3.0), first, tasks[1]):
        run.append_metrics(entry)
    run.report_json.write_text(json.dumps({"seconds": {"total": 80.0}}))  # 74 in three tasks: 2 between two
    run.config.write_text(json.dumps({"loop": {"steps_per_iteration": 2}}))
    made = overhead(run, steps=100, steps_per_iteration=25)
    # Useful: 9 + 3 / 2 a step. Beside: (44 - 15 - 18 - 7) / 2. Around: 4 + 10 + 20 + 2 * 2.
    assert made.ratio == pytest.approx(1050 / (1050 + 200 + 4 * 17 + 38))
    assert made.against.endswith(f"with 2 an iteration, as the preset has it, {1050 / (1050 + 200 + 50 * 17 + 38):.3f}")


def test_what_is_no_finished_run_is_named(tmp_path):
    with pytest.raises(DataError, match=r"--run \(.*\): holds no report.json"):
        overhead(RunFolder(tmp_path), steps=100, steps_per_iteration=25)


def validation(step: int, seconds: float) -> dict[str, object]:
    return {"kind": "validation", "step": step, "seconds": seconds}
