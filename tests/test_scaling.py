"""The simulator of other numbers of GPUs: formulas by hand, what must hold whatever the costs, and a run's rates."""

import itertools
import json
import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alignment.errors import ConfigError, DataError
from alignment.run_folder import RunFolder
from alignment.scaling_inputs import Inputs, case_of, from_run, overridden
from alignment.scaling_memory import activations, gpus_per_copy, memory, training_state
from alignment.scaling_model import (
    copying,
    estimate,
    expected_slowest,
    ideal_gpu_seconds,
    loading,
    ring_seconds,
    rollouts,
    saving,
    scoring,
    update,
    update_slots,
    waiting,
)
from alignment.scaling_types import MODELS, Case, Costs, Hardware, Memory, Shape
from benchmarks.plot import line_chart

ROOT = Path(__file__).resolve().parent.parent
GPUS = [2**k for k in range(3, 13)]
PEAK = Costs(
    prefill_share=1, decode_share=1, bandwidth_share=1, update_share=1, scoring_share=1, network_share=1,
    layer_seconds=0, hop_seconds=0, node_hop_seconds=0, straggling=0, failures_per_gpu_hour=0,
)  # fmt: skip
"""Everything at its peak and nothing ever late."""


def inputs(model: str = "8B", costs: Costs | None = None, **shape: float) -> Inputs:
    return Inputs(MODELS[model], Hardware(), costs or Costs(), replace(Shape(), **shape))


def case(gpus: int = 8, model: str = "8B", executor: str = "colocated", costs: Costs | None = None, **shape) -> Case:
    return case_of(inputs(model, costs, **shape), gpus, executor, {})


def held(stage: int, recompute: bool = False) -> Memory:
    return Memory(stage, recompute, state=0, copy=0, activations=0, cache=10e9)


# --- by hand


@pytest.mark.parametrize(("model", "kib"), [("1B", 32), ("8B", 128), ("70B", 320)])
def test_keys_and_values_of_a_token(model, kib):
    # 2 × layers × key heads × head size × 2 bytes: 8B has 2 × 32 × 8 × 128 × 2.
    assert MODELS[model].kv_bytes == kib * 1024


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 16.0), (1, 4 + 12 / 8), (2, 2 + 14 / 8), (3, 16 / 8)])
def test_training_takes_sixteen_bytes_a_parameter_over_the_ranks(stage, gigabytes):
    assert training_state(1e9, stage, 8) == pytest.approx(gigabytes * 1e9)
    assert training_state(1e9, stage, 1) == pytest.approx(16e9)


def test_activations():
    # A layer keeps 34 × hidden a token, or its input of 2 × hidden.
    model = MODELS["8B"]
    assert activations(model, 100, recompute=False) == 32 * 34 * 4096 * 100
    assert activations(model, 100, recompute=True) == (32 * 2 + 34) * 4096 * 100


def test_a_copy_takes_a_quarter_of_its_gpus():
    assert [gpus_per_copy(MODELS[name], Hardware()) for name in ("1B", "8B", "70B")] == [1, 1, 8]
    assert gpus_per_copy(MODELS["70B"], Hardware(memory=200e9)) == 4  # 141 GB over 4 × 50


def test_memory_of_each_model():
    assert memory(case(8)).zero_stage == 2
    assert memory(case(8)).state == pytest.approx(8.03e9 * (2 + 14 / 8))
    large = memory(case(64, "70B"))
    assert (large.zero_stage, large.recompute) == (3, True)
    assert large.copy == pytest.approx(141.2e9 / 8)
    assert large.cache == pytest.approx(72e9 - 70.6e9 * 16 / 64 - 141.2e9 / 8)
    with pytest.raises(ConfigError, match=r"16 GPUs: 70B leaves 0 of 72 GB .*: take more GPUs"):
        memory(case(16, "70B"))
    alone = case_of(inputs(), 8, "disaggregated", {"update_gpus": 1})
    with pytest.raises(ConfigError, match=r"to train 8B each would hold .* take more GPUs, or a smaller shape.micro"):
        memory(alone)


