"""Whole RS steps in which what is trained is not what is sampled: LoRA adapters, weights that ZeRO-3 shards."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import config_effects as see
from alignment.config import load_config
from alignment.continuation import differences, task_of
from alignment.errors import ConfigError
from alignment.judge_stage import prepare_judge
from alignment.stages import begin
from alignment.trained_policy import ADAPTERS
from models.adapters import merge_lora
from models.checkpoints import checkpoint_folder

SMOKE = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"
WAYS = {
    "lora": ("training.lora_rank=2", "training.kl_penalty=0.1"),
    "zero-3": ("training.zero_stage=3", "training.kl_penalty=0.1"),
    "lora under zero-3": ("training.lora_rank=2", "training.zero_stage=3"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where the runs lie, with a judge."""
    root = tmp_path_factory.mktemp("runs")
    prepare_judge(smoke(root, "judge.num_train_pairs=64"), root / "judge", print)
    return root


def smoke(root, *overrides):
    own = [f"run.root={root}", "wandb.mode=disabled", "loop.max_steps=4", "loop.steps_per_iteration=4"]
    return load_config(SMOKE, [*own, "loop.keep_last=4", "training.lr=0.01", *overrides])


def saved(run, step):
    """The weights of a checkpoint, as transformers reads them."""
    return AutoModelForCausalLM.from_pretrained(checkpoint_folder(run.checkpoints, step)).state_dict()


@pytest.mark.parametrize("way", WAYS)
def test_the_copy_follows_and_a_run_that_goes_on_is_the_run_that_was_not_interrupted(root, way):
    config = smoke(root, *WAYS[way])
    whole, halves = see.new_run(config), see.new_run(config)
    see.run_iteration(config, whole, until=4)
    trainer = see.run_iteration(config, halves, until=2).trainer
    resumed = see.run_iteration(config, halves, until=4).trainer
    assert (trainer.start, resumed.start, resumed.lost_moments) == (0, 2, "")
    ends = [saved(run, 4) for run in (whole, halves)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not all(torch.equal(ends[0][name], tensor) for name, tensor in saved(whole, 2).items())
    policy, trained = resumed.policy.model, resumed.engine.module.policy
    assert trained is not policy
    assert all(torch.equal(policy.state_dict()[name], tensor) for name, tensor in ends[1].items())
    if way == "lora":
        merged = merge_lora(trained).state_dict()
        assert all(torch.equal(policy.state_dict()[name], tensor) for name, tensor in merged.items())
    assert (checkpoint_folder(whole.checkpoints, 4) / ADAPTERS).exists() == ("lora" in way)
    kl = [m["kl"] for m in whole.read_metrics() if m["kind"] == "step"]
    if "training.kl_penalty=0.1" in WAYS[way]:
        assert kl[0] == pytest.approx(0, abs=1e-5) and kl[3] > 1e-4  # the policy starts as its base
    else:
        assert kl == [None] * 4


def test_sharded_weights_train_as_whole_ones_do(root):
    ends = []
    for stage in (0, 3):
        config = smoke(root, f"training.zero_stage={stage}", "loop.max_steps=2", "loop.steps_per_iteration=2")
        run = see.new_run(config)
        see.run_iteration(config, run)
        ends.append(saved(run, 2))
    for name, tensor in ends[0].items():
        # AdamW makes steps of 0.01 whatever a gradient's size: where it is nearly 0, rounding shows.
        torch.testing.assert_close(tensor, ends[1][name], atol=1e-3, rtol=0)


def test_a_run_that_cannot_be_trained_so_ends_as_it_begins(root, monkeypatch):
    schedule = ["training.lr_schedule=linear", "training.constant_steps=20", "loop.max_epochs=1", "loop.max_steps=30"]
    with pytest.raises(ConfigError, match=r"training\.constant_steps \(20\) must be < the 20 steps"):
        begin(smoke(root, *schedule), "too-many-constant-steps")
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"training\.gradient_checkpointing \(true\): LlamaForCausalLM has none"):
        begin(smoke(root, "training.gradient_checkpointing=true"), "no-gradient-checkpointing")


def test_the_scale_of_adapters_counts_where_there_are_some(root):
    assert differences(*(task_of(smoke(root, f"training.lora_alpha={alpha}")) for alpha in (2, 4))) == []


def test_adapters_do_not_go_on_from_another_shape(root):
    first = smoke(root, "training.lora_rank=2", "loop.max_steps=2", "loop.steps_per_iteration=2")
    run = see.new_run(first)
    see.run_iteration(first, run)
    for changed in ("training.lora_rank=0", "training.lora_alpha=2"):
        other = smoke(root, "training.lora_rank=2", changed, f"resume.from={run.path.name}")
        with pytest.raises(Exception, match=rf"{changed.split('=')[0]} \(.* there, {changed[-1]} here\)"):
            see.new_run(other)
