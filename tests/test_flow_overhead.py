"""The flow's overhead: an iteration's seconds taken apart and put together again for a longer run, by hand."""

import json

import pytest

from alignment.errors import DataError
from alignment.run_folder import RunFolder
from benchmarks.flow_overhead import Iteration, iterations, overhead

STEP = {"kind": "step", "seconds": {"rollouts": 6.0, "scoring": 1.0, "update": 2.0}}
TASK = {"kind": "task", "name": "iterate", "seconds": 40.0, "starting": 15.0}


def test_an_iteration_is_taken_apart():
    metrics = [
        {"kind": "task", "name": "start", "seconds": 5.0},
        STEP,
        STEP,
        {"kind": "validation", "seconds": 3.0},
        TASK,
    ]
    assert iterations(metrics) == [Iteration(steps=2, useful=21.0, starting=15.0, seconds=40.0)]
    with pytest.raises(DataError, match="interrupted, or written by an older version"):
        iterations([STEP, {"kind": "task", "name": "iterate", "seconds": 1.0}])


def test_a_longer_run_costs_what_its_parts_do():
    # A step: 10.5 useful, 2 beside. 100 steps in 4 iterations of 15 + 1 to start, 50 around them.
    one = Iteration(steps=2, useful=21.0, starting=15.0, seconds=40.0)
    share = one.share(steps=100, steps_per_iteration=25, between=1.0, around=50.0)
    assert share == pytest.approx(1050 / (1050 + 200 + 4 * 16 + 50))


def test_a_run_is_read_from_its_folder(tmp_path):
    run = RunFolder(tmp_path)
    tasks = [{"kind": "task", "name": name, "seconds": s} for name, s in (("start", 10.0), ("evaluate", 20.0))]
    for entry in (tasks[0], STEP, STEP, {"kind": "validation", "seconds": 3.0}, TASK, tasks[1]):
        run.append_metrics(entry)
    run.report_json.write_text(json.dumps({"seconds": {"total": 76.0}}))  # 70 in three tasks: 2 between two
    made = overhead(run, steps=100, steps_per_iteration=25)
    assert made.ratio == pytest.approx(1050 / (1050 + 200 + 4 * 17 + 34))
