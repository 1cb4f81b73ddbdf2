"""The reward client: against the real Triton, and against a stand-in that fails on command."""

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from alignment import scoring
from alignment.errors import RewardRequestError, RewardServerError
from alignment.scoring import RewardClient, score_in_background, score_rollouts
from alignment.types import Rollout
from infra.triton_setup import free_ports
from models.reward_model import render, score_texts
from reward_fixtures import MAX_TOKENS, TEMPLATE, ServedRewardModel


def in_process(served: ServedRewardModel, conversations) -> list[float]:
    texts = [render(TEMPLATE, messages) for messages in conversations]
    return score_texts(served.model, served.tokenizer, texts, max_tokens=MAX_TOKENS)


def conversation(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


CONVERSATIONS = [
    conversation("hi", "hello"),
    conversation("Was?", "Grüße 🙂", "und?", ""),
    conversation("x" * 500, "over-long: the start is lost"),
    conversation("one turn"),
    conversation("null\x00byte", 'quotes " \\ and \n lines'),
    *[conversation("word " * n, f"answer {n}") for n in range(20)],
]


def test_served_scores_equal_the_model_in_process(served_reward_model):
    with RewardClient(served_reward_model.url) as client:
        rewards = client.score(CONVERSATIONS)
        assert rewards == pytest.approx(in_process(served_reward_model, CONVERSATIONS), abs=1e-5)
        assert client.model_version == served_reward_model.version
    assert len({round(r, 3) for r in rewards}) > 20


def test_served_scores_do_not_depend_on_order_or_company(served_reward_model):
    with RewardClient(served_reward_model.url) as client:
        together = client.score(CONVERSATIONS)
        assert client.score(CONVERSATIONS[::-1]) == pytest.approx(together[::-1], abs=1e-5)
        alone = [client.score([c])[0] for c in CONVERSATIONS]
        assert alone == pytest.approx(together, abs=1e-5)


def test_a_pair_of_strings_is_a_prompt_and_a_response(served_reward_model):
    with RewardClient(served_reward_model.url) as client:
        pair, messages = client.score([("hi", "hello"), conversation("hi", "hello")])
        assert pair == pytest.approx(messages, abs=1e-6)
        assert client.score([]) == []


def test_a_bad_conversation_is_named_by_its_index(served_reward_model):
    with RewardClient(served_reward_model.url) as client:
        for bad in ([], [{"role": "user"}], "text", ("a", "b", "c"), [{"role": "user", "content": 1}], None):
            with pytest.raises(RewardRequestError, match="conversation 10 must be"):
                client.score([*CONVERSATIONS[:10], bad])
        # This one only the server can see. Index 10 is the third of the second request.
        with pytest.raises(RewardRequestError, match="cannot score conversation 10: holds half a surrogate pair"):
            client.score([*CONVERSATIONS[:10], ("half", "\ud83d"), *CONVERSATIONS])
        assert len(client.score(CONVERSATIONS)) == len(CONVERSATIONS)


def rollout(prompt_id: str, index: int, response: str) -> Rollout:
    return Rollout(
        prompt_id=prompt_id,
        rollout_index=index,
        response=response,
        finish_reason="stop",
        prompt="hi",
        messages=({"role": "user", "content": "hi"},),
        prompt_ids=(1,),
        response_ids=(4, 5),
    )


def test_rollouts_are_scored_with_the_models_name_and_version(served_reward_model):
    rollouts = [rollout("a", 0, "x"), rollout("a", 1, "y"), rollout("b", 0, "x"), rollout("a", 2, "x")]
    with RewardClient(served_reward_model.url) as client:
        scored = score_in_background(client, rollouts).result(timeout=30)
        assert score_rollouts(client, []) == []
    expected = in_process(served_reward_model, [r.conversation for r in rollouts])
    assert [s.reward for s in scored] == pytest.approx(expected, abs=1e-5)
    assert scored[0].reward == scored[3].reward
    assert {(s.reward_model, s.reward_model_version) for s in scored} == {("reward_model", "1")}
    assert [(s.prompt_id, s.rollout_index, s.response, s.messages, s.response_ids) for s in scored] == [
        (r.prompt_id, r.rollout_index, r.response, r.messages, r.response_ids) for r in rollouts
    ]


def test_a_version_that_is_not_served_is_named(served_reward_model):
    with (
        RewardClient(served_reward_model.url, model_version="9", timeout_s=5) as client,
        pytest.raises(RewardServerError, match=r"reward_model version 9 at .* did not answer within 1 s"),
    ):
        client.wait_ready(1)


def test_nothing_at_the_url_is_a_clear_error_soon():
    url = f"127.0.0.1:{free_ports(1)[0]}"
    start = time.monotonic()
    with (
        RewardClient(url, timeout_s=1) as client,
        pytest.raises(RewardServerError, match=rf"reward_model at {re.escape(url)} did not answer .*UNAVAILABLE"),
    ):
        client.score([("a", "b")])
    # Not a matter of speed: the retries of a lost server would take a minute.
    assert time.monotonic() - start < 30


class StandInTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Stands in for Triton: answers ModelInfer with `answer(request number, texts)`, canaries with 0.

    An answer is a list of rewards, or a gRPC status to fail with. Requests are counted from 1.
    """

    def __init__(self, answer: Callable[[int, list[str]], object], version: str = "3") -> None:
        self.answer, self.version = answer, version
        self.requests: list[list[str]] = []
        self.output: dict[str, object] = {}
        """What the reward's tensor is said to be, where that is not the truth."""
        self.canary_delays: list[float] = []
        self.canary_faults: list[tuple[grpc.StatusCode, str]] = []
        self.versions_asked: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    def ModelInfer(self, request, context):
        from tritonclient.utils import deserialize_bytes_tensor

        texts = [t.decode() for t in deserialize_bytes_tensor(request.raw_input_contents[0])]
        self.versions_asked.append(request.model_version)
        if texts == [scoring.CANARY]:
            if self.canary_faults:
                context.abort(*self.canary_faults.pop())
            time.sleep(self.canary_delays.pop() if self.canary_delays else 0)
            answer: object = [0.0]
        else:
            with self.lock:
                self.requests.append(texts)
                number = len(self.requests)
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
            answer = self.answer(number, texts)
            with self.lock:
                self.in_flight -= 1
        if not isinstance(answer, list):
            context.abort(*(answer if isinstance(answer, tuple) else (answer, "as told")))
        response = service_pb2.ModelInferResponse(model_name=request.model_name, model_version=self.version)
        response.outputs.add(**{"name": "reward", "datatype": "FP32", "shape": [len(answer), 1], **self.output})
        response.raw_output_contents.append(np.array(answer, dtype=np.float32).tobytes())
        return response


@pytest.fixture
def stand_in() -> Iterator[Callable[..., tuple[StandInTriton, str]]]:
    servers = []

    def start(answer, **options) -> tuple[StandInTriton, str]:
        triton = StandInTriton(answer, **options)
        server = grpc.server(futures.ThreadPoolExecutor(32))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return triton, f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(0).wait()


def rewards_of(_: int, texts: list[str]) -> list[float]:
    return [float(json.loads(text)[-1]["content"]) for text in texts]


NUMBERED = [("p", str(i)) for i in range(50)]


@pytest.mark.parametrize(
    "fault",
    [
        grpc.StatusCode.UNAVAILABLE,
        (grpc.StatusCode.INTERNAL, "Stub process 'reward_model_0_0' is not healthy."),
        (grpc.StatusCode.UNKNOWN, "recvmsg: Connection reset by peer"),
    ],
)
def test_faults_that_pass_are_retried_and_the_order_is_kept(stand_in, monkeypatch, fault):
    monkeypatch.setattr(scoring, "LONGEST_WAIT_S", 0.01)
    monkeypatch.setattr(scoring, "FIRST_WAIT_S", 0.01)
    triton, url = stand_in(lambda number, texts: fault if number % 3 else rewards_of(number, texts))
    with RewardClient(url, timeout_s=10) as client:
        assert client.score(NUMBERED) == [float(i) for i in range(50)]
    assert len(triton.requests) > math.ceil(50 / scoring.TEXTS_PER_REQUEST)


def test_first_contact_waits_longer_for_a_server_that_is_busy_than_for_none(stand_in, monkeypatch):
    monkeypatch.setattr(scoring, "FIRST_CONTACT_S", 0.2)
    triton, url = stand_in(rewards_of)
    triton.canary_delays = [0.5, 0.5]
    with RewardClient(url, patience_s=60) as client:
        assert client.score(NUMBERED[:1]) == [0.0]
    triton.canary_delays = [5.0] * 20
    with (
        RewardClient(url, patience_s=0.4) as client,
        pytest.raises(RewardServerError, match=r"did not answer within 0\.4 s \(DEADLINE_EXCEEDED"),
    ):
        client.score(NUMBERED[:1])


def test_first_contact_waits_longer_for_a_full_queue(stand_in, monkeypatch):
    monkeypatch.setattr(scoring, "FIRST_CONTACT_S", 0.2)
    triton, url = stand_in(rewards_of)
    full = (grpc.StatusCode.UNAVAILABLE, "[request id: <id_unknown>] Exceeds maximum queue size")
    triton.canary_faults = [full] * 3
    with RewardClient(url, patience_s=60) as client:
        assert client.score(NUMBERED[:1]) == [0.0]
    triton.canary_faults = [(grpc.StatusCode.UNAVAILABLE, "gone")] * 3
    with RewardClient(url, patience_s=60) as client, pytest.raises(RewardServerError, match=r"within 0\.2 s"):
        client.score(NUMBERED[:1])


def test_a_slow_answer_meets_its_deadline_and_is_retried(stand_in, monkeypatch):
    monkeypatch.setattr(scoring, "LONGEST_WAIT_S", 0.01)
    monkeypatch.setattr(scoring, "FIRST_WAIT_S", 0.01)

    def answer(number: int, texts: list[str]) -> list[float]:
        time.sleep(2 if number == 1 else 0)
        return rewards_of(number, texts)

    triton, url = stand_in(answer)
    with RewardClient(url, timeout_s=0.5) as client:
        assert client.score(NUMBERED[:3]) == [0.0, 1.0, 2.0]
    assert len(triton.requests) == 2

    triton, url = stand_in(lambda *_: time.sleep(1))
    with (
        RewardClient(url, timeout_s=0.2, patience_s=1.0) as client,
        pytest.raises(
            RewardServerError, match=r"failed \d times in 1 s.*DEADLINE_EXCEEDED.*reward\.timeout_s \(0\.2\)"
        ),
    ):
        client.score(NUMBERED[:3])


@pytest.mark.parametrize("text", ["too long", "not JSON: 'Stub process not healthy, Connection reset', too long"])
def test_a_refused_request_is_not_sent_again(stand_in, text):
    triton, url = stand_in(lambda *_: (grpc.StatusCode.INVALID_ARGUMENT, text))
    with (
        RewardClient(url) as client,
        pytest.raises(RewardRequestError, match=r"refused conversations 0 to 2: .*too long"),
    ):
        client.score(NUMBERED[:3])
    assert len(triton.requests) == 1


def test_a_server_that_stays_away_is_an_error_with_what_to_do(stand_in, monkeypatch):
    monkeypatch.setattr(scoring, "FIRST_WAIT_S", 0.1)  # then 0.2 and 0.4: the fourth wait would exceed a second
    triton, url = stand_in(lambda *_: (grpc.StatusCode.INTERNAL, "Stub process 'm' is not healthy."))
    with (
        RewardClient(url, patience_s=1.0) as client,
        pytest.raises(RewardServerError, match=r"failed 4 times in 1 s.*restart the server"),
    ):
        client.score(NUMBERED[:3])
    assert len(triton.requests) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_an_error(stand_in, bad):
    _, url = stand_in(lambda _, texts: [bad if json.loads(t)[-1]["content"] == "9" else 1.0 for t in texts])
    with RewardClient(url) as client, pytest.raises(RewardRequestError, match=f"the reward {bad} to conversation 9"):
        client.score(NUMBERED)


def test_too_few_rewards_are_an_error(stand_in):
    _, url = stand_in(lambda _, texts: [1.0] * (len(texts) - 1))
    with RewardClient(url) as client, pytest.raises(RewardServerError, match="gave 7 rewards for 8 conversations"):
        client.score(NUMBERED[:8])


def test_the_version_that_answers_first_is_kept(stand_in):
    triton, url = stand_in(rewards_of, version="5")
    with RewardClient(url) as client:
        client.score(NUMBERED[:1])
        assert client.model_version == "5"
        client.score(NUMBERED[:1])
        assert triton.versions_asked == ["", "5", "5"]
        triton.version = "6"  # a server that answers as another one than was asked for
        with pytest.raises(RewardServerError, match=r"reward_model version 5 at .* answered as version 6"):
            client.score(NUMBERED[:1])


def test_several_requests_are_in_flight_but_not_all(stand_in):
    def answer(number: int, texts: list[str]) -> list[float]:
        time.sleep(0.2)
        return rewards_of(number, texts)

    triton, url = stand_in(answer)
    many = [("p", str(i)) for i in range(200)]
    with RewardClient(url) as client:
        assert client.score(many) == [float(i) for i in range(200)]
    assert 1 < triton.most_in_flight <= scoring.REQUESTS_IN_FLIGHT


def test_equal_responses_of_a_prompt_are_sent_once(stand_in):
    triton, url = stand_in(rewards_of)
    rollouts = [rollout("a", 0, "1"), rollout("a", 1, "1"), rollout("b", 0, "1"), rollout("a", 2, "2")]
    with RewardClient(url) as client:
        assert [s.reward for s in score_rollouts(client, rollouts)] == [1.0, 1.0, 1.0, 2.0]
    assert sum(len(texts) for texts in triton.requests) == 3


def test_a_dead_local_server_ends_the_wait():
    def check() -> None:
        raise RewardServerError("it died")

    with RewardClient("127.0.0.1:1", check=check) as client, pytest.raises(RewardServerError, match="it died"):
        client.wait_ready(30)


def test_closing_does_not_wait_for_retries(stand_in):
    _, url = stand_in(lambda *_: grpc.StatusCode.UNAVAILABLE)
    with RewardClient(url) as client:
        future = score_in_background(client, [rollout("a", 0, "1")])
        time.sleep(1.0)
        # Neither the background thread nor the request's own may hold the exit for the minute of retries.
        client.close()
    with pytest.raises(RewardServerError, match="closed before an answer came"):
        future.result(timeout=0)


@pytest.mark.parametrize(
    "lie",
    [
        {"name": "score"},
        {"shape": [2, 1]},
        {"shape": [1]},
        {"shape": [1, 1, 1]},
        {"shape": [1, 2]},
        {"datatype": "BYTES"},
        {"datatype": "INT32"},
        {"datatype": "BOOL"},
        {"datatype": "FP64"},
    ],
)
def test_an_answer_that_is_no_column_of_rewards_is_a_server_error(stand_in, lie):
    triton, url = stand_in(rewards_of)
    with RewardClient(url) as client:
        assert client.score([("p", "1")]) == [1.0]
        triton.output = lie
        with pytest.raises(RewardServerError, match="gave an answer that is no column of rewards"):
            client.score([("p", "1")])


def test_an_answer_without_a_version_is_a_server_error(stand_in):
    _, url = stand_in(rewards_of, version="")
    with RewardClient(url) as client, pytest.raises(RewardServerError, match="no column of rewards"):
        client.score([("p", "1")])


CLOSED = "the client was closed before an answer came"


def test_closing_drops_the_requests_of_a_background_job(stand_in):
    started, go_on = threading.Event(), threading.Event()

    def answer(number: int, texts: list[str]) -> list[float]:
        started.set()
        go_on.wait(10)
        return rewards_of(number, texts)

    triton, url = stand_in(answer)
    client = RewardClient(url)
    many = [rollout(str(i), 0, str(i)) for i in range(40 * scoring.TEXTS_PER_REQUEST)]
    jobs = [score_in_background(client, many), score_in_background(client, many[:1])]
    assert started.wait(10)
    closing = threading.Thread(target=client.close)
    closing.start()
    assert client._closing.wait(10)
    go_on.set()
    closing.join(10)
    for job in jobs:
        with pytest.raises(RewardServerError, match=CLOSED):
            job.result(timeout=0)
    # Those in flight were answered; without the cancelling, all forty would have been sent.
    assert 1 <= len(triton.requests) <= scoring.REQUESTS_IN_FLIGHT


@pytest.mark.parametrize("answered_before", [True, False])
def test_a_closed_client_is_a_server_error(stand_in, answered_before):
    triton, url = stand_in(rewards_of)
    client = RewardClient(url)
    if answered_before:
        assert client.score([("p", "1")]) == [1.0]
    client.close()
    for use in (
        lambda: client.score([("p", "1")]),
        lambda: client.wait_ready(60),
        lambda: score_in_background(client, [rollout("a", 0, "1")]),
    ):
        with pytest.raises(RewardServerError, match=CLOSED):
            use()
    assert len(triton.requests) == answered_before


def test_closing_ends_the_wait_for_a_server():
    client = RewardClient(f"127.0.0.1:{free_ports(1)[0]}", timeout_s=0.2)
    with futures.ThreadPoolExecutor(1) as pool:
        wait = pool.submit(client.wait_ready, 600)
        time.sleep(0.3)
        client.close()
        with pytest.raises(RewardServerError, match="reward_model at"):
            wait.result(timeout=30)
