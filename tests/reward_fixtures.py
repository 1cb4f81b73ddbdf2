"""A tiny reward model with random weights, exported and served by the real Triton, once per test session."""

import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from models.reward_export import Serving

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MAX_TOKENS = 96
ONE_DRAWS = threading.Lock()
"""Torch's generator is one for all threads."""


@dataclass(frozen=True)
class ServedRewardModel:
    """A running server with one exported version; `model` and `tokenizer` are the same in process."""

    url: str
    http_url: str
    metrics_url: str
    repository: Path
    name: str
    version: str
    model: BertForSequenceClassification
    tokenizer: PreTrainedTokenizerFast


@dataclass(frozen=True)
class RunningServer:
    """A launcher and what it prints."""

    url: str
    metrics_url: str
    log: Path
    pid: int


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, with BERT's special tokens around a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
    )


def tiny_reward_model(seed: int = 0) -> tuple[BertForSequenceClassification, PreTrainedTokenizerFast]:
    """A two-layer BERT with one output; weights are large enough for rewards to differ between texts."""
    tokenizer = byte_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.5,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    with ONE_DRAWS, torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
    return model.eval(), tokenizer


def export_tiny(repository: Path, *, name: str = "reward_model", seed: int = 0, **card: object) -> str:
    """Export the tiny model as a new version; returns its number."""
    from models.reward_export import export_version

    model, tokenizer = tiny_reward_model(seed)
    return export_version(
        model, tokenizer, repository=repository, name=name, serving=tiny_serving(), card=dict(card)
    ).version


def tiny_serving(**changes: Any) -> "Serving":
    """How tiny models are served, with some settings changed."""
    from models.reward_export import Serving

    return Serving(**{"template": TEMPLATE, "max_tokens": MAX_TOKENS, "token_budget": 512, **changes})


def printed_url(log: Path, kind: str, server: subprocess.Popen[bytes] | None = None) -> str:
    """A URL that the launcher prints once it has seen the models answer, which a client may see first."""
    for _ in range(1800):
        assert server is None or server.poll() is None, log.read_text()
        lines = [line.split() for line in log.read_text().splitlines() if line.startswith(f"  {kind} ")]
        if lines:
            return lines[0][1]
        time.sleep(0.1)
    raise TimeoutError(f"{log} names no {kind} URL")


@contextmanager
def served_repository(repository: Path, *arguments: str) -> Iterator[RunningServer]:
    """All models of a repository behind a real Triton, once every model answers."""
    log = repository.with_suffix(".log")
    command = [sys.executable, "-m", "infra.triton", "--watch-stdin", "--repository", str(repository), *arguments]
    with open(log, "wb") as output:
        server = subprocess.Popen(
            [*command, "--threads", "1"], cwd=ROOT, stdin=subprocess.PIPE, stdout=output, stderr=output
        )
    assert server.stdin is not None
    try:
        yield RunningServer(printed_url(log, "gRPC", server), printed_url(log, "metrics", server), log, server.pid)
    finally:
        server.stdin.close()
        server.wait(60)


def triton_module(path: Path, stand_in: ModuleType | None = None) -> ModuleType:
    """A file that runs inside Triton as a module, with a stand-in (an empty one) for the module that Triton has."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_under_test", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["triton_python_backend_utils"] = stand_in or ModuleType("triton_python_backend_utils")
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["triton_python_backend_utils"]
    return module


def descendants(pid: int) -> set[int]:
    """All living processes below one, by the kernel's own list."""
    children = {int(c) for task in Path(f"/proc/{pid}/task").glob("*/children") for c in task.read_text().split()}
    return children.union(*(descendants(child) for child in children))


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.fixture(scope="session")
def served_reward_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedRewardModel]:
    """The tiny model behind a real Triton, ready to score."""
    from alignment.reward_server import reward_server
    from alignment.scoring import RewardClient

    folder = tmp_path_factory.mktemp("reward")
    version = export_tiny(folder / "triton_repo")
    log = folder / "server.log"
    with reward_server(
        repository=folder / "triton_repo",
        name="reward_model",
        version=version,
        url=None,
        grpc_port=0,
        log=log,
        threads=1,
    ) as server:
        with RewardClient(server.url, check=server.check) as client:
            client.wait_ready(120)
        yield ServedRewardModel(
            url=server.url,
            http_url=printed_url(log, "HTTP"),
            metrics_url=printed_url(log, "metrics"),
            repository=folder / "triton_repo",
            name="reward_model",
            version=version,
            **dict(zip(("model", "tokenizer"), tiny_reward_model(), strict=True)),
        )
