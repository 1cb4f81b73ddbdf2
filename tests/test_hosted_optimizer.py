"""AdamW's state moved to the host between updates: here from one place of it to another, by the same code."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

import config_effects as see
from alignment import config_checks
from alignment.config_training import TrainingSection
from alignment.engine import Ranks, build_engine, optimizer_tensors, start_ranks
from alignment.hosted_optimizer import HostedOptimizer
from alignment.judge_stage import prepare_judge
from alignment.update import update
from models.adapters import trainable_tensors
from models.checkpoints import checkpoint_folder, read_optimizer_state
from models.sequence_loss import SequenceLoss
from reward_runs import in_this_process
from test_trained_policy import saved, smoke
from tiny import tiny_llama
from update_ranks import rollouts, with_adapters

FULL, HALF = torch.float32, torch.bfloat16
WAYS = {
    "float32": ({}, FULL, 8),
    "bfloat16": ({}, HALF, 12),
    "zero 1": ({"zero_stage": 1}, FULL, 12),
    "zero 2, bfloat16": ({"zero_stage": 2}, HALF, 12),
    "zero 3": ({"zero_stage": 3}, FULL, 12),
    "lora": ({"lora_rank": 2}, FULL, 8),
    "lora, zero 2": ({"lora_rank": 2, "zero_stage": 2}, FULL, 12),
}
"""Settings, the weights' type, and bytes of state for a trained weight: two moments, and a master if there is one."""


def trained(settings: dict[str, Any], dtype: torch.dtype, *, moved: bool) -> tuple[dict[str, torch.Tensor], int, int]:
    """Weights and state after three updates, how many weights are trained, and the bytes that moved at last."""
    training = TrainingSection(lr=1e-2, micro_batch_size=2, **settings)
    start_ranks(threads=1, gpu=False)
    model: Any = tiny_llama().to(dtype)
    if training.lora_rank:
        model = with_adapters(model, training)
    engine = build_engine(SequenceLoss(model, packed=True), training, zero_stage=training.zero_stage, world_size=1)
    hosted, freed = HostedOptimizer(engine), 0
    for step in range(3):
        if moved:
            freed = hosted.put_away()
            assert hosted.is_away == (freed > 0) and hosted.put_away() == 0
            sizes = [t.untyped_storage().nbytes() for t in optimizer_tensors(engine).values() if t.dim()]
            assert not any(sizes)
            hosted.bring_back()
            assert not hosted.is_away
        update(engine, rollouts(), training, Ranks(0, 1), lr=training.lr, stream=f"step-{step}")
    found = {**trainable_tensors(model), **{name: t.clone() for name, t in optimizer_tensors(engine).items()}}
    return found, sum(t.numel() for t in trainable_tensors(model).values()), freed


@pytest.mark.parametrize("way", WAYS)
def test_weights_and_moments_are_bit_for_bit_those_of_state_that_stays(way: str) -> None:
    settings, dtype, size = WAYS[way]
    ends: list[tuple[dict[str, torch.Tensor], int, int]] = []
    for moved in (False, True):
        in_this_process(lambda moved=moved: ends.append(trained(settings, dtype, moved=moved)))
    (stayed, weights, _), (moved_away, _, freed) = ends
    assert stayed.keys() == moved_away.keys()
    assert all(torch.equal(stayed[name], moved_away[name]) for name in stayed)
    assert size * weights <= freed < size * weights + 4096  # DeepSpeed pads its flat groups


def test_the_weights_that_are_sampled_stay_where_they_are() -> None:
    def build() -> None:
        start_ranks(threads=1, gpu=False)
        model = tiny_llama()
        engine = build_engine(SequenceLoss(model, packed=True), TrainingSection(), zero_stage=2, world_size=1)
        ids = torch.tensor([[3, 4, 5]])
        with torch.no_grad():
            before = model(ids).logits
            hosted = HostedOptimizer(engine)
            assert hosted.put_away() > 0
            assert torch.equal(model(ids).logits, before)
            with hosted.at_hand():
                assert not hosted.is_away
            assert hosted.is_away

    in_this_process(build)


def test_whole_rs_steps_and_their_checkpoints_are_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    root, ends = tmp_path_factory.mktemp("runs"), []
    prepare_judge(smoke(root, "judge.num_train_pairs=64"), root / "judge", print)
    for setting in ("false", "true"):
        with patch.object(config_checks, "_check_offloading", lambda config: None):
            config = smoke(root, "training.zero_stage=2", f"training.offload_during_rollouts={setting}")
            run = see.new_run(config)
            see.run_iteration(config, run, until=2)
            trainer = see.run_iteration(config, run, until=4).trainer
        assert trainer.start == 2 and (trainer.hosted is not None and trainer.hosted.is_away) == (setting == "true")
        ends.append({**saved(run, 4), **read_optimizer_state(checkpoint_folder(run.checkpoints, 4), 0)})
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
