"""What Triton says of its own work in an RS step: mean batch, waiting, computing, failures, padding.

The server counts from its start, so two readings are subtracted. A counter that went down means that the server was
started again, or its model loaded again, in between; then the second reading alone counts. (One that has counted
more since the restart than before it is not recognised.) A server that others use too counts their requests as well,
and a local one those by which its launcher sees that it lives.

Batches and durations come over gRPC. Padding and refusals are metrics of the served model's own, which stand on the
metrics URL alone: a local server's is known, an external one's is not. There padding stays None, and `failures` lacks
the refusals, since Triton counts a python model's error responses as successes.

A reading never stops a run and takes a few seconds at the most: one that fails is said once, and its numbers are None.
"""

import math
import re
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, fields
from http.client import HTTPException
from types import TracebackType
from typing import Any, Self

READ_S = 1.0
"""Seconds that the statistics, and then the metrics page, may take."""
PAGE_BYTES = 1 << 22
"""Largest metrics page that is read; Triton's have a few thousand bytes for each model."""
PAGE_COUNTERS = {
    "reward_tokens_real_total": "real_tokens",
    "reward_tokens_padded_total": "padded_tokens",
    "reward_requests_refused_total": "refused",
}
"""Prometheus counters of the served model, and their fields of Counters."""
FIELDS = ("mean_batch", "queue_ms", "compute_ms", "failures", "real_over_padded", "restarted")
"""Keys of `difference`'s result."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Sums since the server's start. An inference is one conversation, an execution one batch of them.

    Durations are nanoseconds, summed over the requests counted beside them: `queued` waited, `computed` were computed
    (an answer from the response cache is not). Tokens and refused requests are None where the metrics URL is unknown
    or does not answer.
    """

    inferences: int
    executions: int
    queued: int
    queue_ns: int
    computed: int
    compute_ns: int
    failures: int
    real_tokens: float | None = None
    padded_tokens: float | None = None
    refused: float | None = None


def difference(before: Counters, after: Counters) -> dict[str, Any]:
    """What happened between two readings, under FIELDS; None where nothing was counted.

    `mean_batch` is conversations per execution, `queue_ms` and `compute_ms` milliseconds per request, `failures`
    requests that failed in Triton or, where that is known, were refused by the model, `real_over_padded` the share of
    computed tokens that are no padding.
    """
    pairs = [(getattr(before, field.name), getattr(after, field.name)) for field in fields(Counters)]
    restarted = any(b is not None and a is not None and a < b for b, a in pairs)
    # What only one of the readings knows is not known, but after a restart the second alone counts.
    parts: list[Any] = [a if restarted else None if a is None or b is None else a - b for b, a in pairs]
    grown = Counters(*parts)
    return {
        "mean_batch": _ratio(grown.inferences, grown.executions),
        "queue_ms": _ratio(grown.queue_ns / 1e6, grown.queued),
        "compute_ms": _ratio(grown.compute_ns / 1e6, grown.computed),
        "failures": grown.failures + int(grown.refused or 0),
        "real_over_padded": _ratio(grown.real_tokens, grown.padded_tokens),
        "restarted": restarted,
    }


class ServerWatch:
    """Readings around an RS step, over a gRPC channel of their own. Use it as a context manager.

    `metrics_url` is that of a local server. `on_note` takes what a person should know; each kind of fault is
    said once.
    """

    def __init__(
        self, url: str, model_name: str, model_version: str, metrics_url: str | None, on_note: Callable[[str], None]
    ) -> None:
        import tritonclient.grpc as triton

        self._model, self._metrics_url, self._on_note = (model_name, model_version), metrics_url, on_note
        self._fault: type[Exception] = triton.InferenceServerException
        self._client = triton.InferenceServerClient(url)
        self._before: Counters | None = None
        self._said: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def begin(self) -> None:
        """Take the first reading."""
        self._before = self._read()

    def end(self) -> dict[str, Any]:
        """The difference to the first reading; all None where one of the two failed."""
        # Whoever gave no first answer is not asked again within the step.
        before, after = self._before, None if self._before is None else self._read()
        if before is None or after is None:
            return dict.fromkeys(FIELDS)
        found = difference(before, after)
        if found["restarted"]:
            self._on_note("the reward server was started again: its statistics of this RS step count from there")
        return found

    def _read(self) -> Counters | None:
        try:
            answer = self._client.get_inference_statistics(*self._model, client_timeout=READ_S)
        except self._fault as error:
            self._say_once("statistics", f"the reward server does not tell its statistics ({error})")
            return None
        stats = list(answer.model_stats)
        parts = [s.inference_stats for s in stats]
        return Counters(
            inferences=sum(s.inference_count for s in stats),
            executions=sum(s.execution_count for s in stats),
            queued=sum(p.queue.count for p in parts),
            queue_ns=sum(p.queue.ns for p in parts),
            computed=sum(p.compute_infer.count for p in parts),
            compute_ns=sum(p.compute_infer.ns for p in parts),
            failures=sum(p.fail.count for p in parts),
            **self._read_page(),
        )

    def _read_page(self) -> dict[str, float]:
        if self._metrics_url is None:
            return {}
        try:
            return page_counters(_page(self._metrics_url), *self._model)
        except (OSError, HTTPException, ValueError) as error:
            self._say_once(
                "metrics", f"{self._metrics_url} does not answer ({error}): padding and refusals are not known"
            )
            return {}

    def _say_once(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._on_note(text)


def _page(url: str) -> str:
    """The text at `url`. Raises OSError, also for one that comes too slowly, HTTPException, and ValueError."""
    deadline, page = time.monotonic() + READ_S, b""
    # No proxy: a local server's metrics are on loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    # This timeout is that of each read from the socket, not of all.
    with opener.open(url, timeout=READ_S) as response:
        while chunk := response.read1(1 << 16):
            page += chunk
            if len(page) > PAGE_BYTES:
                raise ValueError(f"more than {PAGE_BYTES} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all of it came within {READ_S:g} s")
    return page.decode()


def page_counters(text: str, model: str, version: str) -> dict[str, float]:
    """The fields of PAGE_COUNTERS from Prometheus text, summed over instances; {} unless all are there.

    Raises ValueError for a value that is no finite number.
    """
    sums: dict[str, float] = {}
    for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        if name in PAGE_COUNTERS:
            known = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if known.get("model") == model and known.get("version") == version:
                field = PAGE_COUNTERS[name]
                sums[field] = sums.get(field, 0.0) + float(value)
                if not math.isfinite(sums[field]):
                    raise ValueError(f"{name} is {value}")
    return sums if len(sums) == len(PAGE_COUNTERS) else {}


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole
