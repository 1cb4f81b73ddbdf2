"""What a run says of the disk: parameters counted from headers, sizes by hand, a warning where it will not fit."""

import torch
from safetensors.torch import save_file

from alignment import disk
from alignment.config import load_config
from alignment.disk import count_parameters, disk_needs, shown
from config_effects import new_run
from flow_runs import SMOKE


def test_parameters_are_counted_over_all_shards(tmp_path):
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(())}, tmp_path / "one.safetensors", metadata={"format": "pt"})
    save_file({"c": torch.zeros(5)}, tmp_path / "two.safetensors")
    assert count_parameters(tmp_path) == 12 + 1 + 5


def test_needs_are_those_of_checkpoints_and_rollouts(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "count_parameters", lambda _: 1_000_000)
    config = load_config(SMOKE, [f"run.root={tmp_path}", "loop.keep_last=2"])
    run = new_run(config)
    # 12 bytes a parameter; 2 newest, the best, one being written. 4 steps of 4 × 4 responses of at most 64 + 12 tokens.
    needed = 4 * 12_000_000 + 4 * 16 * 76 * 2
    said = disk_needs(config, run, 4)
    assert said.startswith(
        f"disk: up to {shown(needed)} under {run.path} (4 checkpoints of 12 MB, the rest rollouts); "
    )
    assert said.endswith("is free")
    zero = load_config(SMOKE, [f"run.root={tmp_path}", "loop.keep_last=2", "training.zero_stage=2"])
    assert "(4 checkpoints of 16 MB, " in disk_needs(zero, run, 4)  # ZeRO keeps an fp32 copy of its own
    monkeypatch.setattr(disk, "count_parameters", lambda _: 10**15)
    assert "WARNING: that will not fit: free space" in disk_needs(config, run, 4)


def test_sizes_as_people_say_them():
    assert [shown(size) for size in (1500, 12e6, 1.614e9, 2.5e12)] == ["1.5 kB", "12 MB", "1.6 GB", "2500.0 GB"]
