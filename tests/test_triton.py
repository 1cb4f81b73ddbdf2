"""The real Triton: batching, isolation of bad requests, life and death of the local server."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from alignment.errors import RewardServerError
from alignment.reward_server import reward_server
from alignment.scoring import RewardClient
from infra.triton_setup import free_ports, servable_versions
from models.reward_export import export_version
from models.reward_model import score_texts
from reward_fixtures import (
    MAX_TOKENS,
    command_line,
    descendants,
    export_tiny,
    printed_url,
    served_repository,
    tiny_reward_model,
    tiny_serving,
)

ROOT = Path(__file__).resolve().parent.parent


def shared_memory(supervisor: int) -> list[Path]:
    """What the server of this supervisor holds in /dev/shm."""
    return list(Path("/dev/shm").glob(f"triton_{supervisor}_*"))


def read_json(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


def infer(
    client: triton.InferenceServerClient, *texts: bytes, version: str = "", timeout_s: float = 30
) -> triton.InferResult:
    tensor = triton.InferInput("conversation", [len(texts), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(texts, dtype=np.object_).reshape(-1, 1))
    return client.infer("reward_model", [tensor], model_version=version, client_timeout=timeout_s)


def good(text: str) -> bytes:
    return json.dumps([{"role": "user", "content": text}]).encode()


def test_requests_of_different_lengths_merge(served_reward_model):
    stats_url = f"{served_reward_model.http_url}/v2/models/reward_model/stats"
    before = read_json(stats_url)["model_stats"][0]
    conversations = [[{"role": "user", "content": "word " * (i % 16 + 1)}] for i in range(128)]
    with ExitStack() as stack:
        # Each client keeps 8 requests in flight; two make 16.
        clients = [stack.enter_context(RewardClient(served_reward_model.url)) for _ in range(2)]
        pool = stack.enter_context(ThreadPoolExecutor(16))
        list(pool.map(lambda i: clients[i % 2].score([conversations[i]]), range(128)))
    after = read_json(stats_url)["model_stats"][0]
    requests, executions = (after[k] - before[k] for k in ("inference_count", "execution_count"))
    assert requests >= 128
    assert requests / executions > 1.5


def test_token_counts_and_their_metrics(served_reward_model):
    def metrics() -> dict[str, float]:
        with urllib.request.urlopen(served_reward_model.metrics_url, timeout=10) as response:
            text = response.read().decode()
        return {name: float(value) for name, value in re.findall(r"^(reward_tokens_\w+)\{.*\} ([\d.]+)$", text, re.M)}

    before = metrics()
    # "user: ab\n" is 9 bytes and two special tokens; the over-long text is cut to the limit.
    result = infer(triton.InferenceServerClient(served_reward_model.url), good("ab"), good("abcd"), good("x" * 999))
    assert result.as_numpy("num_tokens").tolist() == [[11], [13], [MAX_TOKENS]]
    after = metrics()
    assert after["reward_tokens_real_total"] - before["reward_tokens_real_total"] == 11 + 13 + MAX_TOKENS
    # A forward pass costs less than padding the first two to the limit.
    assert after["reward_tokens_padded_total"] - before["reward_tokens_padded_total"] == 2 * 13 + MAX_TOKENS


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"\xff\xfe", "conversation 1: not UTF-8"),
        (b"{not json", "conversation 1: not JSON"),
        (b'[{"role": "user", "content": "%s"}]' % (b"x" * (1 << 18)), "this version reads at most 262144"),
        (b"[" * 100_000, "conversation 1: not JSON"),
        (b"[]", "conversation 1: must be a non-empty list"),
        (b'"text"', "conversation 1: must be a non-empty list"),
        (b'[{"role": "user"}]', 'conversation 1: each message needs a "role" and a "content"'),
        (b'[{"role": "user", "content": null}]', "conversation 1: each message needs"),
        (b'[{"role": "user", "content": "\\ud800"}]', "conversation 1: holds half a surrogate pair"),
    ],
)
def test_a_bad_request_fails_alone(served_reward_model, bad, message):
    client = triton.InferenceServerClient(served_reward_model.url)
    texts = [good(f"text {i}") for i in range(20)]
    expected = infer(client, *texts).as_numpy("reward").reshape(-1)
    with ThreadPoolExecutor(21) as pool:
        refused = pool.submit(infer, client, good("fine"), bad)
        neighbours = [pool.submit(infer, client, text) for text in texts]
        rewards = [n.result().as_numpy("reward").item() for n in neighbours]
    assert rewards == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InferenceServerException, match=re.escape(message)) as caught:
        refused.result()
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_what_no_client_waits_for_is_not_computed(tmp_path):
    def real_tokens() -> float:
        with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
            text = response.read().decode()
        return float(re.search(r"^reward_tokens_real_total\{.*\} (\S+)$", text, re.M)[1])

    def give_up(_: int) -> None:
        with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
            infer(client, good("x" * 40), timeout_s=0.5)

    export_tiny(tmp_path / "repository")
    with served_repository(tmp_path / "repository") as server:
        (stub,) = (pid for pid in descendants(server.pid) if "stub" in command_line(pid).split("\0")[0])
        client = triton.InferenceServerClient(server.url)
        before = real_tokens()
        os.kill(stub, signal.SIGSTOP)  # stands in for a long batch
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(give_up, range(20)))
        os.kill(stub, signal.SIGCONT)
        assert infer(client, good("ab")).as_numpy("num_tokens").tolist() == [[11]]
        # A text of theirs has 49 tokens; the launcher may have sent a canary or two meanwhile.
        assert real_tokens() - before < 20 * 49 / 2


def test_nobody_can_manage_the_server(served_reward_model):
    client = triton.InferenceServerClient(served_reward_model.url)
    for attempt in (
        lambda: client.load_model("reward_model", config="{}"),
        lambda: client.unload_model("reward_model"),
        lambda: client.register_system_shared_memory("x", "/x", 8),
        lambda: client.update_log_settings({"log_verbose_level": 1}),
    ):
        with pytest.raises(InferenceServerException, match="restricted"):
            attempt()
    for path in ("repository/models/reward_model/load", "systemsharedmemory/region/x/register", "logging"):
        request = urllib.request.Request(f"{served_reward_model.http_url}/v2/{path}", data=b"{}", method="POST")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request, timeout=10)


def test_the_repository_is_left_as_it_was(served_reward_model):
    names = {p.name for p in (served_reward_model.repository / "reward_model").rglob("*")}
    assert "model.py" in names and "__pycache__" not in names


def test_an_external_server_is_used_as_it_is(tmp_path):
    with reward_server(
        repository=tmp_path, name="m", version="", url="gpu-7:8001", grpc_port=0, log=tmp_path / "log"
    ) as server:
        assert (server.url, server.process) == ("gpu-7:8001", None)
        server.check()
    assert list(tmp_path.iterdir()) == []


def launch(*arguments: str, **options: object) -> subprocess.Popen[str]:
    """The launcher as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "infra.triton", *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_the_bare_template_says_how_to_export():
    process = launch("--repository", "triton_repo")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert "no exported version of any model in triton_repo: `python flows/rs_flow.py run` exports one" in err


