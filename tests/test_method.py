"""The comparison of methods: its arithmetic by hand, and one arm of each kind that needs no package of its own."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alignment.config import load_config
from alignment.statistics import mean_difference, win_rate
from benchmarks.method import ROOT, _arm, _arms, _is_there
from benchmarks.method_table import Row, best_of, compared, pooled, table
from benchmarks.peers.trl_online import ROWS, settings
from benchmarks.plot import line_chart
from reward_fixtures import export_tiny

SMOKE = ROOT / "configs" / "smoke.yaml"
# Two prompts; the opponent first, then a pool of four. The reward's best of two are 0.4 and 0.9, of four 0.8 and 0.9.
BASE = {
    "prompts": ["a", "b"],
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
    point = {"step": 3, "prompts": ["a", "b"], "reward": [[0.7], [0.5]], "judge": [[2.0], [1.0]], "kl": [1.0, 2.0]}
    other = {"step": 3, "prompts": ["a", "b"], "reward": [[0.9], [0.9]], "judge": [[0.0], [0.0]], "kl": [3.0, 4.0]}
    row = compared("ours", [point, other], [BASE, BASE], load_config(SMOKE))
    assert row.kl.value == 2.5
    assert row.reward_gain.value == pytest.approx((0.2 - 0.1 + 0.4 + 0.3) / 4)
    assert row.judge_gain.value == pytest.approx((1 + 0 - 1 - 1) / 4)
    assert (row.win_rate.value, row.judge_win_rate.value) == (0.75, 0.375)
    assert row.responses == 3 * 4 * 4  # steps, prompts, responses each


def test_a_prompt_of_two_seeds_counts_once_with_the_mean_of_its_values() -> None:
    """Seed 1 evaluates on b and c: b's value is the mean of two, and three prompts are resampled, not four."""
    other = {**BASE, "prompts": ["b", "c"]}
    point = {"step": 3, "prompts": ["a", "b"], "reward": [[0.7], [0.5]], "judge": [[2.0], [1.0]], "kl": [1.0, 2.0]}
    later = {"step": 3, "prompts": ["b", "c"], "reward": [[0.9], [0.9]], "judge": [[0.0], [0.0]], "kl": [4.0, 5.0]}
    row = compared("ours", [point, later], [BASE, other], load_config(SMOKE))
    assert row.kl == mean_difference([1.0, (2.0 + 4.0) / 2, 5.0], [0.0] * 3)
    assert row.reward_gain.value == pytest.approx((0.2 + (-0.1 + 0.4) / 2 + 0.3) / 3)
    assert row.judge_win_rate == mean_difference([1.0, (0.5 + 0.0) / 2, 0.0], [0.0] * 3)
    two = best_of(2, [BASE, other])
    assert two.win_rate == mean_difference([0.0, (1.0 + 0.0) / 2, 1.0], [0.0] * 3)  # as above, for a and b, b and c
    assert two.judge_win_rate == mean_difference([1.0, (0.5 + 1.0) / 2, 0.5], [0.0] * 3)
    # The same prompts under another seed are no new prompts: the interval is that of the means.
    assert pooled([["a", "b"]] * 2, [[0.0, 1.0], [1.0, 0.0]]) == ((0.5), (0.5, 0.5))


def test_one_seed_is_compared_by_the_statistics_of_a_run() -> None:
    rng = np.random.default_rng(1)
    ids = [f"p{i}" for i in range(40)]
    base = {"prompts": ids, **{key: rng.normal(size=(40, 5)).tolist() for key in ("reward", "judge")}}
    point = {"step": 1, "prompts": ids, **{key: rng.normal(size=(40, 1)).tolist() for key in ("reward", "judge")}}
    point["kl"] = rng.random(40).tolist()
    row = compared("ours", [point], [base], load_config(SMOKE))
    ours, theirs = ({key: [g[0] for g in side[key]] for key in ("reward", "judge")} for side in (point, base))
    assert row.kl == mean_difference(point["kl"], [0.0] * 40)
    assert row.reward_gain == mean_difference(ours["reward"], theirs["reward"])
    assert row.win_rate == win_rate(ours["reward"], theirs["reward"])
    assert row.judge_gain == mean_difference(ours["judge"], theirs["judge"])
    assert row.judge_win_rate == win_rate(ours["judge"], theirs["judge"])