def test_a_shard_has_one_gpu_for_a_whole_copy():
    assert case(64, "8B", "disaggregated").plan.tensor_parallel == 1
    with pytest.raises(ConfigError, match=r"70B leaves 0 of 72 GB .*: a shard .* samples on one GPU. Take --executor"):
        memory(case(64, "70B", "disaggregated"))


def test_generation_takes_two_flop_a_parameter_and_token():
    # 16 prompts × 4 on 8 GPUs: 2 prompts each, of which 8 × 10 tokens are drawn and 2 × 20 read.
    one = case(8, costs=PEAK, prompts=16, samples=4, prompt_tokens=20, response_tokens=10, max_new_tokens=10)
    found, n = rollouts(one, cache=1e12), 8.03e9
    assert found["arithmetic"] == pytest.approx(2 * n * (80 + 40) / 989e12)
    # 10 passes read the weights; a token looks at 20 + 10 / 2 others.
    read = 10 * 2 * n + 80 * 131072 * 25
    assert found["memory bandwidth"] == pytest.approx(2 * n * 40 / 989e12 + read / 3.35e12)
    slow = replace(one, costs=replace(PEAK, layer_seconds=1e-3))
    assert rollouts(slow, cache=1e12)["launches"] == pytest.approx(2 * n * 40 / 989e12 + 10 * 32e-3)


def test_rows_without_room_follow_each_other_and_the_longest_is_waited_for():
    # 8 rows of which 4 fit: two waves of 10 tokens, and the longest response is 15.
    one = case(8, costs=replace(PEAK, layer_seconds=1), prompts=8, samples=8, prompt_tokens=8, response_tokens=10,
               max_new_tokens=15)  # fmt: skip
    row = 131072 * (15 + 8 / 8)
    assert rollouts(one, cache=4 * row)["launches"] == pytest.approx((2 * 10 + 5) * 32, rel=1e-3)
    assert rollouts(one, cache=8 * row)["launches"] == pytest.approx(15 * 32, rel=1e-3)


def test_training_takes_six_flop_a_parameter_and_token():
    shape = {"prompts": 16, "prompt_tokens": 20, "response_tokens": 10, "max_new_tokens": 10, "global_batch_size": 16}
    one = case(8, costs=PEAK, **shape)
    seconds, network = update(one, held(2))
    assert seconds == pytest.approx(2 * 30 * 6 * 8.03e9 / 989e12)  # 16 sequences on 8 ranks
    assert network == pytest.approx(2 * 2 * 8.03e9 * 7 / 8 / 450e9)  # gradients scattered, weights gathered
    again, often = update(case_of(inputs(costs=PEAK, **shape), 8, "colocated", {"tensor_parallel": 2}), held(3, True))
    assert again == pytest.approx(seconds * 8 / 6)
    assert often == pytest.approx(3 * 2 * 8.03e9 * 7 / 8 / 450e9)  # one micro-batch


@pytest.mark.parametrize(("tensor_parallel", "times"), [(1, 3 + 1), (2, 3 * 3)])
def test_gradients_are_scattered_once_per_micro_batch(tensor_parallel, times):
    # 24 sequences on 8 ranks in micro-batches of one: three scatters, and a gather at the end (ZeRO 2) or six (ZeRO 3).
    shape = inputs(costs=PEAK, prompts=24, global_batch_size=24, micro_batch_size=1)
    one = case_of(shape, 8, "colocated", {"tensor_parallel": tensor_parallel})
    assert update(one, held(2))[1] == pytest.approx(times * 2 * 8.03e9 * 7 / 8 / 450e9)


def test_the_ranks_take_as_many_responses_as_the_fullest():
    few, full = (case(8, costs=PEAK, prompts=n, global_batch_size=n) for n in (9, 16))
    assert update(few, held(2))[0] == pytest.approx(update(full, held(2))[0])
    assert estimate(few).idle_update == pytest.approx(1 - 9 / 16)
    two_steps = case(8, costs=PEAK, prompts=16, global_batch_size=8)
    assert update(two_steps, held(2))[1] == pytest.approx(2 * update(few, held(2))[1])


