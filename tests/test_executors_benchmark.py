"""The executors' cost of a step, by hand."""

import json

import pytest

from alignment.errors import DataError
from alignment.run_folder import RunFolder
from benchmarks.executors import StepCost, break_even, lines, step_cost


def test_a_steps_cost_is_that_of_its_iteration_without_the_validation(tmp_path):
    run = RunFolder(tmp_path)

    def iteration(seconds: float, validating: float = 0.0) -> None:
        run.append_metrics({"kind": "step", "step": 1, "seconds": {"rollouts": 3.0, "scoring": 1.0, "update": 2.0}})
        if validating:
            run.append_metrics({"kind": "validation", "step": 1, "seconds": validating})
        run.append_metrics({"kind": "task", "name": "iterate", "seconds": seconds, "starting": 0.0})

    iteration(90.0)
    run.report_json.write_text(json.dumps({"seconds": {"total": 92.0}}))
    with pytest.raises(DataError, match="one iteration only"):
        step_cost(run)
    iteration(20.0)
    iteration(24.0, validating=4.0)
    iteration(30.0)
    run.report_json.write_text(json.dumps({"seconds": {"total": 172.0}}))  # 164 in four tasks: 2 between two
    assert step_cost(run) == StepCost(all=22.0, work=6.0)


def test_where_it_pays():
    assert break_even(12.0, 2) == 24.0  # half of the rollouts' time is saved
    assert break_even(12.0, 4) == 16.0
    told = lines({"colocated": StepCost(10.0, 6.0), "disaggregated": StepCost(22.0, 8.0)})
    assert told[2].startswith("disaggregated takes 12.0 s more")
    assert told[3] == "    24.0 s with 2 shards on as many nodes"