def test_the_table_says_where_the_kl_is_a_bound() -> None:
    rows: list[Row] = [best_of(2, [BASE])]
    point = {"step": 3, "prompts": ["a", "b"], "reward": [[0.7], [0.5]], "judge": [[2.0], [1.0]], "kl": [1.0, 1.0]}
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
    for bad in ("policy.model=tiny-2", "reward.max_tokens=9", "seed=3", "rollouts.max_new_tokens=9"):
        with pytest.raises(SystemExit, match="an arm's own fields are those of rollouts, selection, training"):
            _arm(f"mine: rejection_sampling {bad}", options, 0)
    with pytest.raises(SystemExit, match="a name is letters"):
        _arm("../mine: grpo", options, 0)
    with pytest.raises(SystemExit, match=r"training\.lr_schedule=constant"):
        _arm("mine: grpo training.lr_schedule=cosine", options, 0)
    chat = argparse.Namespace(config=str(SMOKE), overrides=["policy.prompt_format=chat"])
    with pytest.raises(SystemExit, match=r"policy\.prompt_format=text"):
        _arm("mine: grpo", chat, 0)
    with pytest.raises(SystemExit, match="the peers learn from one reward model"):
        _arm('mine: rloo reward_ensemble.members={"reward_model":1,"other":1}', options, 0)
    arm = _arm("no penalty: rejection_sampling training.kl_penalty=0.5", options, 7)
    assert (arm.name, arm.config.training.kl_penalty, arm.config.seed) == ("no penalty", 0.5, 7)


@pytest.mark.parametrize("names", [["mine", "mine"], ["base"]])
def test_an_arm_does_not_write_over_another(names: list[str]) -> None:
    arms = [f"{name}: rejection_sampling" for name in names]
    with pytest.raises(SystemExit, match=f"'{names[-1]}' names two arms"):
        _arms(argparse.Namespace(config=str(SMOKE), overrides=[], arm=arms, seeds=[0]))


def test_measurements_without_the_ids_of_their_prompts_are_made_again(tmp_path: Path) -> None:
    file, what = tmp_path / "ours-seed-0.json", {"method": "rejection_sampling", "config": {"seed": 0}}
    assert not _is_there(file, what)
    for point, is_there in (({"kl": [1.0]}, False), ({"kl": [1.0], "prompts": ["a"]}, True)):
        file.write_text(json.dumps({**what, "points": [point]}))
        assert _is_there(file, what) == is_there
    assert not _is_there(file, {**what, "config": {"seed": 1}})


@pytest.mark.parametrize(("prompts", "responses"), [(32, 8), (12, 8), (1, 2), (25, 3), (67, 2)])
def test_a_peer_samples_in_each_step_what_an_rs_step_samples(prompts: int, responses: int) -> None:
    """TRL samples passes × rows completions a step and makes one optimizer step on them."""
    own = (f"rollouts.num_rollout_samples={prompts}", f"rollouts.num_rollouts_per_prompt={responses}")
    arguments = settings(load_config(SMOKE, own), steps=3)
    rows, passes = arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]
    assert rows * passes == prompts * responses
    assert rows <= ROWS
    assert (arguments["num_generations"], arguments["max_steps"]) == (responses, 3)


def test_what_the_config_says_of_a_peers_training_counts() -> None:
    said = {"lr": 3e-5, "warmup_steps": 2, "beta1": 0.8, "beta2": 0.9, "gradient_clip": 0.5, "kl_penalty": 0.1}
    arguments = settings(load_config(SMOKE, [f"training.{key}={value}" for key, value in said.items()]), steps=3)
    assert arguments["lr_scheduler_type"] == "constant_with_warmup"
    keys = ("learning_rate", "warmup_steps", "adam_beta1", "adam_beta2", "max_grad_norm", "beta")
    assert [arguments[key] for key in keys] == list(said.values())


@pytest.mark.slow
def test_arms_run_and_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.method", "--config", str(SMOKE), "--set", f"run.root={tmp_path}"]
    command += ["--out", str(tmp_path / "out"), "--arm", "ours: rejection_sampling"]
    command += ["--arm", "mixed: rejection_sampling training.sft_mix=toy:demonstrations training.num_sft_examples=4"]
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
    assert first.stdout.splitlines()[-7:] == second.stdout.splitlines()[-7:]
    best, *_, ours, mixed, vote = json.loads((tmp_path / "out" / "method.json").read_text())
    assert mixed["kl"] != ours["kl"]  # it trained on something else
    assert (best["name"], ours["name"], ours["responses"]) == ("best of 2", "ours", 64)
    assert ours["kl"]["value"] > 0
    assert vote["responses"] == 64 and vote["kl"]["value"] not in (0, ours["kl"]["value"])
    assert (tmp_path / "out" / "method.svg").read_text().startswith("<svg")