def test_a_batch_that_is_not_full_has_fillers():
    # A global batch of 64 in micro-batches of 4 on 8 ranks: two each, though 8 responses would be one each.
    assert update_slots(case(8, prompts=8, global_batch_size=64)) == (1, 2)
    assert update_slots(case(8, prompts=80, global_batch_size=64)) == (2, 8)


def test_a_ring():
    # 16 ranks on 2 nodes: 15/16 at the nodes' 400 GB/s, 14 steps inside and one between for each collective.
    one = case(16, costs=replace(PEAK, hop_seconds=1e-6, node_hop_seconds=1e-5))
    assert ring_seconds(one, 16e9, 16, 3) == pytest.approx(15e9 / 400e9 + 3 * (14e-6 + 1e-5))


def test_scoring_overlaps_with_all_waves_but_the_last():
    one = case_of(inputs(costs=PEAK, prompts=10, samples=2, prompt_tokens=20, response_tokens=10), 8, "colocated",
                  {"reward_gpus": 5})  # fmt: skip
    assert scoring(one) == pytest.approx(20 * 30 * 2 * 8.03e9 / 989e12 / 5)
    assert waiting(10, 100, 1) == 10
    assert waiting(10, 100, 5) == 2
    assert waiting(200, 100, 5) == 120  # 80 of the 100 pass beside it


def test_checkpoints_are_written_read_and_summed():
    one = replace(case(16, "1B"), hardware=Hardware(node_storage=2e9, storage=3e9), costs=Costs(hash_bytes_per_s=1e9))
    n = 1.24e9
    # Two nodes share 3 GB/s; the first reads the other's half of AdamW's state, and sums all twice.
    assert saving(one) == pytest.approx(2 * n / 2e9 + 12 * n / 3e9 + 6 * n / 2e9 + 2 * 14 * n / 1e9)
    alone = replace(case(8, "1B"), hardware=one.hardware, costs=one.costs)
    assert saving(alone) == pytest.approx(14 * n / 2e9 + 2 * 14 * n / 1e9)
    assert loading(one, 1) == pytest.approx(14 * n / 2e9 + 14 * n / 1e9)
    assert loading(one, 2) == pytest.approx(14 * n / 1.5e9 + 14 * n / 1e9)


@pytest.mark.parametrize(("gpus", "taken_in", "rate"), [(8, 141.2e9 / 8, 450e9), (64, 141.2e9, 400e9)])
def test_a_node_takes_in_all_weights_for_its_copy(gpus, taken_in, rate):
    # Each of its GPUs an eighth; on one node they are there.
    made = replace(held(3), copy=141.2e9 / 8)
    assert copying(case(gpus, "70B", costs=PEAK), made) == pytest.approx(taken_in * (gpus - 1) / gpus / rate)
    assert copying(case(gpus, costs=PEAK), held(2)) == 0


def test_a_copy_over_nodes_comes_from_the_others():
    # 8 nodes load 14 bytes a parameter once in 10 steps, and take in 7/8 of 2 bytes a parameter in each.
    made = estimate(case(64, "70B", steps_per_iteration=10))
    assert made.weight_bytes == pytest.approx(8 * 14 * 70.6e9 / 10 + 8 * 7 / 8 * 2 * 70.6e9)


def test_a_colocated_step_and_its_run():
    one = case(8, costs=PEAK, steps=10, save_interval=5, steps_per_iteration=10)
    made = estimate(one)
    assert made.parts["starting"] == pytest.approx(6.2)
    assert made.parts["checkpoints"] == pytest.approx(saving(one) / 5)
    assert made.parts["weights"] == pytest.approx(loading(one, 1) / 10)
    assert made.wall_hours == pytest.approx(10 * made.step_seconds / 3600)
    assert made.gpu_hours == pytest.approx(10 * made.wall_hours)  # 8 and 2 of reward
    assert made.rollout_bytes == 10 * 8192 * 512 * 5
    assert made.checkpoint_bytes == 2 * 14 * 8.03e9
    assert made.weight_bytes == pytest.approx(14 * 8.03e9 / 10)


