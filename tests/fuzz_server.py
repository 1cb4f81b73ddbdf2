"""Hostile requests to a running Triton: HTTP bodies and gRPC messages, raw, with what answers may never hold."""

import contextlib
import json
import math
import random
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import grpc
from tritonclient.grpc import service_pb2 as wire

from alignment.scoring import RewardClient
from flow_runs import processes_naming
from fuzz_mutations import NESTS, mutated_bytes, mutated_json
from reward_fixtures import ServedRewardModel, descendants

ANSWER_S = 120
"""Seconds without an answer after which a server hangs, on however busy a machine."""
GROWTH_MB = 500
"""What all hostile requests together may add to the memory of the server's processes."""
CONVERSATIONS = (
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "user", "content": "x" * 3000}],
    {"input_ids": [5, 6, 7]},
)
PATHS = (
    *("/v2/models/reward_model/infer",) * 12,
    *("/v2/models/reward_model/versions/1/infer", "/v2/models/%2e%2e/infer", "/v2/models/../../etc/passwd/infer"),
    *("/v2/repository/index", "/v2/repository/models/reward_model/load", "/v2/repository/models/reward_model/unload"),
    *("/v2/systemsharedmemory/region/x/register", "/v2/cudasharedmemory/region/x/register", "/v2/trace/setting"),
    *("/v2/logging", "/v2/models/reward_model/config", "/", "/%00", "/" + "a" * 9000),
)  # fmt: skip
VERBS = (*("POST",) * 8, "GET", "PUT", "DELETE", "X" * 50)
ODD_HEADERS = ("Content-Encoding: gzip", "Content-Encoding: deflate", "Expect: 100-continue", "X: \x01")
METHODS = (
    *("ModelInfer",) * 12,
    *("ServerLive", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex"),
    *("RepositoryModelLoad", "RepositoryModelUnload", "SystemSharedMemoryRegister", "CudaSharedMemoryRegister"),
    *("TraceSetting", "LogSettings", "ModelStreamInfer", "NoSuchMethod"),
)


def conversation(rng: random.Random) -> bytes:
    return rng.choice(list(NESTS.values())).encode() if rng.random() < 0.1 else mutated_json(rng, CONVERSATIONS)


def http_body(rng: random.Random) -> tuple[bytes, dict[str, str]]:
    """A body and headers: JSON that is damaged itself or holds a damaged conversation, or Triton's binary extension."""
    texts = [conversation(rng) for _ in range(rng.choice((1, 1, 1, 2, 5)))]
    tensor = {"name": "conversation", "shape": [len(texts), 1], "datatype": "BYTES"}
    kind = rng.randrange(3)
    if kind == 0:
        data = b"".join(struct.pack("<I", len(text)) + text for text in texts)
        head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(data)}}]}).encode()
        sizes = (len(head), len(head), 0, -1, len(head) + 5, 2**63)
        return mutated_bytes(rng, [head + data]), {"Inference-Header-Content-Length": str(rng.choice(sizes))}
    tensor["data"] = [text.decode("utf-8", "replace") for text in texts]
    request = {"inputs": [tensor], "outputs": [{"name": "reward"}], "id": "1", "parameters": {}}
    if kind == 1:
        return json.dumps(request).encode(), {}
    return mutated_json(rng, [request]), {}


def http_request(rng: random.Random) -> bytes:
    """A whole request with a body of the length that it states; now and then its bytes are damaged, too."""
    body, headers = http_body(rng)
    lines = [f"{rng.choice(VERBS)} {rng.choice(PATHS)} HTTP/1.1", "Host: a"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if rng.random() < 0.1:
        lines.append(rng.choice(ODD_HEADERS))
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "Connection: close", "", ""]).encode()
    return head + body


def send(url: str, data: bytes) -> bytes:
    """What a server answers to these bytes; b"" where it closes the connection without a word."""
    address, answer = urlsplit(url), b""
    with (
        socket.create_connection((address.hostname, address.port), timeout=ANSWER_S) as connection,
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
    ):
        connection.sendall(data)
        while part := connection.recv(1 << 16):
            answer += part
    return answer


def check_http(url: str, data: bytes) -> str:
    """The status of the answer. Fails where it holds what no answer may."""
    answer = send(url, data)
    assert b"Traceback" not in answer, (data[:3000], answer[:3000])
    assert b"root:" not in answer, (data[:3000], answer[:3000])
    status = answer.split(b" ")[1].decode() if answer.startswith(b"HTTP/") else "closed"
    assert status.isdecimal() or status == "closed", (data[:3000], answer[:300])
    if status == "200" and b'"reward"' in answer:
        found = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert all(math.isfinite(value) for value in found["outputs"][0]["data"]), (data[:3000], answer[:300])
    return status


def grpc_message(rng: random.Random) -> bytes:
    """A ModelInferRequest that holds damaged conversations, or is damaged itself."""
    texts = [conversation(rng) for _ in range(rng.choice((1, 1, 1, 2, 5)))]
    request = wire.ModelInferRequest(model_name="reward_model", id="1")
    tensor = request.inputs.add(name="conversation", datatype="BYTES", shape=[len(texts), 1])
    if rng.random() < 0.5:
        tensor.contents.bytes_contents.extend(texts)
    else:
        request.raw_input_contents.append(b"".join(struct.pack("<I", len(text)) + text for text in texts))
    if rng.random() < 0.3:
        tensor.shape[rng.randrange(2)] = rng.choice((0, -1, 2**31, 2**62, 7))
    data = request.SerializeToString()
    return mutated_bytes(rng, [data]) if rng.random() < 0.5 else data


def check_grpc(channel: grpc.Channel, method: str, data: bytes) -> str:
    """The status of the answer. Fails where there is none in time, or where it holds what no answer may."""
    call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}", None, None)
    try:
        answer, status, details = call(data, timeout=ANSWER_S, wait_for_ready=True) or b"", "OK", ""
    except grpc.RpcError as error:
        answer, status, details = b"", error.code().name, error.details() or ""
    assert status != "DEADLINE_EXCEEDED", (method, data[:3000])
    assert b"Traceback" not in answer and "Traceback" not in details, (method, data[:3000], details)
    if method == "ModelInfer" and status == "OK":
        reply = wire.ModelInferResponse.FromString(answer)
        for output, raw in zip(reply.outputs, reply.raw_output_contents, strict=True):
            if output.name == "reward":
                assert all(math.isfinite(value) for (value,) in struct.iter_unpack("<f", raw)), (data[:3000], raw)
    return status


@contextlib.contextmanager
def unharmed(served: ServedRewardModel) -> Iterator[None]:
    """Fails unless the server is afterwards what it was: its processes, their memory, its scores."""
    [launcher] = [pid for pid in processes_naming(str(served.repository)) if "infra.triton" in _command(pid)]
    pids = descendants(launcher)
    with RewardClient(served.url) as client:
        plain = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
        before, memory = client.score(plain), sum(map(_resident_mb, pids))
        yield
        assert descendants(launcher) == pids  # nothing has died and was started again, nothing runs beside it
        assert client.score(plain) == before
        assert sum(map(_resident_mb, pids)) - memory < GROWTH_MB


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def _resident_mb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS:"))


def fuzz_http(served: ServedRewardModel, count: int, seed: int) -> Counter[str]:
    """How often each status was answered to so many requests."""
    seen: Counter[str] = Counter()
    with unharmed(served):
        for index in range(count):
            seen[check_http(served.http_url, http_request(random.Random(f"{seed}:http:{index}")))] += 1
    return seen


def fuzz_grpc(served: ServedRewardModel, count: int, seed: int) -> Counter[str]:
    """How often each status was answered to so many calls."""
    seen: Counter[str] = Counter()
    with unharmed(served), grpc.insecure_channel(served.url) as channel:
        for index in range(count):
            rng = random.Random(f"{seed}:grpc:{index}")
            seen[check_grpc(channel, rng.choice(METHODS), grpc_message(rng))] += 1
    return seen
