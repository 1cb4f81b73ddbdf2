"""Scoring: conversations to rewards, through a Triton server that serves the exported reward model.

Text goes over the wire, never token ids. A request carries a few conversations and several requests are in
flight, which is what Triton's dynamic batching feeds on. A failed score is retried where a retry can cure it
and is an error otherwise; it never becomes a number.

`tritonclient` is imported when a client is made, so that importing this module stays light.
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from alignment.errors import RewardServerError
from alignment.score_cache import ScoreCache
from alignment.scoring_faults import Fault, fault
from alignment.scoring_wire import CANARY, checked, reward_column, text_tensor, to_json
from alignment.types import Conversation, Message, Rollout, ScoredRollout, with_reward

T = TypeVar("T")

TEXTS_PER_REQUEST = 8
REQUESTS_IN_FLIGHT = 8
FIRST_CONTACT_S = 10.0
# Waits between attempts, in seconds: doubled from the first to the longest.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 10.0
# A channel that waits two minutes before it reconnects would outlast every retry.
CHANNEL_ARGS = [
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]


class RewardClient:
    """One gRPC channel to a reward model. Use it as a context manager, one per process, from any thread.

    `url` is host:port of Triton's gRPC. An empty `model_version` takes the newest version that answers first
    and stays with it. `timeout_s` is the deadline of one attempt in seconds, `patience_s` how long a server may
    be gone or overloaded before scoring gives up. `check`, if given, is asked between attempts and raises where
    nobody should wait any longer: a server known to be dead, a caller that was asked to stop.
    """

    def __init__(
        self,
        url: str,
        model_name: str = "reward_model",
        model_version: str = "",
        timeout_s: float = 60.0,
        *,
        patience_s: float = 60.0,
        check: Callable[[], None] | None = None,
    ) -> None:
        import tritonclient.grpc as triton

        self.url, self.model_name, self.timeout_s, self.patience_s = url, model_name, timeout_s, patience_s
        self._version, self._check = model_version, check
        self._ready, self._closing = False, threading.Event()
        self._triton = triton
        self._client = triton.InferenceServerClient(url, channel_args=CHANNEL_ARGS)
        self._requests = ThreadPoolExecutor(REQUESTS_IN_FLIGHT, thread_name_prefix="reward-request")
        self._background = ThreadPoolExecutor(1, thread_name_prefix="reward-background")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop what has not been sent, wait for what is in flight but not for retries, close the channel.

        Scores that are still waited for, in any thread, end in RewardServerError.
        """
        self._closing.set()
        # The background's jobs wait for these, and end when they are cancelled.
        self._requests.shutdown(cancel_futures=True)
        self._background.shutdown()
        self._client.close()

    @property
    def model_version(self) -> str:
        """The version that answers; waits for the server if none has answered yet. Raises RewardServerError."""
        self._first_contact()
        return self._version

    def wait_ready(self, timeout_s: float, *, busy_s: float = 0.0) -> None:
        """Wait until the model answers a canary conversation.

        Raises RewardServerError after `timeout_s` seconds, or when the client is closed.

        A server that takes the canary and does not answer in time, or whose queue is full, is busy: then up to
        `busy_s` seconds.

        The server's own readiness is not asked: it stays "ready" after the model's process has died.
        """
        begun, pause = time.monotonic(), 0.1
        deadline = begun + timeout_s
        while True:
            if self._check is not None:
                self._check()
            reason = self.probe(max(0.1, min(self.timeout_s, deadline - time.monotonic())))
            if reason is None:
                return
            if reason.is_overload:
                deadline = max(deadline, begun + busy_s)
            if deadline - time.monotonic() < pause:
                raise RewardServerError(
                    f"{self._who()} did not answer within {deadline - begun:g} s ({reason}): check that the server "
                    "runs and serves this model and version, or unset reward.url to have one started"
                )
            self._closing.wait(pause)
            pause = min(2 * pause, 2.0)

    def probe(self, timeout_s: float) -> Fault | None:
        """One canary inference: None if the model answered, else why not yet. Remembers the version that answered.

        Raises RewardServerError where waiting cannot help.
        """
        try:
            rewards, version = self._infer([CANARY], timeout_s)
        except self._triton.InferenceServerException as error:
            why = fault(error)
            if why.is_curable or why.status == "NOT_FOUND":
                return why
            raise RewardServerError(
                f"{self._who()} cannot score a plain conversation ({why}): export it again"
            ) from error
        if len(rewards) != 1 or not math.isfinite(rewards[0]):
            raise RewardServerError(f"{self._who()} answered a canary conversation with {rewards}, not one number")
        self._version, self._ready = self._version or version, True
        return None

    def score(self, conversations: Sequence[Conversation | Sequence[str]]) -> list[float]:
        """The reward of each conversation, in order; none for none.

        A conversation is a list of {"role", "content"} messages, or a prompt and a response.

        Raises RewardRequestError, naming the conversation's index, for one that the model refuses, and
        RewardServerError when the server fails beyond the retries.
        """
        texts = [to_json(conversation, index) for index, conversation in enumerate(conversations)]
        if not texts:
            return []
        self._first_contact()
        futures: list[Future[list[float]]] = []
        try:
            for s in range(0, len(texts), TEXTS_PER_REQUEST):
                futures.append(self._submit(self._requests, self._score, texts[s : s + TEXTS_PER_REQUEST], s))
            return [reward for future in futures for reward in future.result()]
        except CancelledError as error:
            raise self._closed() from error
        finally:
            for future in futures:
                future.cancel()

    def _first_contact(self) -> None:
        if not self._ready:
            self.wait_ready(min(self.timeout_s, FIRST_CONTACT_S), busy_s=self.patience_s)

    def _score(self, texts: list[str], offset: int) -> list[float]:
        """One request with its retries; `offset` is the index of its first conversation."""
        wait, gone_since = FIRST_WAIT_S, 0.0
        for attempt in itertools.count(1):
            begun = time.monotonic()
            try:
                rewards, _ = self._infer(texts, self.timeout_s)
                return checked(rewards, len(texts), self._who(), offset)
            except self._triton.InferenceServerException as error:
                why, now = fault(error), time.monotonic()
                if not why.is_curable:
                    raise why.refusal(self._who(), offset, len(texts)) from error
                gone_since = gone_since or begun
                if now - gone_since + wait > self.patience_s:
                    raise RewardServerError(
                        f"{self._who()} failed {attempt} times in {now - gone_since:.0f} s, at last with {why}. "
                        f"{why.remedy(self.timeout_s)}"
                    ) from error
            if self._check is not None:
                self._check()
            if self._closing.wait(wait):
                raise self._closed()
            wait = min(2 * wait, LONGEST_WAIT_S)
        raise AssertionError("an attempt returns or raises in the end")

    def _infer(self, texts: list[str], timeout_s: float) -> tuple[list[float], str]:
        """Rewards and the version that gave them. Raises tritonclient's exception, and RewardServerError."""
        if self._closing.is_set():
            raise self._closed()
        result = self._client.infer(
            self.model_name,
            [text_tensor(texts)],
            model_version=self._version,
            outputs=[self._triton.InferRequestedOutput("reward")],
            client_timeout=timeout_s,
        )
        rewards, version = reward_column(result), str(result.get_response().model_version)
        if rewards is None or not version:
            raise RewardServerError(
                f"{self._who()} gave an answer that is no column of rewards: is it a reward model's export?"
            )
        if self._version and version != self._version:
            raise RewardServerError(f"{self._who()} answered as version {version}: serve the one asked for")
        return rewards, version

    def _submit(self, pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """The function's future. Raises RewardServerError once the client is closed."""
        try:
            return pool.submit(function, *arguments)
        except RuntimeError as error:
            if not self._closing.is_set():
                raise
            raise self._closed() from error

    def _closed(self) -> RewardServerError:
        return RewardServerError(f"{self._who()}: the client was closed before an answer came")

    def _who(self) -> str:
        version = f" version {self._version}" if self._version else ""
        return f"the reward model {self.model_name}{version} at {self.url}"


def score_rollouts(
    client: RewardClient, rollouts: Sequence[Rollout], cache: ScoreCache | None = None
) -> list[ScoredRollout]:
    """The rollouts with their rewards, in order; equal responses to one prompt are scored once.

    What `cache` knows is not sent to the server, and what the server answers is kept there.
    Raises RewardError, DiskError, DataError.
    """
    first = {(r.prompt_id, r.response): r for r in reversed(rollouts)}
    conversations = [r.conversation for r in first.values()]
    given = client.score(conversations) if cache is None else _cached_scores(client, conversations, cache)
    rewards = dict(zip(first, given, strict=True))
    version = client.model_version if rollouts else ""
    return [
        with_reward(r, rewards[r.prompt_id, r.response], model=client.model_name, version=version) for r in rollouts
    ]


def _cached_scores(client: RewardClient, conversations: Sequence[list[Message]], cache: ScoreCache) -> list[float]:
    found = cache.known(conversations)
    asked = [c for c, reward in zip(conversations, found, strict=True) if reward is None]
    new = client.score(asked)
    cache.add(asked, new)
    answers = iter(new)
    return [next(answers) if reward is None else reward for reward in found]


def score_in_background(
    client: RewardClient, rollouts: Sequence[Rollout], cache: ScoreCache | None = None
) -> Future[list[ScoredRollout]]:
    """`score_rollouts` in the client's own thread, one batch after the other, while the caller generates.

    Raises RewardServerError once the client is closed.
    """
    return in_background(client, score_rollouts, client, rollouts, cache)


def in_background(client: RewardClient, function: Callable[..., T], *arguments: Any) -> Future[T]:
    """A call in the client's own thread. Raises RewardServerError once the client is closed."""
    return client._submit(client._background, function, *arguments)