def test_a_disaggregated_step_holds_each_phase_s_own_gpus():
    one = case_of(inputs(costs=PEAK), 64, "disaggregated", {"update_gpus": 16})
    made = estimate(one)
    to_sample, to_train = loading(one, 8), loading(one, 2)
    assert made.parts["weights"] == pytest.approx(to_sample + to_train)
    assert made.parts["starting"] == 130
    sampled = next(seconds for name, seconds in made.parts.items() if name.startswith("rollouts"))
    trained = made.parts["update: arithmetic"] + made.parts["update: network"] + saving(one)
    seconds = 64 * (sampled + to_sample + 65) + 16 * (trained + to_train + 65) + 16 * made.step_seconds
    assert made.gpu_hours == pytest.approx(200 * seconds / 3600)
    assert made.weight_bytes == (8 + 2) * 14 * 8.03e9


def test_failures_repeat_half_of_what_lies_between_checkpoints():
    shape = {"steps": 100, "save_interval": 10}
    calm = estimate(case(8, costs=PEAK, **shape))
    made = estimate(case(8, costs=replace(PEAK, failures_per_gpu_hour=0.01), **shape))
    assert made.failures == pytest.approx(0.01 * calm.gpu_hours)
    lost = 5 * calm.step_seconds + 60 + loading(case(8), 1)
    assert made.wall_hours == pytest.approx(calm.wall_hours + made.failures * lost / 3600)


# --- stragglers


@pytest.mark.parametrize("workers", [1, 2, 16, 300])
@pytest.mark.parametrize("spread", [0.05, 0.4])
def test_the_slowest_worker_is_what_draws_say(workers, spread):
    draws, rng = 2000, random.Random(7)
    slowest = [max(rng.lognormvariate(-(spread**2) / 2, spread) for _ in range(workers)) for _ in range(draws)]
    mean = sum(slowest) / draws
    error = math.sqrt(sum((s - mean) ** 2 for s in slowest) / draws / draws)
    assert abs(expected_slowest(workers, spread) - mean) < 4 * error


def test_one_worker_or_equal_ones_wait_for_nobody():
    assert expected_slowest(1, 0.3) == pytest.approx(1)
    assert expected_slowest(4096, 0) == pytest.approx(1)


# --- whatever the costs


@pytest.mark.parametrize("model", MODELS)
def test_more_gpus_never_make_a_phase_slower_until_a_bound_is_reached(model):
    # Below a GPU a prompt, and where rings have no latency; what grows with nodes is what storage is read for.
    fitting = [g for g in GPUS if g <= 1024 and (model != "70B" or g >= 32)]
    made = [estimate(case(g, model, costs=replace(Costs(), hop_seconds=0, node_hop_seconds=0))) for g in fitting]
    # Scoring is waited for the longer the fewer waves it can overlap with, so it counts with the rollouts.
    for names in (("rollouts",), ("rollouts", "scoring"), ("update: arithmetic",), ("checkpoints",), ("starting",)):
        seconds = [sum(s for part, s in one.parts.items() if part.startswith(names)) for one in made]
        # Waiting for the slowest of twice as many may outgrow what is left to halve.
        assert all(later <= earlier * 1.02 for earlier, later in itertools.pairwise(seconds)), names


def test_beyond_a_prompt_a_worker_the_rest_idles():
    full, twice = estimate(case(1024, "1B")), estimate(case(2048, "1B"))
    assert (full.idle_rollouts, twice.idle_rollouts) == (0, 0.5)
    assert max(twice.parts.values()) > 0
    assert twice.efficiency < full.efficiency / 1.9


@pytest.mark.parametrize(
    ("model", "executor"),
    [*((model, "colocated") for model in MODELS), ("1B", "disaggregated"), ("8B", "disaggregated")],
)
def test_gpu_hours_are_never_below_the_ideal(model, executor):
    fitting = [g for g in GPUS if (model != "70B" or g >= 32) and (executor == "colocated" or g <= 1024)]
    for costs in (Costs(), PEAK):
        for gpus in fitting:
            made = estimate(case(gpus, model, executor, costs))
            assert 0 < made.efficiency <= 1
    for prompts, samples in ((1, 1), (7, 3), (5000, 16)) if executor == "colocated" else ((5000, 16),):
        shape = {"prompts": prompts, "samples": samples, "response_tokens": 100, "max_new_tokens": 100}
        assert estimate(case(64, model, executor, PEAK, **shape)).efficiency <= 1


