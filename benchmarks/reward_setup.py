"""What the scoring benchmarks score with: the default reward model, in this process and exported for Triton."""

import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from alignment.config_sections import RewardSection
from alignment.embedded import reward_model_folder
from alignment.reward_server import RewardServer, reward_server
from alignment.scoring import REQUESTS_IN_FLIGHT, RewardClient
from alignment.task import START_S
from benchmarks.in_process import LocalRewardModel
from benchmarks.rounds import Way

SEED = 0
"""Of the head's weights: throughput does not depend on training."""
NAME = "reward_model"
DEADLINE_S = 600.0


def default_reward_model(max_tokens: int, threads: int) -> LocalRewardModel:
    """The default encoder with a drawn head, on `threads` torch threads of this process."""
    import torch

    from models.reward_model import load_reward_model

    torch.set_num_threads(threads)
    defaults = RewardSection()
    source = reward_model_folder(defaults.model, Path.cwd())
    model, tokenizer = load_reward_model(str(source), seed=SEED)
    return LocalRewardModel(model, tokenizer, defaults.template, max_tokens, defaults.token_budget)


def export(local: LocalRewardModel, repository: Path, *, instances: int = 1) -> Path:
    """Export it as version 1 of a new repository; returns the folder of its weights and tokenizer."""
    from models.reward_export import Serving, export_version

    ref = export_version(
        local.model,
        local.tokenizer,
        repository=repository,
        name=NAME,
        serving=Serving(
            template=local.template,
            max_tokens=local.max_tokens,
            token_budget=local.token_budget,
            instances=instances,
        ),
        card={},
    )
    return repository / NAME / ref.version / "weights"


@contextmanager
def served(repository: Path, *, threads: int, log: Path) -> Iterator[RewardServer]:
    """The real Triton with what `repository` holds, ready to score."""
    with reward_server(
        repository=repository, name=NAME, version="1", url=None, grpc_port=0, log=log, threads=threads
    ) as server:
        with ready_client(server):
            pass
        yield server


@contextmanager
def ready_client(server: RewardServer) -> Iterator[RewardClient]:
    """The product's client, ready to score, with deadlines that no slow machine misses."""
    with RewardClient(server.url, timeout_s=DEADLINE_S, check=server.check) as client:
        client.wait_ready(START_S)
        yield client


@contextmanager
def callers(server: RewardServer, conversations: Sequence[Any], concurrency: int) -> Iterator[Way]:
    """A way of scoring: `concurrency` callers, each with one request of one conversation in flight.

    A client bounds its requests in flight, so there are as many clients as it takes.
    """
    with ExitStack() as stack:
        count = -(-concurrency // REQUESTS_IN_FLIGHT)
        clients = [stack.enter_context(ready_client(server)) for _ in range(count)]
        free, mine = clients * REQUESTS_IN_FLIGHT, threading.local()

        def take_client() -> None:
            mine.client = free.pop()

        def score_one(conversation: Any) -> float:
            reward: float = mine.client.score([conversation])[0]
            return reward

        pool = stack.enter_context(ThreadPoolExecutor(concurrency, initializer=take_client))
        yield lambda: list(pool.map(score_one, conversations))


def token_counters(log: Path) -> Callable[[], tuple[float, float]]:
    """A function that reads the server's own counters: real tokens and padded tokens so far."""
    url = _metrics_url(log)

    def read() -> tuple[float, float]:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        found = [re.findall(rf"^reward_tokens_{kind}_total\{{.*\}} (\S+)$", text, re.M) for kind in ("real", "padded")]
        real, padded = (sum(map(float, values)) for values in found)
        return real, padded

    return read


def _metrics_url(log: Path) -> str:
    """The launcher prints it once it has seen the model answer, which a client may see first."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if found := re.search(r"^ +metrics +(\S+)", log.read_text(encoding="utf-8", errors="replace"), re.M):
            return found[1]
        time.sleep(0.1)
    raise TimeoutError(f"{log} names no metrics URL")
