"""The comparison of methods: its arithmetic by hand, and one arm of each kind that needs no package of its own."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.config import load_config
from benchmarks.method import ROOT, Row, _arm, best_of, compared, table
from benchmarks.plot import line_chart
from reward_fixtures import export_tiny

SMOKE = ROOT / "configs" / "smoke.yaml"
# Two prompts; the opponent first, then a pool of four. The reward's best of two are 0.4 and 0.9, of four 0.8 and 0.9.
BASE = {
    "reward": [[0.5, 0.1, 0.4, 0.8, 0.2], [0.6, 0.9, 0.7, 0.1, 0.2]],
    "judge": [[1.0, 5.0, 2.0, 0.5, 9.0], [1.0, 1.0, 7.0, 9.0, 9.0]],
}


def test_best_of_n_picks_by_reward_from_a_pool_without_the_opponent() -> None:
    two, four = best_of(2, [BASE]), best_of(4, [BASE])
    assert (two.win_rate.value, two.judge_win_rate.value) == (0.5, 0.75)  # 0.4 < 0.5, 0.9 > 0.6; 2 > 1, 1 = 1
    assert (four.win_rate.value, four.judge_win_rate.value) == (1.0, 0.25)  # 0.8 > 0.5; 0.5 < 1, 1 = 1
    assert two.reward_gain.value == pytest.approx((0.4 - 0.5 + 0.9 - 0.6) / 2)
    assert two.judge_gain.value == pytest.approx((2 - 1 + 1 - 1) / 2)
    assert two.kl.value == pytest.approx(math.log(2) - 1 / 2)


def test_an_arm_is_compared_with_the_first_response_of_the_base_over_all_seeds() -> None:
    point = {"step": 3, "reward": [[0.7], [0.5]], "judge": [[2.0], [1.0]], "kl": [1.0, 2.0]}
    other = {"step": 3, "reward": [[0.9], [0.9]], "judge": [[0.0], [0.0]], "kl": [3.0, 4.0]}
    row = compared("ours", [point, other], [BASE, BASE], load_config(SMOKE))
    assert row.kl.value == 2.5
    assert row.reward_gain.value == pytest.approx((0.2 - 0.1 + 0.4 + 0.3) / 4)
    assert row.judge_gain.value == pytest.approx((1 + 0 - 1 - 1) / 4)
    assert (row.win_rate.value, row.judge_win_rate.value) == (0.75, 0.375)
    assert row.responses == 3 * 4 * 4  # steps, prompts, responses each


def test_the_table_says_where_the_kl_is_a_bound() -> None:
    rows: list[Row] = [best_of(2, [BASE])]
    point = {"step": 3, "reward": [[0.7], [0.5]], "judge": [[2.0], [1.0]], "kl": [1.0, 1.0]}
    rows.append(compared("ours", [point], [BASE], load_config(SMOKE)))
    *_, bound, measured = table(rows).splitlines()
    assert bound.startswith("| best of 2 | ≤ 0.19 | 0.750 (")
    assert measured.startswith("| ours | 1.00 (1.00 to 1.00) | 0.750 (")
    assert measured.endswith("| 48 |")


def test_the_curve_lies_where_its_values_are() -> None:
    svg = line_chart("t", "x", "y", {"a": [(0, 0.5), (1.5, 0.75)]}, logarithmic=False, bottom=0.5)
    assert '<polyline points="64.0,344.0 490.0,40.0"' in svg  # from the origin's corner to the opposite one
    assert ">1.5</text>" in svg and ">0.5</text>" in svg


def test_a_bad_arm_is_refused_before_anything_runs() -> None:
    options = argparse.Namespace(config=str(SMOKE), overrides=[])
    with pytest.raises(SystemExit, match="expected 'NAME: rejection_sampling"):
        _arm("mine: ppo", options, 0)
    with pytest.raises(SystemExit, match=r"policy\.prompt_format=text"):
        _arm("mine: grpo policy.prompt_format=chat", options, 0)
    with pytest.raises(SystemExit, match="the peers learn from one reward model"):
        _arm('mine: rloo reward_ensemble.members={"reward_model":1,"other":1}', options, 0)
    arm = _arm("no penalty: rejection_sampling training.kl_penalty=0.5", options, 7)
    assert (arm.name, arm.config.training.kl_penalty, arm.config.seed) == ("no penalty", 0.5, 7)


@pytest.mark.slow
def test_arms_run_and_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.method", "--config", str(SMOKE), "--set", f"run.root={tmp_path}"]
    command += ["--out", str(tmp_path / "out"), "--arm", "ours: rejection_sampling"]
    members = 'reward_ensemble.members={"reward_model":1,"other":2}'
    command += ["--arm", f"vote: rejection_sampling {members} reward_ensemble.combine=vote"]
    export_tiny(tmp_path / "triton_repo", name="other", seed=1)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    first, second = (
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True) for _ in range(2)
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert "ours-seed-0: done" in first.stdout
    assert "ours-seed-0: there already" in second.stdout
    assert first.stdout.splitlines()[-6:] == second.stdout.splitlines()[-6:]
    best, *_, ours, vote = json.loads((tmp_path / "out" / "method.json").read_text())
    assert (best["name"], ours["name"], ours["responses"]) == ("best of 2", "ours", 64)
    assert ours["kl"]["value"] > 0
    assert vote["responses"] == 64 and vote["kl"]["value"] not in (0, ours["kl"]["value"])
    assert (tmp_path / "out" / "method.svg").read_text().startswith("<svg")