def test_work_and_data_grow_with_samples():
    shape = {"prompt_tokens": 1e-9, "kept": 1}  # prompts are read once whatever the samples
    one, three = (case(8, prompts=512, samples=n, **shape) for n in (4, 12))
    trained = ideal_gpu_seconds(case(8, prompts=512, samples=1, **shape))
    more = ideal_gpu_seconds(case(8, prompts=512, samples=2, **shape)) - trained
    assert ideal_gpu_seconds(three) - ideal_gpu_seconds(one) == pytest.approx(8 * more)
    assert estimate(three).rollout_bytes == 3 * estimate(one).rollout_bytes
    assert rollouts(three, 1e12)["arithmetic"] == pytest.approx(3 * rollouts(one, 1e12)["arithmetic"])


# --- what it is told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cost": {}}, "cost: no such section; there are model, hardware, costs, shape and plan"),
        ({"costs": {"share": 1}}, r"costs.share: no such field; there are prefill_share, "),
        ({"costs": {"update_share": 40}}, r"costs.update_share \(40\) must be <= 1"),
        ({"costs": {"update_share": 0}}, r"costs.update_share \(0\) must be a number above 0"),
        ({"costs": {"straggling": -1}}, r"costs.straggling \(-1\) must be a number of 0 or more"),
        ({"costs": {"straggling": math.inf}}, r"costs.straggling \(inf\) must be a number"),
        ({"shape": {"prompts": 1.5}}, r"shape.prompts \(1.5\) must be a whole number above 0"),
        ({"shape": {"prompts": True}}, r"shape.prompts \(True\) must be a whole number above 0"),
        ({"shape": {"max_new_tokens": 100}}, r"shape.response_tokens \(512\) must be <= shape.max_new_tokens \(100\)"),
        ({"shape": {"kept": 9}}, r"shape.kept \(9\) must be <= shape.samples \(8\)"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        overridden(inputs(), settings)


@pytest.mark.parametrize(
    ("plan", "executor", "message"),
    [
        ({"tensor_parallel": 3}, "colocated", r"plan.tensor_parallel \(3\) must divide --gpus \(64\)"),
        ({"update_gpus": 8}, "colocated", r"plan.update_gpus \(8\): colocated workers all train"),
        ({"shards": 4}, "disaggregated", "plan.shards: cannot be set; there are reward_gpus, tensor_parallel, upd"),
        ({"tensor_parallel": 8}, "disaggregated", r"plan.tensor_parallel \(8\): a shard .* samples on one GPU"),
        ({"gpus": 8}, "colocated", r"plan.gpus: cannot be set"),
    ],
)
def test_bad_plans_are_named(plan, executor, message):
    with pytest.raises(ConfigError, match=message):
        case_of(inputs(), 64, executor, plan)


def made_up_run(path: Path, sections: dict[str, dict[str, object]]) -> None:
    """Records of two RS steps, the first of which warms up, a config, and a checkpoint of 167 weights."""
    run = RunFolder(path)
    step = {
        "kind": "step", "step": 1, "response_length_mean": 20.0, "num_selected": 6,
        "seconds": {"rollouts": 4.0, "scoring": 1.0, "update": 3.0},
    }  # fmt: skip
    run.append_metrics({**step, "seconds": {"rollouts": 99.0, "scoring": 99.0, "update": 99.0}})
    run.append_metrics(step)
    run.append_metrics({"kind": "task", "name": "iterate", "seconds": 40.0, "starting": 15.0})
    config = {
        "rollouts": {"num_rollout_samples": 6, "num_rollouts_per_prompt": 4, "max_new_tokens": 24},
        "prompts": {"max_prompt_tokens": 50}, "resources": {"gpu": 0, "cpu_workers": 2},
        "loop": {"max_steps": 8, "save_interval": 4, "steps_per_iteration": 4},
        "training": {"global_batch_size": 6, "micro_batch_size": 3},
    }  # fmt: skip
    run.config.write_text(
        json.dumps({key: {**config.get(key, {}), **sections.get(key, {})} for key in config | sections})
    )
    folder = run.checkpoints / "step-000004"
    folder.mkdir(parents=True)
    (folder / "DONE").touch()
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(sizes))
    save_file({"a": torch.zeros(10, 16), "b": torch.zeros(7)}, folder / "model.safetensors")


