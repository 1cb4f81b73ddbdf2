"""What a node keeps of its copy of a run under s3:// beside the run's own files: a note of its state, and locks.

    .mirror.json   the copy's name, and how it stands to what S3 holds (`CopyState`)
    .copy.lock     shared by whoever works in the copy, exclusive to make it what S3 holds
    .fetch.lock    exclusive to add checkpoints from S3, which disturbs nobody
    .writer.lock   of the one task of this node that sends from the copy

Locks end with their process, whatever ends it.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from alignment.atomic_files import disk_errors, write_json
from alignment.errors import AlignmentError

STATE = ".mirror.json"
_HELD: set[tuple[Path, int]] = set()
"""Copies that a thread of this process works in: it would wait for itself."""


@dataclass
class CopyState:
    """How a copy stands to S3."""

    copy: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The copy's name, which the run's `writer` object may say."""
    taken: bool = False
    """Whether this copy became what S3 holds since it last took the run over: false while it does."""
    listing: str = ""
    """Digest of what S3 held when the copy became that for reading; empty since somebody may have written here."""
    made: str = ""
    """Another one each time that the copy is changed from S3."""
    files: dict[str, list[int]] = field(default_factory=dict)
    """Size and time of each file as it was last sent or fetched."""


def load_state(path: Path) -> CopyState | None:
    """The state of the copy in `path`; None where there is no copy yet."""
    file = path / STATE
    return CopyState(**json.loads(file.read_text())) if file.is_file() else None


def save_state(path: Path, state: CopyState) -> None:
    """Raises DiskError."""
    write_json(path / STATE, asdict(state))


@dataclass(frozen=True)
class CopyLock:
    """The lock of a copy in the hands of one task."""

    path: Path
    file: IO[bytes]
    nested: bool

    def share(self) -> None:
        """Keep others from changing the copy."""
        fcntl.flock(self.file, fcntl.LOCK_SH)

    def take_alone(self, on_note: Callable[[str], None]) -> None:
        """Wait, without limit, until nobody else works in the copy. Raises AlignmentError where this thread does."""
        if self.nested:
            raise AlignmentError(
                f"{self.path} is no longer what S3 holds, and this command works in it already: start it again"
            )
        _lock(self.file, self.path, on_note)


@contextlib.contextmanager
def copy_lock(path: Path) -> Iterator[CopyLock]:
    """The lock of the copy in `path`, not held yet, and given back at the end. Raises DiskError."""
    key = (path, threading.get_ident())
    nested = key in _HELD
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / ".copy.lock", "ab")  # noqa: SIM115 closed below, after the body
    with file:
        _HELD.add(key)
        try:
            yield CopyLock(path, file, nested)
        finally:
            if not nested:
                _HELD.discard(key)


@contextlib.contextmanager
def fetch_lock(path: Path, on_note: Callable[[str], None]) -> Iterator[None]:
    """Makes this task the only one of its node that fetches checkpoints into the copy. Waits without limit."""
    with open(path / ".fetch.lock", "ab") as file:
        _lock(file, path, on_note)
        yield


def _lock(file: IO[bytes], path: Path, on_note: Callable[[str], None]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        on_note(f"{path} is being read or fetched by another process of this node: waiting until that ends")
        fcntl.flock(file, fcntl.LOCK_EX)


@contextlib.contextmanager
def writer_lock(path: Path, wait_s: float) -> Iterator[None]:
    """Makes this task the only one of its node that sends from the copy; tasks that follow each other take turns.

    Raises AlignmentError, naming the process, where another one still sends after `wait_s` seconds; DiskError.
    """
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / ".writer.lock", "a+")  # noqa: SIM115 closed below, after the body
    with file:
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.2)
                    continue
                file.seek(0)
                by = file.read().strip() or "another process"
            raise AlignmentError(
                f"{path} is being written by {by}: wait until it ends, or stop it, before you resume this run"
            )
        with disk_errors(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield
