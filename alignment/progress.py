"""What a person sees while a run goes on: lines with a bar, made from the events of the workers.

Events are those of metrics.jsonl ("step", "validation", and others that are no news here) and two that are
not kept: {"kind": "phase", "step", "phase", "done", "total", "tokens"} and {"kind": "note", "text"}.

There is one line per finished step, and while a step lasts longer one every 10 s. Nothing is redrawn in place:
Metaflow, through which all output goes, puts a prefix before each line and passes whole lines on.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TextIO

QUIET_SECONDS = 10.0
"""Shortest time between two lines about a step that is not finished."""
FIT_SECONDS = 5.0
"""Shortest time between two lines about the steps of a training."""
BAR = 10
"""Characters of the bar."""


@dataclass(frozen=True)
class ProgressState:
    """What is known about the run; rewards and tokens per second are those of the last finished step."""

    total_steps: int
    finished_steps: int = 0
    step: int = 0
    phase: str = ""
    done: int = 0
    total: int = 0
    reward: float | None = None
    selected_reward: float | None = None
    validation_reward: float | None = None
    tokens_per_second: float | None = None
    step_seconds: tuple[float, ...] = ()


def advance(state: ProgressState, event: Mapping[str, Any], step_seconds: float | None = None) -> ProgressState:
    """The state after an event; `step_seconds` is how long a finished step took by the clock.

    An event of another kind changes nothing. The first step after a start of the workers is timed by its
    phases, since no step ended before it.
    """
    kind = event.get("kind")
    if kind == "phase":
        return replace(
            state, step=event["step"], phase=event["phase"], done=event.get("done", 0), total=event.get("total", 0)
        )
    if kind == "step":
        seconds = sum(event["seconds"].values()) if step_seconds is None else step_seconds
        return replace(
            state,
            finished_steps=event["step"],
            step=event["step"],
            phase="",
            reward=event["reward_mean"],
            selected_reward=event["selected_reward_mean"],
            tokens_per_second=event.get("tokens_per_second"),
            step_seconds=(*state.step_seconds, seconds),
        )
    if kind == "validation":
        return replace(state, phase="", validation_reward=event["reward_mean"])
    return state


def render_line(state: ProgressState) -> str:
    """The line for a state, e.g. `[###.......] step 3/10 | reward 0.412, selected 1.870 | 850 tokens/s | 48 s left`.

    What is not known yet is left out. The time left, to the last RS step, is the median duration of the finished
    steps times the steps to go.
    """
    parts = [f"{_bar(state.finished_steps, state.total_steps)} step {state.step}/{state.total_steps}"]
    if state.phase:
        parts.append(f"{state.phase} {state.done}/{state.total}" if state.total else state.phase)
    if state.reward is not None:
        selected = "none selected" if state.selected_reward is None else f"selected {state.selected_reward:.3f}"
        parts.append(f"reward {state.reward:.3f}, {selected}")
    if state.validation_reward is not None:
        parts.append(f"validation {state.validation_reward:.3f}")
    if state.tokens_per_second is not None:
        parts.append(f"{state.tokens_per_second:.0f} tokens/s")
    to_go = state.total_steps - state.finished_steps
    if state.step_seconds and to_go > 0:
        parts.append(f"{duration(statistics.median(state.step_seconds) * to_go)} left")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as people say them: `48 s`, `5 min 04 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class PhaseLines:
    """Shows a task of several phases on `stream`: `[####......] evaluating base 40/96 | 12 s left`.

    `total` is the units of work of all phases together. There is a line every 10 s, and one at the end of a phase.
    """

    def __init__(self, total: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total, clock
        self._stream = sys.stderr if stream is None else stream
        self._begun = self._shown_at = clock()
        self._done: dict[str, int] = {}

    def phase(self, name: str) -> Callable[[int, int], None]:
        """What a phase of this name reports to: how many of how many units are done."""
        return lambda done, total: self._update(name, done, total)

    def note(self, text: str) -> None:
        """A line that is no progress."""
        self._stream.write("".join(c if c.isprintable() else " " for c in text) + "\n")
        self._stream.flush()

    def _update(self, name: str, done: int, total: int) -> None:
        now, self._done[name] = self._clock(), done
        if done < total and now - self._shown_at < QUIET_SECONDS:
            return
        self._shown_at = now
        overall = sum(self._done.values())
        filled = BAR * overall // self._total
        left = (now - self._begun) * (self._total - overall) / overall if overall else 0.0
        ending = f" | {duration(left)} left" if 0 < overall < self._total else ""
        self.note(f"[{'#' * filled}{'.' * (BAR - filled)}] {name} {done}/{total}{ending}")


class ProgressLines:
    """Shows the events of a run on `stream` (by default standard error)."""

    def __init__(
        self, total_steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.state = ProgressState(total_steps)
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._shown_at = clock()
        self._step_ended_at: float | None = None

    def update(self, event: Mapping[str, Any], step_seconds: float | None = None) -> None:
        """Takes one event and shows what has changed; `step_seconds` where the clock here cannot tell them."""
        now = self._clock()
        kind = event.get("kind")
        if step_seconds is None and self._step_ended_at is not None:
            step_seconds = now - self._step_ended_at
        self.state = advance(self.state, event, step_seconds)
        if kind == "step":
            self._step_ended_at = now
        if kind == "note":
            self._print(str(event["text"]))
        elif kind == "step" or (kind in ("phase", "validation") and now - self._shown_at >= QUIET_SECONDS):
            self._shown_at = now
            self._print(render_line(self.state))

    def _print(self, text: str) -> None:
        self._stream.write("".join(c if c.isprintable() else " " for c in text) + "\n")
        self._stream.flush()


class FitLines:
    """Lines about a training (see `alignment.fitting`): at most one every few seconds, with rate and time left.

    `events` opens the kinds of its events, `title` each line.
    """

    def __init__(
        self, on_line: Callable[[str], None], events: str, title: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_line, self._events, self._title, self._clock = on_line, events, title, clock
        self._begun = self._said = clock()
        self._first: int | None = None
        self._done = 0

    def update(self, event: Mapping[str, Any]) -> None:
        """Take a worker's event."""
        if event["kind"] == "note":
            self._on_line(f"{self._title}: {event['text']}")
        elif event["kind"] == f"{self._events}_validation":
            accuracy = f", accuracy {event['accuracy']:.3f}" if event.get("accuracy") is not None else ""
            self._on_line(f"{self._title}: validation after step {event['step']}: loss {event['loss']:.3f}{accuracy}")
        elif event["kind"] == f"{self._events}_step":
            self._step(event)

    def _step(self, event: Mapping[str, Any]) -> None:
        now, step, steps = self._clock(), event["step"], event["steps"]
        line = f"{self._title}: {_bar(step, steps)} step {step}/{steps} | loss {event['loss']:.3f}"
        if self._first is None:  # imports and loading came before it, so that there is no rate yet
            self._begun, self._said, self._first = now, now, step
            self._on_line(line)
            return
        unit = "tokens" if "tokens" in event else "examples"
        self._done += event[unit]
        if now - self._said < FIT_SECONDS and step < steps:
            return
        self._said = now
        seconds = max(now - self._begun, 1e-6)
        left = (steps - step) * seconds / (step - self._first)
        self._on_line(f"{line} | {self._done / seconds:.1f} {unit}/s | {duration(left)} left")


class TransferLines:
    """Lines about bytes that go to or come from a store: at most one every 10 s, with rate and time left.

    `total` is in bytes. Quick transfers show nothing; `update` may be called from several threads, one at a time.
    """

    def __init__(
        self, on_line: Callable[[str], None], title: str, total: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_line, self._title, self._total, self._clock = on_line, title, total, clock
        self._begun = self._said = clock()
        self._done = 0

    def update(self, count: int) -> None:
        """`count` more bytes are done."""
        now, self._done = self._clock(), self._done + count
        if now - self._said < QUIET_SECONDS or self._done > self._total:
            return
        self._said = now
        rate = self._done / max(now - self._begun, 1e-6)
        left = f" | {duration((self._total - self._done) / rate)} left" if 0 < self._done < self._total else ""
        self._on_line(
            f"{self._title}: {_bar(self._done, self._total)} {self._done / 1e6:.0f}/{self._total / 1e6:.0f} MB"
            f" | {rate / 1e6:.1f} MB/s{left}"
        )


def _bar(done: int, total: int) -> str:
    filled = BAR * done // total
    return f"[{'#' * filled}{'.' * (BAR - filled)}]"