def taken(found: Inputs, gpus: int, executor: str, plan: dict[str, int]) -> list[float]:
    """Seconds of the rollouts and of the whole update."""
    parts = estimate(case_of(found, gpus, executor, plan)).parts
    return [parts["rollouts: a measured rate"], parts["update: arithmetic"] + parts["update: network"]]


SLOW_LINKS = replace(Hardware(), nvlink=1e3)
"""Two ranks scatter and gather 167 weights of 2 bytes at 800 bytes/s: 0.4 s of the update, and a latency."""


def test_a_run_predicts_itself(tmp_path):
    made_up_run(tmp_path, {})
    given = replace(inputs(costs=replace(Costs(), straggling=0.3)), hardware=SLOW_LINKS)
    found, plan = from_run(tmp_path, given)
    assert (found.model.parameters, found.model.kv_bytes, found.costs.worker_seconds) == (167, 2 * 2 * 2 * 4 * 2, 15)
    assert (found.shape.steps, plan) == (8, {"tensor_parallel": 1})
    assert taken(found, 2, "colocated", plan) == pytest.approx([4.0, 3.0])
    assert estimate(case_of(found, 2, "colocated", plan)).parts["scoring"] == pytest.approx(1.0)
    # Three prompts a worker became one, and the slowest of six is waited for longer than that of two.
    slower = expected_slowest(6, 0.3) / expected_slowest(2, 0.3)
    network = [2 * 2 * 167 * (n - 1) / n / 800 + 2 * (n - 1) * 3.4e-6 for n in (2, 6)]
    expected = [4.0 / 3 * slower, (3.0 - network[0]) / 3 * slower + network[1]]
    assert taken(found, 6, "colocated", plan) == pytest.approx(expected)


def test_workers_that_get_unequal_parts(tmp_path):
    # Six prompts on four workers: the fullest has two of them, and two sequences to train on.
    made_up_run(tmp_path, {"resources": {"gpu": 0, "cpu_workers": 4}})
    found, plan = from_run(tmp_path, inputs())
    assert taken(found, 4, "colocated", plan) == pytest.approx([4.0, 3.0])
    assert taken(found, 6, "colocated", plan)[0] == pytest.approx(
        4.0 / 2 * expected_slowest(6, 0.05) / expected_slowest(4, 0.05)
    )


def test_a_disaggregated_run_predicts_itself(tmp_path):
    """Three shards and two nodes of one worker each, whatever `resources` says of workers."""
    phases = {"shards": 3, "update_nodes": 2, "update": {"gpu": 1}}
    loop = {"executor": "disaggregated", "steps_per_iteration": 1, "max_epochs": 2}
    made_up_run(tmp_path, {"loop": loop, "phases": phases, "resources": {"gpu": 4}})
    (tmp_path / "prompts").mkdir()
    prompt = {"id": "p", "messages": [{"role": "user", "content": "Hello"}]}
    (tmp_path / "prompts" / "train.jsonl").write_text((json.dumps(prompt) + "\n") * 20)
    found, plan = from_run(tmp_path, inputs())
    # 20 prompts make three steps of 6, twice; the task that has the record starts no workers.
    assert (found.shape.steps, found.costs.worker_seconds) == (6, 60)
    assert taken(found, 3, "disaggregated", plan | {"update_gpus": 2}) == pytest.approx([4.0, 3.0])
    # Two prompts of four responses of 20 tokens a shard, and waiting for the slowest of three is taken off.
    assert found.costs.rollout_tokens_per_s == pytest.approx(2 * 4 * 20 / 4.0 * expected_slowest(3, 0.05))


