"""Peer: OpenRLHF's way to serve a reward model, an async FastAPI server that blocks while it scores.

One text per POST. The handler is a coroutine that calls the model directly, so the event loop stands still
during a forward pass and nothing is ever batched. The client keeps its connections open, which the original
does not: that is in the peer's favour.

    python -m benchmarks.peers.fastapi_server --weights DIR --max-tokens 512 --threads 2 --port 8000

Left out: rendering. As there, the client sends the text that the model reads.
"""

import argparse
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignment.errors import RewardServerError
from alignment.launch import SOURCE_ROOT
from infra.triton import log_tail
from infra.triton_setup import free_ports

START_S = 120.0


def reward_of(model: Any, tokenizer: Any, max_tokens: int) -> Callable[[str], float]:
    """A function that scores one text by one forward pass of its own."""
    import torch

    from models.reward_model import encode

    def reward(text: str) -> float:
        ids = torch.tensor(encode(tokenizer, [text], max_tokens))
        with torch.inference_mode():
            return float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item())

    return reward


def application(reward: Callable[[str], float]) -> Any:
    """The server: POST /get_reward {"query": TEXT} answers {"reward": NUMBER}."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

    app = FastAPI()

    @app.post("/get_reward")
    async def get_reward(request: Request) -> JSONResponse:
        query = (await request.json())["query"]
        return JSONResponse({"reward": reward(query)})

    return app


class PostingClient:
    """Posts one text per request, `concurrency` of them at a time, to 127.0.0.1:`port`."""

    def __init__(self, port: int, concurrency: int) -> None:
        self._port, self._concurrency = port, concurrency

    def score(self, texts: Sequence[str]) -> list[float]:
        """The reward of each text, in order. Raises RewardServerError for an answer other than 200."""
        mine = threading.local()
        opened: list[http.client.HTTPConnection] = []

        def connect() -> None:
            mine.connection = http.client.HTTPConnection("127.0.0.1", self._port)
            opened.append(mine.connection)

        def post(text: str) -> float:
            mine.connection.request("POST", "/get_reward", json.dumps({"query": text}).encode())
            response = mine.connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise RewardServerError(f"the FastAPI server answered {response.status}: {body[:200]!r}")
            return float(json.loads(body)["reward"])

        try:
            with ThreadPoolExecutor(self._concurrency, initializer=connect) as pool:
                return list(pool.map(post, texts))
        finally:
            for connection in opened:
                connection.close()


@contextmanager
def served_by_fastapi(weights: Path, *, max_tokens: int, threads: int, log: Path) -> Iterator[int]:
    """Serve the weights in a process of their own until the context ends; yields the port."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "benchmarks.peers.fastapi_server", "--weights", str(weights)]
    command += ["--max-tokens", str(max_tokens), "--threads", str(threads), "--port", str(port)]
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=SOURCE_ROOT, stdout=output, stderr=output)
    try:
        _wait_ready(process, port, log)
        yield port
    finally:
        process.terminate()
        process.wait()


def _wait_ready(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            PostingClient(port, 1).score(["ready?"])
            return
        except ConnectionRefusedError:
            time.sleep(0.25)
    raise RewardServerError(f"the FastAPI server did not get ready; the last lines of {log}:\n{log_tail(log)}")


def main() -> None:
    """Load the model and serve it until a signal ends the process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", required=True, help="folder of the model and its tokenizer")
    for name in ("max-tokens", "threads", "port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    import torch
    import uvicorn

    from models.reward_model import load_reward_model

    torch.set_num_threads(options.threads)
    model, tokenizer = load_reward_model(options.weights, require_head=True)
    app = application(reward_of(model, tokenizer, options.max_tokens))
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
