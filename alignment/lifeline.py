"""Processes that must not outlive their owner, kill -9 of the owner included, and that stop in order where they can.

A child holds the reading end of a pipe as its standard input and nothing is ever written to it: when the
owner is gone, for whatever reason, the read returns. Grandchildren inherit the pipe (torch.distributed.run
hands its standard input on), so a whole tree hangs on one line. What has nothing to save ends at once; a
worker is asked to stop and gets a grace time in which to save a checkpoint.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

ORPHANED = 113
"""Exit status of a process that ended because its owner was gone or its grace time over."""


OVERTIME = 114
"""Exit status of a process that ended because it took too long."""
INTERRUPTED_S = 20.0
"""Seconds that a scheduler and its tasks on this node get to end after an interrupt."""
ELSEWHERE_S = 120.0
"""The same for a scheduler that has to ask a cluster for the end of each task."""


class StopRequested(Exception):
    """This process was asked to stop."""


class Stop:
    """Whether this process was asked to stop: by the end of its owner, a signal, or the time limit of the run."""

    def __init__(self, *, grace_s: float = 60.0, ends_at: float | None = None) -> None:
        """`ends_at` is Unix time; `grace_s` the seconds from a request to the end of the process by force."""
        self._grace_s, self._ends_at = grace_s, ends_at
        self._reason = ""

    @property
    def reason(self) -> str:
        """Why to stop; "" while there is no reason."""
        if not self._reason and self._ends_at is not None and time.time() >= self._ends_at:
            return "loop.max_time_per_run is over"
        return self._reason

    def check(self) -> None:
        """Raise StopRequested where there is a reason to stop."""
        if self.reason:
            raise StopRequested(self.reason)

    def request(self, reason: str) -> None:
        """Ask for a stop; after the grace time the process ends by force. Asking again changes nothing."""
        if self._reason:
            return
        self._reason = reason
        force = threading.Timer(self._grace_s, os._exit, (ORPHANED,))
        force.daemon = True
        force.start()

    def listen(self) -> None:
        """From now on, take the end of standard input, SIGTERM and SIGINT for requests. Call in the main thread."""
        act_with_stdin(lambda: self.request("its owner has ended"))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda n, _: self.request(signal.Signals(n).name))


def end_with_stdin() -> None:
    """From now on, end this process as soon as its standard input reaches its end."""
    act_with_stdin(lambda: os._exit(ORPHANED))


def end_with_parent(poll_s: float = 0.5) -> None:
    """From now on, end this process as soon as its parent is gone (for processes that did not get a pipe)."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_s)
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def interrupt_with_stdin(grace_s: float) -> None:
    """From now on, interrupt this process and its group as Ctrl-C does once its standard input ends, later by force.

    For a scheduler, which has to end tasks that may run elsewhere; it must lead a session of its own.
    """

    def interrupt() -> None:
        os.killpg(os.getpgrp(), signal.SIGINT)
        time.sleep(grace_s)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    act_with_stdin(interrupt)


@contextlib.contextmanager
def end_after(seconds: float | None) -> Iterator[None]:
    """End this process by force if the body takes longer, even where no Python code runs that could be interrupted."""

    def end() -> None:
        print(f"this task has taken more than {seconds:.0f} s: it is ended", file=sys.stderr, flush=True)
        os._exit(OVERTIME)

    with acting_after(seconds, end):
        yield


@contextlib.contextmanager
def acting_after(seconds: float | None, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` in a thread of its own once the body has taken that long; never with None."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def act_with_stdin(act: Callable[[], None]) -> None:
    """From now on, call `act` in a thread of its own once the standard input of this process ends."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        act()

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
