"""Choosing vLLM for the rollouts where it cannot sample: refused before anything is trained, with the remedy.

What it samples where it can is seen in test_vllm.py.
"""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignment.config import load_config
from alignment.errors import ConfigError
from alignment.stages import begin
from config_effects import vllm_asked
from flow_runs import SMOKE
from models.sampling import Sampling
from models.vllm_engine import VllmEngine, load_vllm, named_weights, stream_seed


def test_without_vllm_a_run_ends_as_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = load_config(SMOKE, [f"run.root={tmp_path}", "rollouts.engine=vllm"])
    with pytest.raises(ConfigError, match=r"needs vLLM, which is not installed: pip install .*requirements-vllm\.txt"):
        begin(config, "run")


def test_a_vllm_that_lacks_a_package_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(ConfigError, match=r"cannot be imported \(No module named 'no_such_package'\): pip install"):
        load_vllm("policy", gpu=False, dtype="float32", max_tokens=8, batch_tokens=8, tensor_parallel=1)


def test_weights_are_shared_by_workers_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"vllm_tensor_parallel \(2\) needs as many workers .* set it to 1"):
        load_vllm("policy", gpu=False, dtype="float32", max_tokens=8, batch_tokens=8, tensor_parallel=2)


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [([], "float32"), (["resources.gpu=1"], "bfloat16"), (["resources.gpu=1", "policy.dtype=float32"], "float32")],
)
def test_vllm_samples_in_the_type_of_the_policy(overrides: list[str], dtype: str) -> None:
    config = load_config(SMOKE, ["rollouts.engine=vllm", *overrides])
    assert vllm_asked("dtype")(config) == dtype


def test_a_streams_seed_is_its_names_alone() -> None:
    """The first 63 bits of `printf 0/step-1/a/0 | sha256sum`."""
    assert stream_seed("0/step-1/a/0") == 0x6EAF8B6CF94E8D32 >> 1
    assert len({stream_seed(f"0/step-1/a/{k}") for k in range(1000)}) == 1000


class StandInLLM:
    """Stands in for vLLM's LLM: notes what it is asked, and takes the weights or cannot. It has nothing to generate."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[str] = []
        self.error = error
        self.llm_engine = SimpleNamespace(
            model_config=None, has_unfinished_requests=lambda: False, abort_request=lambda _: self.calls.append("abort")
        )

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append("wake_up " + ",".join(tags or ["all"]))

    def apply_model(self, _: Any) -> list[set[str]]:
        if self.error:
            raise self.error
        self.calls.append("weights")
        return [set()]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return True

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")


def test_an_engine_that_cannot_load_the_weights_goes_back_to_sleep() -> None:
    llm = StandInLLM(RuntimeError("no room"))
    engine = VllmEngine(llm, sleeps=True, tensor_parallel=1)
    with pytest.raises(RuntimeError, match="no room"):
        next(engine.responses([], [[1]], [["s"]], Sampling(3), [2]))
    assert llm.calls == ["wake_up weights", "sleep 2"]


def test_an_engine_sleeps_after_it_has_generated() -> None:
    """The cache comes back only once the weights are there, and what older weights filled of it is dropped first."""
    llm = StandInLLM()
    assert list(VllmEngine(llm, sleeps=True, tensor_parallel=1).responses([], [], [], Sampling(3), [2])) == []
    assert llm.calls == ["wake_up weights", "weights", "wake_up all", "reset_prefix_cache", "abort", "sleep 2"]


def test_an_engine_that_cannot_sleep_is_not_asked_to() -> None:
    llm = StandInLLM()
    list(VllmEngine(llm, sleeps=False, tensor_parallel=1).responses([], [], [], Sampling(3), [2]))
    assert llm.calls == ["weights", "reset_prefix_cache", "abort"]


def test_the_engine_is_given_the_buffers_that_a_checkpoint_holds() -> None:
    class Router(torch.nn.Module):
        """Stands in for a router of experts: one buffer is saved with the weights, the other is not."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
            self.register_buffer("e_score_correction_bias", torch.full((2,), 3.0))
            self.register_buffer("inv_freq", torch.ones(2), persistent=False)

    found = {name: tensor.tolist() for name, tensor in named_weights(torch.nn.Sequential(Router()))}
    assert found == {"0.weight": [1, 1], "0.e_score_correction_bias": [3, 3]}
