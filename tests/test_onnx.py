"""Reward models through ONNX Runtime, which requirements-dev.txt brings."""

import json
import re
from pathlib import Path

import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig, Qwen2Config, RobertaConfig

from alignment.errors import ConfigError, ModelError
from alignment.scoring import RewardClient
from models import onnx_export
from models.onnx_export import check_onnx, write_onnx
from models.reward_export import export_version, read_version
from models.reward_model import score_texts
from reward_fixtures import MAX_TOKENS, served_repository, tiny_reward_model, tiny_serving


def export(repository: Path, **changes: object) -> Path:
    model, tokenizer = tiny_reward_model()
    serving = tiny_serving(runtime="onnxruntime", **changes)
    ref = export_version(model, tokenizer, repository=repository, name="m", serving=serving, card={})
    return repository / "m" / ref.version


@pytest.mark.parametrize("config", [LlamaConfig(), Qwen2Config(), GPT2Config()])
def test_decoders_are_refused(config, monkeypatch):
    monkeypatch.setattr(onnx_export, "PACKAGES", ())
    with pytest.raises(ConfigError, match=rf"reward\.runtime \(onnxruntime\) cannot serve {config.model_type}, a dec"):
        check_onnx(config)


@pytest.mark.parametrize("config", [BertConfig(), RobertaConfig()])
def test_encoders_are_not(config, monkeypatch):
    monkeypatch.setattr(onnx_export, "PACKAGES", ())
    check_onnx(config)


def test_a_missing_package_is_named_with_its_remedy_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "PACKAGES", ("json", "no_such_package"))
    expected = "reward.runtime (onnxruntime) needs no_such_package: `pip install -r requirements-onnx.txt`"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        export(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_it_does_not_go_with_a_model_laid_over_gpus(tmp_path):
    with pytest.raises(ConfigError, match=r"reward\.runtime \(onnxruntime\) cannot .*reward\.device_map \(auto\)"):
        export(tmp_path, device_map="auto")


def test_the_graph_serves_the_rewards_of_the_weights_and_its_damage_is_seen(tmp_path):
    repository = tmp_path / "repository"
    version = export(repository)
    assert json.loads((version / "settings.json").read_text())["runtime"] == "onnxruntime"
    texts = ["a", "some words", "w" * 60, "x" * 200]
    rendered = [f"user: {text}\n" for text in texts]
    expected = score_texts(*tiny_reward_model(), rendered, max_tokens=MAX_TOKENS)
    with served_repository(repository) as server, RewardClient(server.url, model_name="m") as client:
        rewards = client.score([[{"role": "user", "content": text}] for text in texts])
    assert rewards == pytest.approx(expected, abs=1e-4)
    read_version(repository, "m", "1")
    graph = (version / "model.onnx").read_bytes()
    (version / "model.onnx").write_bytes(graph[:-1] + bytes([graph[-1] ^ 1]))
    with pytest.raises(ModelError, match="the weights or the graph are damaged"):
        read_version(repository, "m", "1")


def test_a_graph_that_differs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    with pytest.raises(ModelError, match=r"outputs of 1 texts of 3 tokens differ by .* set reward\.runtime to torch"):
        write_onnx(tiny_reward_model()[0], tmp_path / "model.onnx")
