"""What a run says of the disk: parameters counted from headers, sizes by hand, a warning where it will not fit."""

import pytest
import torch
from safetensors.torch import save_file

from alignment import disk
from alignment.config import load_config
from alignment.disk import checkpoint_bytes, count_parameters, disk_needs, shown
from config_effects import new_run
from flow_runs import SMOKE


def test_parameters_are_counted_over_all_shards(tmp_path):
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(())}, tmp_path / "one.safetensors", metadata={"format": "pt"})
    save_file({"c": torch.zeros(5)}, tmp_path / "two.safetensors")
    assert count_parameters(tmp_path) == 12 + 1 + 5


def test_needs_are_those_of_checkpoints_and_rollouts(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "tensor_shapes", lambda _: [[1_000_000]])
    config = load_config(SMOKE, [f"run.root={tmp_path}", "loop.keep_last=2"])
    run = new_run(config)
    # 12 bytes a parameter; 2 newest, the best, one being written. 4 steps of 4 × 4 responses of at most 64 + 12 tokens.
    needed = 4 * 12_000_000 + 4 * 16 * (76 * 2 + 12 * 4)
    said = disk_needs(config, run, 4)
    assert said.startswith(
        f"disk: up to {shown(needed)} under {run.path} (4 checkpoints of 12 MB, the rest rollouts); "
    )
    assert said.endswith("is free")
    zero = load_config(SMOKE, [f"run.root={tmp_path}", "loop.keep_last=2", "training.zero_stage=2"])
    assert "(4 checkpoints of 16 MB, " in disk_needs(zero, run, 4)  # ZeRO keeps an fp32 copy of its own
    monkeypatch.setattr(disk, "tensor_shapes", lambda _: [[10**15]])
    assert "WARNING: that will not fit: free space" in disk_needs(config, run, 4)


@pytest.mark.parametrize(
    ("overrides", "each", "adapters"),
    [
        (["policy.dtype=float32"], 12, 0),
        (["policy.dtype=float32", "training.zero_stage=1"], 16, 0),
        (["policy.dtype=bfloat16"], 14, 0),
        (["policy.dtype=bfloat16", "training.zero_stage=3"], 14, 0),
        (["training.lora_rank=2"], 4, 12),
        (["training.lora_rank=2", "training.zero_stage=2"], 4, 16),
        (["policy.dtype=bfloat16", "training.lora_rank=2"], 2, 12),
    ],
)
def test_a_checkpoint_is_as_large_as_its_tensors(overrides, each, adapters):
    """Adapters of rank 2 on a matrix of 3 x 4 have 2 x 7 parameters."""
    config = load_config(SMOKE, overrides)
    assert checkpoint_bytes(config, [[3, 4], [5]]) == each * 17 + adapters * 14


def test_on_a_gpu_auto_is_bfloat16():
    assert checkpoint_bytes(load_config(SMOKE, ["resources.gpu=1"]), [[100]]) == 1400


def test_sizes_as_people_say_them():
    assert [shown(size) for size in (1500, 12e6, 1.614e9, 2.5e12)] == ["1.5 kB", "12 MB", "1.6 GB", "2500.0 GB"]