def test_a_version_that_was_never_exported_is_named(tmp_path):
    export_tiny(tmp_path)
    assert servable_versions(tmp_path) == {"reward_model": ["1"]}
    with pytest.raises(RewardServerError, match="no exported version of reward_model version 2"):
        servable_versions(tmp_path, "reward_model", "2")


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    export_tiny(tmp_path)
    config = tmp_path / "reward_model" / "config.pbtxt"
    config.write_text(config.read_text() + "instance_gruop [ { count: 2 } ]\n")
    process = launch("--repository", str(tmp_path))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "reward_model cannot be served: tritonserver cannot read its config.pbtxt" in err


def test_a_taken_port_is_named_with_its_key(tmp_path):
    export_tiny(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = launch("--repository", str(tmp_path), "--grpc-port", str(port))
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert f"port {port} on 127.0.0.1 is not free" in err and "reward.grpc_port" in err

        # The same through the task's side: the wait ends with the server, not with its own time.
        with (
            reward_server(
                repository=tmp_path, name="reward_model", version="1", url=None, grpc_port=port, log=tmp_path / "log"
            ) as server,
            RewardClient(server.url, check=server.check, timeout_s=5) as client,
            pytest.raises(RewardServerError, match=rf"ended with code 1.*(?s:.*)port {port}"),
        ):
            client.wait_ready(100)


def test_ctrl_c_ends_the_launcher_and_cleans_up(tmp_path):
    export_tiny(tmp_path)
    log = tmp_path / "log"
    process = launch("--repository", str(tmp_path), "--log", str(log), "--threads", "1")
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(5)]
    assert lines[0] == "serving reward_model (version 1); stop with Ctrl-C\n"
    url = lines[1].split()[1]
    with RewardClient(url) as client:
        assert len(client.score([("a", "b")])) == 1
    processes = descendants(process.pid)
    assert len(processes) >= 2 and shared_memory(process.pid)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert not any(map(alive, processes)) and not shared_memory(process.pid)


