"""Sends what is new in the copy of a run while its task goes on, and all of it at the end."""

import threading

from alignment.errors import StorageConflict
from alignment.run_mirror import RunMirror


class Sender:
    """Sends a mirror's news from a thread of its own: requests that come while it sends are one more sending."""

    def __init__(self, mirror: RunMirror) -> None:
        self._mirror = mirror
        self._asked, self._ended = threading.Event(), False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="sender", daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        """Where the run lives."""
        return self._mirror.uri

    def send(self) -> None:
        """Ask for a sending; raises what the last one met."""
        if self._error is not None:
            raise self._error
        self._asked.set()

    def close(self) -> None:
        """Wait for the thread, then send everything. Raises StorageError."""
        self._ended = True
        self._asked.set()
        self._thread.join()
        if isinstance(self._error, StorageConflict):
            raise self._error
        self._mirror.push(early=False)

    def _work(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            if self._ended:
                return
            try:
                self._mirror.push(early=True)
            except Exception as error:  # raised where the next sending is asked for
                self._error = error
