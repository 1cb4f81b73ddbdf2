"""Triton's statistics: differences by hand, a stand-in that answers as told, and the real server."""

from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from alignment import triton_metrics
from alignment.errors import RewardRequestError
from alignment.reward_server import reward_server
from alignment.scoring import RewardClient
from alignment.triton_metrics import FIELDS, Counters, ServerWatch, difference, page_counters
from infra.triton_setup import free_ports
from reward_fixtures import MAX_TOKENS, ServedRewardModel

BEFORE = Counters(100, 20, 30, 60_000_000, 30, 900_000_000, 1, 1000.0, 1100.0, 4.0)
GROWN = Counters(148, 24, 36, 72_000_000, 34, 1_000_000_000, 3, 1900.0, 2100.0, 9.0)


def test_differences_by_hand() -> None:
    assert difference(BEFORE, GROWN) == {
        "mean_batch": 12.0,  # 48 conversations in 4 executions
        "queue_ms": 2.0,  # 12 ms over 6 requests
        "compute_ms": 25.0,  # 100 ms over the 4 that were computed
        "failures": 7,  # 2 in Triton and 5 refused by the model
        "real_over_padded": 0.9,  # 900 of 1000 tokens
        "restarted": False,
    }


def test_nothing_counted_is_no_number() -> None:
    idle = {"mean_batch": None, "queue_ms": None, "compute_ms": None, "failures": 0, "real_over_padded": None}
    assert difference(BEFORE, BEFORE) == {**idle, "restarted": False}


@pytest.mark.parametrize("lower", ["executions", "queue_ns", "failures", "real_tokens", "refused"])
def test_a_counter_that_went_down_is_a_restart_and_the_second_reading_counts(lower: str) -> None:
    after = replace(GROWN, **{lower: 0})
    found = difference(BEFORE, after)
    assert found["restarted"] is True
    if lower == "failures":
        assert (found["mean_batch"], found["queue_ms"], found["failures"]) == (148 / 24, 2.0, 0 + 9)
        assert found["real_over_padded"] == 1900 / 2100


def test_what_one_page_lacks_is_unknown() -> None:
    bare = {"real_tokens": None, "padded_tokens": None, "refused": None}
    for before, after in ((replace(BEFORE, **bare), GROWN), (BEFORE, replace(GROWN, **bare))):
        found = difference(before, after)
        assert (found["real_over_padded"], found["mean_batch"], found["restarted"]) == (None, 12.0, False)
        assert found["failures"] == 2  # Triton's alone


PROMETHEUS = """# HELP reward_tokens_real_total Tokens
# TYPE reward_tokens_real_total counter
reward_tokens_real_total{model="reward_model",version="3"} 120
reward_tokens_real_total{version="3",gpu="1",model="reward_model"} 30.5
reward_tokens_real_total{model="reward_model",version="2"} 7
reward_tokens_real_total{model="other",version="3"} 7
reward_tokens_padded_total{model="reward_model",version="3"} 2.5e+2
reward_requests_refused_total{model="reward_model",version="3"} 6
reward_requests_refused_total{model="other",version="3"} 7
nv_inference_count{model="reward_model",version="3"} 9
"""


def test_page_counters_are_those_of_the_model_and_version() -> None:
    found = page_counters(PROMETHEUS, "reward_model", "3")
    assert found == {"real_tokens": 150.5, "padded_tokens": 250.0, "refused": 6.0}
    assert page_counters(PROMETHEUS, "reward_model", "2") == {}  # one of three is none
    assert page_counters("", "reward_model", "3") == {}