OWNER = """
import sys, time
from pathlib import Path
from alignment.reward_server import reward_server
from alignment.scoring import RewardClient
with reward_server(repository=Path(sys.argv[1]), name="reward_model", version="1", url=None, grpc_port=0,
                   log=Path(sys.argv[2]), threads=1) as server:
    with RewardClient(server.url, check=server.check) as client:
        client.wait_ready(120)
        print(server.process.pid, client.model_version, flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize("victim", ["owner", "supervisor"])
def test_the_server_dies_with_its_owner_and_with_its_supervisor(tmp_path, victim):
    for seed in range(2):
        export_tiny(tmp_path, seed=seed)
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path), str(tmp_path / "log")],
        # A killed supervisor cannot remove its scratch folder: let it lie in the test's own.
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stdout is not None
        supervisor, version = owner.stdout.readline().split()
        assert version == "1"  # the pinned one, not the newest
        processes = descendants(int(supervisor))
        assert len(processes) >= 2, "tritonserver and its stub"
        assert shared_memory(int(supervisor))
        os.kill(owner.pid if victim == "owner" else int(supervisor), signal.SIGKILL)
        wait_until(lambda: not any(map(alive, processes)), "tritonserver and its stub are gone")
        wait_until(lambda: not shared_memory(int(supervisor)), "shared memory is clean")
    finally:
        owner.kill()
        owner.communicate()


def test_a_lost_model_process_or_server_is_started_again(tmp_path):
    export_tiny(tmp_path)
    log = tmp_path / "log"
    with (
        reward_server(
            repository=tmp_path, name="reward_model", version="1", url=None, grpc_port=0, log=log, threads=1
        ) as server,
        RewardClient(server.url, check=server.check) as client,
    ):
        client.wait_ready(120)
        printed_url(log, "metrics")
        before = client.score([("a", "b")])
        for lost, message in (("stub", "the model's process has died"), ("tritonserver", "ended with code -9")):
            (pid,) = (p for p in descendants(server.process.pid) if lost in command_line(p).split("\0")[0])
            os.kill(pid, signal.SIGKILL)
            assert client.score([("a", "b")]) == before
            assert message in log.read_text()
    assert not shared_memory(server.process.pid)


def test_a_model_that_hangs_is_started_again(tmp_path):
    export_tiny(tmp_path)
    port, log = free_ports(1)[0], tmp_path / "log"
    impatient = (
        "import sys, infra.triton, infra.triton_health as health; health.PULSE_S, health.HUNG_S = 0.5, 2.0\n"
        f"sys.exit(infra.triton.main(['--watch-stdin', '--repository', {str(tmp_path)!r}, '--grpc-port', '{port}']))"
    )
    with open(log, "wb") as output:
        command = [sys.executable, "-c", impatient]
        server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=output, stderr=output)
    with RewardClient(f"127.0.0.1:{port}", timeout_s=5) as client:
        client.wait_ready(120)
        before = client.score([("a", "b")])
        (stub,) = (p for p in descendants(server.pid) if "stub" in command_line(p).split("\0")[0])
        os.kill(stub, signal.SIGSTOP)
        assert client.score([("a", "b")]) == pytest.approx(before, abs=1e-5)
    assert "reward_model has answered nobody for 2 s; starting the server again" in log.read_text()
    server.stdin.close()
    assert server.wait(30) == 0
    assert not shared_memory(server.pid)


def export_nan(repository: Path) -> None:
    """Export a version whose every reward is NaN."""
    model, tokenizer = tiny_reward_model()
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    export_version(model, tokenizer, repository=repository, name="reward_model", serving=tiny_serving(), card={})


def test_a_model_without_finite_rewards_never_gets_ready(tmp_path):
    export_nan(tmp_path)
    with (
        reward_server(
            repository=tmp_path, name="reward_model", version="1", url=None, grpc_port=0, log=tmp_path / "log"
        ) as server,
        RewardClient(server.url, check=server.check) as client,
        pytest.raises(RewardServerError, match="this version gives a plain conversation the reward nan"),
    ):
        client.wait_ready(120)


def keep_scoring(url: str, version: str, stop: threading.Event, answers: list[tuple[str, float]]) -> None:
    """Score one conversation over and over, with no retry; note which version gave which reward."""
    with triton.InferenceServerClient(url) as client:
        while not stop.is_set():
            result = infer(client, good("ab"), version=version)
            answers.append((result.get_response().model_version, result.as_numpy("reward").item()))


def in_process(seed: int) -> float:
    model, tokenizer = tiny_reward_model(seed)
    return score_texts(model, tokenizer, ["user: ab\n"], max_tokens=MAX_TOKENS)[0]


def test_versions_are_swapped_under_load_without_a_failed_request(tmp_path):
    """Version 2 is taken up, version 3 is once it has been mended, then the process of version 2 is lost."""
    repository = tmp_path / "repository"
    export_tiny(repository)
    stop = threading.Event()
    pinned: list[tuple[str, float]] = []
    newest: list[tuple[str, float]] = []
    with served_repository(repository, "--follow") as server, ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(keep_scoring, server.url, *c) for c in (("1", stop, pinned), ("", stop, newest))]
        try:
            wait_until(lambda: pinned and newest, "both clients are answered")
            export_tiny(repository, seed=1)
            wait_until(lambda: newest[-1][0] == "2", "version 2 answers")
            export_nan(repository)
            wait_until(
                lambda: "reward_model version 3 cannot be served" in server.log.read_text(), "version 3 is refused"
            )
            (line,) = (line for line in server.log.read_text().splitlines() if "cannot be served" in line)
            assert "gives a plain conversation the reward nan" in line
        finally:
            stop.set()
        for client in clients:
            client.result()
        assert {version for version, _ in pinned} == {"1"}
        versions = [version for version, _ in newest]
        assert versions == sorted(versions) and set(versions) == {"1", "2"}
        expected = {"1": in_process(seed=0), "2": in_process(seed=1)}
        for version, reward in pinned + newest:
            assert abs(reward - expected[version]) < 1e-5

        with (
            triton.InferenceServerClient(server.url) as client,
            pytest.raises(InferenceServerException, match="restricted"),
        ):
            client.unload_model("reward_model")

        # Version 3 is mended, which lets the oldest go.
        model = repository / "reward_model"
        shutil.copyfile(model / "2" / "weights" / "model.safetensors", model / "3" / "weights" / "model.safetensors")
        wait_until(lambda: "serving reward_model version 3 too" in server.log.read_text(), "version 3 is taken up")

        # Another version answers on; what is lost is found all the same, and what is deleted does not stand in the way.
        shutil.rmtree(model / "1")
        (stub,) = (p for p in descendants(server.pid) if "/reward_model/2/model.py" in command_line(p))
        os.kill(stub, signal.SIGKILL)
        with RewardClient(server.url, model_version="2") as retrying:
            retrying.wait_ready(120)
            assert retrying.score([[{"role": "user", "content": "ab"}]]) == pytest.approx([expected["2"]], abs=1e-5)
        wait_until(
            lambda: "serving reward_model (version 2, 3)" in server.log.read_text(), "the new start is announced"
        )
        said = server.log.read_text()
        assert "the model's process has died; starting the server again" in said
        assert f"reward_model/1 is not in {repository} any more" in said


def test_ports_are_different_and_free():
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        with socket.socket() as s:
            s.bind(("127.0.0.1", port))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Generous, since it only runs out when the condition never comes."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"still waiting until {what}"
        time.sleep(0.1)
