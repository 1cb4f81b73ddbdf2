"""Writes a page again and again while a run goes on: in the background, seldom, and never in the run's way.

Whoever shows a page hands over how to draw it; only the newest is drawn and written, at most every REFRESH_S seconds
and for at most SHARE of the time. A fault is told once, and ends the writing alone.
"""

import sys
import threading
import time
from collections.abc import Callable

REFRESH_S = 5.0
"""Least seconds between the ends of two writes."""
SHARE = 0.05
"""Most of the time that drawing and writing may take: where a write takes long, the next one waits longer."""
CLOSE_S = 20.0
"""Seconds that a write in progress may take at the end, and the last one after it."""

Draw = Callable[[], str]


class CardWriter:
    """`save` stores a page, whole. `show` and `close` come from one thread."""

    def __init__(self, save: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._save, self._clock = save, clock
        self._newest: Draw | None = None
        self._thread: threading.Thread | None = None
        self._due = -REFRESH_S
        self._failed = False

    def show(self, draw: Draw) -> None:
        """Take a newer page, and write it if it is time to. It comes back at once."""
        self._newest = draw
        busy = self._thread is not None and self._thread.is_alive()
        if not busy and not self._failed and self._clock() >= self._due:
            self._begin(draw)

    def close(self) -> None:
        """Write the newest page, if it is not written yet."""
        if self._ended() and self._newest is not None and not self._failed:
            self._begin(self._newest)
            self._ended()

    def _ended(self) -> bool:
        """Waits for the write in progress: False for that of a store that hangs, which ends with the process."""
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        return self._thread is None or not self._thread.is_alive()

    def _begin(self, draw: Draw) -> None:
        self._newest = None
        self._thread = threading.Thread(target=self._write, args=(draw,), daemon=True)
        self._thread.start()

    def _write(self, draw: Draw) -> None:
        begun = self._clock()
        try:
            self._save(draw())
        except Exception as error:  # of a store, of a template: whatever it is, it must not stop a run
            self._failed = True
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"the card is no longer written: {text}", file=sys.stderr, flush=True)
        now = self._clock()
        self._due = now + max(REFRESH_S, (now - begun) / SHARE)