def test_collectives_that_would_outlast_the_update_are_named(tmp_path):
    made_up_run(tmp_path, {})
    slow = replace(inputs(), hardware=replace(Hardware(), nvlink=10))
    with pytest.raises(
        ConfigError, match=r"updates took 3 s and the collectives alone would take 41.8 s: set hardware"
    ):
        from_run(tmp_path, slow)


def test_a_run_without_a_checkpoint_is_named(tmp_path):
    made_up_run(tmp_path, {})
    (tmp_path / "checkpoints" / "step-000004" / "DONE").unlink()
    with pytest.raises(DataError, match="holds no checkpoint"):
        from_run(tmp_path, inputs())


def test_a_run_without_steps_is_named(tmp_path):
    RunFolder(tmp_path).config.write_text("{}")
    with pytest.raises(DataError, match="holds no finished RS step"):
        from_run(tmp_path, inputs())


# --- the command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alignment.scaling", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_prints_a_table_json_and_charts(tmp_path):
    costs = tmp_path / "costs.yaml"
    costs.write_text("costs: {update_share: 0.2}\nshape: {steps: 10}\n")
    chosen = ["--model", "70B", "--gpus", "8", "64", "--costs", str(costs), "--set", "costs.update_share=0.3"]
    done = command(*chosen)
    assert done.returncode == 0, done.stderr
    assert "70B, colocated: 10 RS steps of 1024 prompts × 8" in done.stdout
    assert "8 GPUs: 70B leaves 0 of 72 GB" in done.stdout
    told = command(*chosen, "--json", "--plot", str(tmp_path / "scaling"))
    (one,) = json.loads(told.stdout)
    assert one["inputs"]["costs"]["update_share"] == 0.3
    assert "error" in one["estimates"][0]
    assert one["estimates"][1]["plan"]["gpus"] == 64
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["scaling_efficiency.svg", "scaling_hours.svg"]


@pytest.mark.parametrize("bad", ["costs.update_share", "update_share=1", "costs.update_share=much"])
def test_a_bad_option_is_a_message(bad):
    done = command("--set", bad)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: --set ({bad})")


def test_costs_that_are_no_text_are_a_message(tmp_path):
    (tmp_path / "costs.yaml").write_bytes(b"costs: {update_share: 0.2} # \xff")
    done = command("--costs", str(tmp_path / "costs.yaml"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: --costs ({tmp_path / 'costs.yaml'}): 'utf-8' codec can't decode")


def test_the_command_takes_a_run_with_its_links(tmp_path):
    made_up_run(tmp_path, {})
    done = command("--from-run", str(tmp_path), "--gpus", "2", "--set", "hardware.nvlink=10")
    assert done.stderr.startswith("error: the run's updates took 3 s")
    done = command("--from-run", str(tmp_path), "--gpus", "2", "--set", "costs.straggling=0", "--json")
    assert json.loads(done.stdout)[0]["estimates"][0]["parts"]["rollouts: a measured rate"] == pytest.approx(4.0)


def test_idle_ranks_are_told():
    # 4,096 ranks for 1,024 responses; each copy of 8 has two prompts.
    done = command("--model", "70B", "--gpus", "2048", "4096")
    assert "From 2048 GPUs that train on, half of the ranks' places or more train on nothing" in done.stdout
    assert "no prompt" not in done.stdout


def test_the_command_needs_no_torch():
    script = "import sys, alignment.scaling; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_the_document_s_tables_are_what_its_commands_print():
    text = (ROOT / "docs" / "scaling.md").read_text()
    commands = [c for c in re.findall(r"`python -m alignment\.scaling ([^`\n]+)`", text) if "--plot" not in c]
    assert len(commands) == 5
    for one in commands:
        assert command(*one.split()).stdout.strip() in text, one


def test_a_chart_with_two_logarithmic_axes():
    drawn = line_chart("t", "x", "y", {"a": [(8, 0.5), (64, 50)]}, logarithmic_y=True)
    assert all(f">{tick}</text>" in drawn for tick in ("0.1", "1", "10", "100"))
