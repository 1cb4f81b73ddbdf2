"""Sends what is new in the copy of a run while its task goes on, and all of it at the end."""

import threading

from alignment.errors import StorageConflict
from alignment.run_mirror import RunMirror


class Sender:
    """Sends a mirror's news from a thread of its own: requests that come while it sends are one more sending."""

    def __init__(self, mirror: RunMirror) -> None:
        self._mirror = mirror
        self._asked, self._ended = threading.Event(), False
        self._conflict: StorageConflict | None = None
        self._thread = threading.Thread(target=self._work, name="sender", daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        """Where the run lives."""
        return self._mirror.uri

    def send(self) -> None:
        """Ask for a sending. Raises StorageConflict where the run was taken over by somebody else."""
        if self._conflict is not None:
            raise self._conflict
        self._asked.set()

    def close(self) -> None:
        """Wait for the thread, then send everything. Raises StorageError."""
        self._ended = True
        self._asked.set()
        self._thread.join()
        if self._conflict is not None:
            raise self._conflict
        self._mirror.push(early=False)

    def _work(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            if self._ended:
                return
            try:
                self._mirror.push(early=True)
            except StorageConflict as conflict:  # raised where the next sending is asked for
                self._conflict = conflict
                return
            except Exception as error:  # the task can go on; `close` tries again at the latest, and raises
                said = f"not all could be sent ({type(error).__name__}: {error})"
                self._mirror.on_note(f"{self.uri}: {said}; tried again after the next step")
