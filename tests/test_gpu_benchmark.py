"""The benchmark on a GPU, here on a CPU with its tiny model: that every measurement is made and written."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.card import Card, least_rollout_seconds
from benchmarks.gpu_model import TINY, write_policy
from benchmarks.rollouts import UNDRAWN
from tiny import VOCABULARY, tiny_llama


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_measurement_is_written_and_a_failure_is_told(tmp_path: Path, monkeypatch, capsys) -> None:
    def broken(run: gpu.Run) -> gpu.Found:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.MEASUREMENTS, "prefill", broken)
    assert gpu.main(["--tiny", "--rounds", "1", "--out", str(tmp_path / "gpu.json")]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["measurements"]) == [name for name in gpu.MEASUREMENTS if name != "prefill"]
    assert found["failed"] == {"prefill": "RuntimeError: no such kernel"}
    assert "no such kernel" in capsys.readouterr().err
    rollouts, updates = found["measurements"]["rollouts_small"], found["measurements"]["updates_small"]
    assert rollouts["rollouts_vs_generate"]["ratio"] > 0 and rollouts["seconds"].keys() == {"ours", "generate"}
    assert updates["update_vs_plain_torch"].keys() == {"float32 under autocast", "bfloat16 without masters"}
    assert updates["memory_mb"]["ours"] == {"held": None, "peak": None}  # nobody counts a CPU's
    assert found["measurements"]["state_moves"]["moved_mb"] > 0
    assert gpu.main(["--tiny", "--rounds", "1", "--only", "rollouts_kernels", "--out", str(tmp_path / "b.json")]) == 0


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--tiny" in capsys.readouterr().err


def test_the_undrawn_token_is_out_of_reach(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_policy(TINY, tmp_path, device="cpu", dtype="bfloat16", undrawn=UNDRAWN)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(100, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(ids).logits.log_softmax(-1)[..., UNDRAWN].max() < -50


def test_the_least_time_of_rollouts_by_hand() -> None:
    model = tiny_llama()
    work = {"samples": 2, "tokens": 4}
    # Layers: q and o of 32 x 32, k and v of 32 x 16, three of 32 x 64, two norms; a last norm and the head.
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32 + 32 * VOCABULARY
    cached = 2 * 2 * 2 * 8  # layers x (keys, values) x key heads x head size
    moved = 4 * (4 * weights + cached * (3 * (3 + 5) + 4 * (1 + 2 + 3)))
    slow_memory = Card("cpu", "float32", bandwidth=1.0, rate=1e30)
    assert least_rollout_seconds(slow_memory, model, [3, 5], **work) == moved
    slow_products = Card("cpu", "float32", bandwidth=1e30, rate=1.0)
    assert least_rollout_seconds(slow_products, model, [3, 5], **work) > 2 * 2 * (weights - 32 * VOCABULARY)
