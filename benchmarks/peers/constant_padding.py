"""Peer: NeMo-Aligner's way to ask a reward server.

The client turns text into token ids, pads every row to the run's maximum length, sends a batch, and awaits its
rewards before it sends the next. The model is served by the same Triton, from the same weights, with the same
threads.
"""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alignment.errors import RewardServerError
from infra.triton import log_tail
from infra.triton_setup import EXIT_TIMEOUT_S, Ports, free_ports, prepare

BATCH = 8
"""Rows of a request: NeMo-Aligner's rollout_micro_batch_size."""
MODEL = "padded_reward_model"
START_S = 120.0
Rows = NDArray[np.int64]
CONFIG = f"""name: "{MODEL}"
backend: "python"
max_batch_size: {BATCH}
input [
  {{ name: "tokens" data_type: TYPE_INT64 dims: [ -1 ] }},
  {{ name: "sequence_lengths" data_type: TYPE_INT64 dims: [ 1 ] }}
]
output [ {{ name: "rewards" data_type: TYPE_FP32 dims: [ 1 ] }} ]
dynamic_batching {{ }}
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""


def pad(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[Rows, Rows]:
    """Rows padded on the right to `length`, and their own lengths. Shapes: (B, length) and (B,), int64."""
    tokens = np.full((len(rows), length), pad_id, dtype=np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, np.array([len(row) for row in rows], dtype=np.int64)


class ConstantPaddingClient:
    """Asks the server at `url` (host:port of gRPC) with rows of always `length` tokens."""

    def __init__(self, url: str, length: int, pad_id: int) -> None:
        import tritonclient.grpc as triton

        self._triton, self._client = triton, triton.InferenceServerClient(url)
        self._length, self._pad_id = length, pad_id

    def score(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Rewards of encoded texts, in order, batch after batch. Raises tritonclient's exception."""
        rewards: list[float] = []
        for start in range(0, len(rows), BATCH):
            rewards += self._infer(*pad(rows[start : start + BATCH], self._length, self._pad_id))
        return rewards

    def _infer(self, tokens: Rows, lengths: Rows) -> list[float]:
        inputs = []
        for name, values in (("tokens", tokens), ("sequence_lengths", lengths.reshape(-1, 1))):
            inputs.append(self._triton.InferInput(name, list(values.shape), "INT64"))
            inputs[-1].set_data_from_numpy(values)
        answer: list[float] = self._client.infer(MODEL, inputs).as_numpy("rewards").reshape(-1).tolist()
        return answer

    def close(self) -> None:
        self._client.close()


@contextmanager
def served_with_padding(weights: Path, *, threads: int, log: Path) -> Iterator[str]:
    """Serve the weights until the context ends; yields host:port of gRPC. Raises RewardServerError."""
    with tempfile.TemporaryDirectory(prefix="padded-") as scratch:
        folder = Path(scratch) / "models" / MODEL
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text(CONFIG, encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name("padded_model.py"), folder / "1" / "model.py")
        (folder / "1" / "weights").symlink_to(weights.resolve())
        ports = Ports(*free_ports(3))
        prepared = prepare(
            Path(scratch), {MODEL: ["1"]}, folder.parent, ports, f"{Path(scratch).name}_", threads=threads
        )
        with log.open("ab") as output:
            process = subprocess.Popen(prepared.command, env=prepared.environment, stdout=output, stderr=output)
        try:
            _wait_ready(process, f"127.0.0.1:{ports.grpc}", log)
            yield f"127.0.0.1:{ports.grpc}"
        finally:
            process.terminate()
            try:
                process.wait(EXIT_TIMEOUT_S + 5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    """Until the model is ready; tritonserver makes it so only once `initialize` has returned."""
    import tritonclient.grpc as triton

    deadline = time.monotonic() + START_S
    with triton.InferenceServerClient(url) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if client.is_model_ready(MODEL):
                    return
            except triton.InferenceServerException as error:
                if "UNAVAILABLE" not in str(error.status()):
                    raise
            time.sleep(0.25)
    raise RewardServerError(f"the constant-padding server did not get ready; the last lines of {log}:\n{log_tail(log)}")
