"""2,000 texts are scored while everything around them fails: each gets its own reward, none a wrong one or two."""

import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from alignment.scoring import RewardClient
from models.reward_model import render, score_texts
from reward_fixtures import (
    MAX_TOKENS,
    TEMPLATE,
    RunningServer,
    command_line,
    descendants,
    export_tiny,
    served_repository,
    tiny_reward_model,
)
from test_triton import good, infer, wait_until

TEXTS = 2_000
FAULTS = 5
GARBAGE = [b"\xff\xfe", b"{not json", b"[]", b'[{"role": "user"}]', b'{"input_ids": [-1]}', b'{"input_ids": []}']


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The tiny model with a queue that is soon full, served by a launcher that takes up new versions."""
    repository = tmp_path_factory.mktemp("faults") / "triton_repo"
    export_tiny(repository)
    config = repository / "reward_model" / "config.pbtxt"
    text, batching = config.read_text(), "dynamic_batching {"
    assert text.count(batching) == 1
    config.write_text(text.replace(batching, f"{batching} default_queue_policy {{ max_queue_size: 16 }}"))
    with served_repository(repository, "--follow") as running:
        yield running


def conversations() -> list[list[dict[str, str]]]:
    return [
        [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "word " * (i % 13) + str(i)}]
        for i in range(TEXTS)
    ]


def lose(part: str, server: RunningServer) -> None:
    """Kill all processes of the server whose program is `part`."""
    victims = [pid for pid in descendants(server.pid) if part in command_line(pid).split("\0")[0]]
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)


def fill_the_queue(server: RunningServer) -> None:
    """Ask for more than the queue holds, from so many threads, until somebody was turned away for it."""
    turned_away = threading.Event()

    def ask(_: int) -> None:
        with triton.InferenceServerClient(server.url) as client:
            while not turned_away.is_set():
                try:
                    infer(client, *[good("flood " * 15)] * 8)
                except InferenceServerException as error:
                    assert "UNAVAILABLE" in error.status()
                    turned_away.set()

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(ask, range(32)))


def send_garbage(server: RunningServer) -> None:
    with triton.InferenceServerClient(server.url) as client:
        for bad in GARBAGE * 10:
            with pytest.raises(InferenceServerException, match="conversation 0: "):
                infer(client, bad)
        for wrong, kind in (
            (triton.InferInput("conversation", [1, 1], "INT32"), np.int32),
            (triton.InferInput("conversation", [0, 1], "BYTES"), np.object_),
        ):
            wrong.set_data_from_numpy(np.zeros(wrong.shape(), kind))
            with pytest.raises(InferenceServerException, match=r"(?i)invalid|expected|batch"):
                client.infer("reward_model", [wrong])


def swap_versions(server: RunningServer, repository: Path) -> None:
    """Export version 2 and wait until requests that name no version go to it."""
    assert export_tiny(repository, seed=1) == "2"
    with triton.InferenceServerClient(server.url) as client:
        wait_until(
            lambda: infer(client, good("a")).get_response().model_version == "2", "version 2 answers the unpinned"
        )


@pytest.mark.slow
def test_2000_texts_get_2000_correct_rewards_whatever_happens(server):
    repository = server.log.with_suffix("")
    asked, size = conversations(), TEXTS // FAULTS
    faults = [
        lambda: send_garbage(server),
        lambda: lose("triton_python_backend_stub", server),
        lambda: fill_the_queue(server),
        lambda: lose("tritonserver", server),
        lambda: swap_versions(server, repository),
    ]
    rewards: list[float] = []
    with (
        RewardClient(server.url, model_version="1", timeout_s=20, patience_s=120) as client,
        ThreadPoolExecutor(1) as pool,
        triton.InferenceServerClient(server.url) as watcher,
    ):
        client.wait_ready(120)
        for number, fault in enumerate(faults):
            before = executions(watcher)
            scoring: Future[list[float]] = pool.submit(client.score, asked[number * size : (number + 1) * size])
            wait_until(lambda before=before: executions(watcher) > before, "scoring has begun")
            fault()
            rewards += scoring.result(timeout=240)
    model, tokenizer = tiny_reward_model()
    texts = [render(TEMPLATE, messages) for messages in asked]
    assert len(set(texts)) == len(rewards) == TEXTS
    assert rewards == pytest.approx(score_texts(model, tokenizer, texts, max_tokens=MAX_TOKENS), abs=1e-4)


def executions(client: triton.InferenceServerClient) -> int:
    """How often version 1 has been executed since its server was started."""
    return int(client.get_inference_statistics("reward_model", "1").model_stats[0].execution_count)