class StatisticsStandIn(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Stands in for Triton's ModelStatistics; answers with `instances`, or fails where there is none."""

    def __init__(self) -> None:
        self.instances: list[Counters] = []
        self.asked: list[tuple[str, str]] = []

    def ModelStatistics(self, request, context):
        self.asked.append((request.name, request.version))
        if not self.instances:
            context.abort(grpc.StatusCode.UNAVAILABLE, "as told")
        response = service_pb2.ModelStatisticsResponse()
        for c in self.instances:
            one = response.model_stats.add(inference_count=c.inferences, execution_count=c.executions)
            one.inference_stats.queue.count, one.inference_stats.queue.ns = c.queued, c.queue_ns
            one.inference_stats.compute_infer.count, one.inference_stats.compute_infer.ns = c.computed, c.compute_ns
            one.inference_stats.fail.count = c.failures
        return response


@pytest.fixture
def stand_in() -> Iterator[tuple[StatisticsStandIn, str]]:
    triton, server = StatisticsStandIn(), grpc.server(futures.ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield triton, f"127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.fixture
def metrics_page() -> Iterator[Callable[[str | list[str]], str]]:
    """Serves a text as a metrics page, or parts of one, 50 ms each; returns its URL."""
    servers, gone = [], Event()

    def serve(text: str | list[str]) -> str:
        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                try:
                    for part in text if isinstance(text, list) else [text]:
                        self.wfile.write(part.encode())
                        if isinstance(text, list):
                            gone.wait(0.05)
                except ConnectionError:
                    gone.set()

            def log_message(self, *_: object) -> None:
                pass  # not to standard error

        servers.append(HTTPServer(("127.0.0.1", 0), Page))
        Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/metrics"

    yield serve
    gone.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_watch_reads_statistics_and_metrics(stand_in, metrics_page) -> None:
    triton, url = stand_in
    notes: list[str] = []
    with ServerWatch(url, "reward_model", "3", metrics_page(PROMETHEUS), notes.append) as watch:
        triton.instances = [BEFORE]
        watch.begin()
        triton.instances = [BEFORE, replace(BEFORE, executions=5)]  # a second instance, 100 inferences in 5 executions
        found = watch.end()
    assert (found["mean_batch"], found["failures"], found["restarted"]) == (20.0, 1, False)
    assert found["real_over_padded"] is None  # no token was counted between the readings
    assert triton.asked == [("reward_model", "3")] * 2 and notes == []


def test_a_restart_is_said(stand_in) -> None:
    triton, url = stand_in
    notes: list[str] = []
    with ServerWatch(url, "reward_model", "3", None, notes.append) as watch:
        triton.instances = [GROWN]
        watch.begin()
        triton.instances = [BEFORE]
        assert watch.end()["mean_batch"] == 5.0
    assert notes == ["the reward server was started again: its statistics of this RS step count from there"]


def test_a_server_that_tells_nothing_is_said_once_and_its_numbers_are_null(stand_in) -> None:
    triton, url = stand_in
    notes: list[str] = []
    with ServerWatch(url, "reward_model", "3", None, notes.append) as watch:
        for _ in range(2):
            watch.begin()
            assert watch.end() == dict.fromkeys(FIELDS)
        assert len(triton.asked) == 2  # who gives no first answer is not asked for a second
        triton.instances = [BEFORE]
        watch.begin()
        assert watch.end()["failures"] == 0  # it is read again once it answers
    assert len(notes) == 1 and notes[0].startswith("the reward server does not tell its statistics (")


def test_nobody_at_the_addresses_is_said_once(stand_in) -> None:
    triton, url = stand_in
    nobody, notes = free_ports(1)[0], list[str]()
    with ServerWatch(f"127.0.0.1:{nobody}", "reward_model", "3", None, notes.append) as watch:
        watch.begin()
        assert watch.end() == dict.fromkeys(FIELDS)
    triton.instances = [BEFORE]
    with ServerWatch(url, "reward_model", "3", f"http://127.0.0.1:{nobody}/metrics", notes.append) as watch:
        watch.begin()
        triton.instances = [GROWN]
        assert (watch.end()["mean_batch"], watch.end()["real_over_padded"]) == (12.0, None)
    assert len(notes) == 2 and f"http://127.0.0.1:{nobody}/metrics does not answer" in notes[1]


@pytest.mark.parametrize(
    ("page", "why"),
    [
        (PROMETHEUS.replace(" 120", " 12o"), "could not convert string to float: '12o'"),
        (PROMETHEUS.replace(" 120", " NaN"), "reward_tokens_real_total is NaN"),
        ("#" * 2000, "more than 1000 bytes"),
    ],
)
def test_a_page_that_cannot_be_read_is_said_once(stand_in, metrics_page, monkeypatch, page, why) -> None:
    monkeypatch.setattr(triton_metrics, "PAGE_BYTES", 1000)
    triton, url = stand_in
    address, notes = metrics_page(page), list[str]()
    with ServerWatch(url, "reward_model", "3", address, notes.append) as watch:
        triton.instances = [BEFORE]
        watch.begin()
        found = watch.end()
    assert (found["failures"], found["real_over_padded"]) == (0, None)
    assert len(notes) == 1 and why in notes[0]


def test_a_page_that_trickles_is_given_up(metrics_page, monkeypatch) -> None:
    monkeypatch.setattr(triton_metrics, "READ_S", 0.2)
    with pytest.raises(TimeoutError, match=r"not all of it came within 0\.2 s"):
        triton_metrics._page(metrics_page(["#"] * 400))  # each part in time, and all of them 20 s


def test_the_real_server_counts_what_was_asked(served_reward_model: ServedRewardModel) -> None:
    served = served_reward_model
    # "user: ab\n" is 9 bytes and two special tokens; the over-long text is cut to the limit.
    texts = [[{"role": "user", "content": text}] for text in ("ab", "abcd", "x" * 999)]
    expected = (2.0, 1, (11 + 13 + MAX_TOKENS) / (2 * 13 + MAX_TOKENS), False)
    found, notes = [], list[str]()
    with (
        RewardClient(served.url, served.name, served.version) as client,
        ServerWatch(served.url, served.name, served.version, served.metrics_url, notes.append) as watch,
    ):
        client.wait_ready(60)
        for _ in range(3):  # the launcher asks too, now and then, and would be counted
            watch.begin()
            with pytest.raises(RewardRequestError):  # to Triton a success: one more inference in one more execution
                client.score([[{"role": "user", "content": "\ud83d"}]])
            client.score(texts)
            found.append(watch.end())
    got = [(f["mean_batch"], f["failures"], f["real_over_padded"], f["restarted"]) for f in found]
    assert pytest.approx(expected) in got, got
    assert all(f["queue_ms"] >= 0 and f["compute_ms"] > 0 for f in found)
    assert notes == []


def test_a_local_server_is_told_where_its_metrics_are(tmp_path: Path) -> None:
    with reward_server(
        repository=tmp_path, name="m", version="1", url=None, grpc_port=0, log=tmp_path / "log"
    ) as server:
        assert server.process is not None
        arguments = list(server.process.args)
        port = arguments[arguments.index("--metrics-port") + 1]
        assert server.metrics_url == f"http://127.0.0.1:{port}/metrics"
        assert server.url != f"127.0.0.1:{port}"
