"""A run that lives under s3://: the copy in which tasks of this node work, and its way there and back.

    s3://bucket/prefix/RUN/...        the same files as in a local run's folder
    s3://bucket/prefix/RUN/writer     a pointer: which copy took the run over last

The copy that took the run over last is the newest: it is taken as it is, with what a killed task could not send. Any
other copy first becomes what S3 holds. A copy that goes on moves the pointer to itself and then looks at what is there;
whoever sends looks at the pointer before each DONE. So of two writers of one run the earlier one ends with a
StorageConflict, and so does a lost node that comes back.

A checkpoint's DONE is sent last, so what has one is whole. Of a run's checkpoints a copy holds those that it was asked
for and those that it made.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alignment.atomic_files import disk_errors
from alignment.errors import StorageConflict, StorageError
from alignment.foreign_json import parse_object
from alignment.run_checkpoints import fetch_checkpoint, is_same, remove_checkpoint, send_checkpoint, whole_ones
from alignment.run_copy import CopyState, copy_lock, fetch_lock, load_state, save_state
from alignment.run_folder import RunFolder
from alignment.s3_folders import pull_folder, push_files
from alignment.s3_objects import StoredObject, list_objects
from alignment.s3_pointers import Pointer, move_pointer, read_pointer
from alignment.s3_transfer import upload_file

WRITER = "writer"
SENT_EARLY = ("rollouts", "lineage", "scorers.json", "metrics.jsonl")
"""What is sent while workers still write: files that are replaced whole, and metrics.jsonl, of which a copy is sent."""
TRIES = 8
"""Of fetching checkpoints that are removed meanwhile."""

Note = Callable[[str], None]
Names = Callable[[Sequence[str]], set[str]]
"""Of the names of a run's finished checkpoints, oldest first, those that are meant."""


@dataclass
class RunMirror:
    """The copy `path` of the run at `uri`; `keeps` says which of its checkpoints stay in S3."""

    path: Path
    uri: str
    keeps: Names
    on_note: Note
    state: CopyState = field(default_factory=CopyState)
    sealed: set[str] = field(default_factory=set)
    """Names of the checkpoints that S3 holds whole, and no other ones of these names than the copy."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def current(self, wanted: Names, *, writes: bool, wait_s: float) -> Iterator[None]:
        """The copy as it now is in S3, with the `wanted` checkpoints; nothing is taken from it while the body runs.

        `writes` takes the run over for this copy. Waits without limit for others that work in the copy where that has
        to be changed. Raises StorageConflict where another copy takes the run over at the same time, AlignmentError
        where workers of this node still write the copy after `wait_s` seconds, StorageError.
        """
        with copy_lock(self.path) as lock:
            lock.share()
            is_current = self._is_current(writes=writes)
            while not is_current:
                lock.take_alone(self.on_note)
                self._bring_up(writes=writes, wait_s=wait_s)
                lock.share()  # with a gap in between, in which another process may have been alone with it
                state = load_state(self.path)
                is_current = state is not None and state.made == self.state.made
            with fetch_lock(self.path, self.on_note):  # what is added disturbs nobody who works in the copy
                self._fetch(wanted)
            yield

    def _is_current(self, *, writes: bool) -> bool:
        """Whether a task can work in the copy as it stands, checkpoints that it lacks apart."""
        state = load_state(self.path)
        if state is None:
            return False
        self.state, objects = state, self._look()
        if self._is_newest(read_pointer(f"{self.uri}/{WRITER}")):
            self._unseal_foreign()
            return True
        return not writes and self.state.listing == _digest(objects)

    def _bring_up(self, *, writes: bool, wait_s: float) -> None:
        """Make the copy what S3 holds, unless it wrote last. The caller is alone with it."""
        self.state = load_state(self.path) or CopyState()
        pointer = read_pointer(f"{self.uri}/{WRITER}")
        is_newest = self._is_newest(pointer)
        with contextlib.ExitStack() as stack:
            if not is_newest:
                stack.enter_context(RunFolder(self.path).lock(wait_s=wait_s))
                # Noted first: a kill from here on leaves no copy that is taken for the newest.
                self.state.taken, self.state.listing = False, ""
                save_state(self.path, self.state)
            if writes and _copy_of(pointer) != self.state.copy:
                self._take_over(pointer)
            objects = self._look()
            if is_newest:
                self._unseal_foreign()
            else:
                self._become([_name(self.uri, stored) for stored in objects])
            self.state.taken = is_newest or writes
            self.state.listing = "" if self.state.taken else _digest(objects)
            self.state.made = uuid.uuid4().hex
            save_state(self.path, self.state)

    def push(self, *, early: bool) -> None:
        """Send what is new here, then remove the checkpoints that are kept no longer.

        `early` leaves out what may still grow. Raises StorageConflict where another copy has taken the run over,
        StorageError.
        """
        with self.lock:
            self._check_writer()
            # Before the files: what is sealed later goes with the next sending, which has its records.
            folders = [f for f in sorted(self.path.glob("checkpoints/step-*")) if (f / "DONE").exists()]
            self._send_files(early=early)
            for folder in folders:
                if folder.name not in self.sealed and send_checkpoint(
                    self.uri, folder, may_write=self._check_writer, on_note=self.on_note
                ):
                    self.sealed.add(folder.name)
            names = sorted(self.sealed)
            for name in sorted(set(names) - self.keeps(names)):
                self._check_writer()
                remove_checkpoint(self.uri, name)
                self.sealed.discard(name)
            save_state(self.path, self.state)

    def _look(self) -> list[StoredObject]:
        """The run's objects as they are now."""
        objects = list_objects(self.uri + "/")
        self.sealed = whole_ones(_name(self.uri, stored) for stored in objects)
        return objects

    def _is_newest(self, pointer: Pointer | None) -> bool:
        return self.state.taken and _copy_of(pointer) == self.state.copy

    def _unseal_foreign(self) -> None:
        """Of the newest copy: what S3 holds under a checkpoint's name was sent by a writer that had lost the run."""
        here = [folder for folder in self.path.glob("checkpoints/step-*") if (folder / "DONE").is_file()]
        self.sealed -= {f.name for f in here if f.name in self.sealed and not is_same(self.uri, f)}

    def _become(self, names: Sequence[str]) -> None:
        """Turn the copy into what S3 holds, checkpoints apart, of which those stay that are the same there."""
        there = {name for name in names if name != WRITER and not name.startswith("checkpoints/")}
        for name in self._files_here(early=False):
            if name not in there:
                (self.path / name).unlink()
        for folder in self.path.glob("checkpoints/step-*"):
            if folder.name not in self.sealed or not is_same(self.uri, folder):
                shutil.rmtree(folder)
        pull_folder(self.uri, self.path, only=lambda name: name in there, on_note=self.on_note)
        self.state.files = {name: _stamp(self.path / name) for name in there}

    def _fetch(self, wanted: Names) -> None:
        """Fetch the wanted checkpoints; what is wanted is decided anew where one goes meanwhile."""
        for _ in range(TRIES):
            here = {folder.parent.name for folder in self.path.glob("checkpoints/step-*/DONE")}
            chosen = wanted(sorted(self.sealed | here)) & self.sealed
            places = [self.path / "checkpoints" / name for name in sorted(chosen)]
            if all(fetch_checkpoint(self.uri, place, self.on_note) for place in places):
                return
            self._look()
        raise StorageError(f"{self.uri}: {TRIES} times a checkpoint was removed while it was fetched; try again")

    def _take_over(self, pointer: Pointer | None) -> None:
        value = json.dumps({"copy": self.state.copy, "by": f"process {os.getpid()} on {socket.gethostname()}"})
        move_pointer(f"{self.uri}/{WRITER}", value, pointer.token if pointer else None)

    def _check_writer(self) -> None:
        pointer = read_pointer(f"{self.uri}/{WRITER}")
        if _copy_of(pointer) != self.state.copy:
            by = _said(pointer, "by") if pointer else "somebody who removed its pointer"
            raise StorageConflict(
                f"{self.uri} has been taken over by {by}: this task ends here, and what it had not sent stays in "
                f"{self.path}. Let one command at a time go on with a run"
            )

    def _files_here(self, *, early: bool) -> Iterator[str]:
        """Names of the copy's files but for checkpoints and what is hidden (locks, files that are being written)."""
        for folder, folders, files in os.walk(self.path):
            at = Path(folder).relative_to(self.path)
            # Of checkpoints/ nothing is looked at: workers rename and remove folders there.
            folders[:] = sorted(f for f in folders if not f.startswith(".") and (at / f).as_posix() != "checkpoints")
            for name in sorted((at / file).as_posix() for file in files if not file.startswith(".")):
                path = self.path / name
                if path.is_file() and not path.is_symlink() and (not early or name.split("/")[0] in SENT_EARLY):
                    yield name

    def _send_files(self, *, early: bool) -> None:
        stamps: dict[str, list[int]] = {}
        for name in self._files_here(early=early):
            with contextlib.suppress(FileNotFoundError):  # replaced or removed this instant: the next sending sees it
                stamps[name] = _stamp(self.path / name)
        new = {name for name, stamp in stamps.items() if self.state.files.get(name) != stamp}
        if early and "metrics.jsonl" in new:
            self._send_snapshot("metrics.jsonl")
        push_files(self.path, self.uri, sorted(new - {"metrics.jsonl"} if early else new))
        self.state.files |= {name: stamps[name] for name in new}

    def _send_snapshot(self, name: str) -> None:
        """A file that others append to meanwhile, as it is now."""
        snapshot = self.path / f".{name}.sent"
        with disk_errors(snapshot):
            shutil.copyfile(self.path / name, snapshot)
        upload_file(snapshot, f"{self.uri}/{name}")


def _name(uri: str, stored: StoredObject) -> str:
    return stored.uri.removeprefix(f"{uri}/")


def _digest(objects: Sequence[StoredObject]) -> str:
    return hashlib.sha256("\n".join(f"{stored.uri} {stored.etag}" for stored in objects).encode()).hexdigest()


def _copy_of(pointer: Pointer | None) -> str:
    return _said(pointer, "copy") if pointer else ""


def _said(pointer: Pointer, key: str) -> str:
    try:
        return str(parse_object(pointer.value)[key])
    except (ValueError, KeyError):
        raise StorageError(
            f"the object {WRITER} of a run is not what this program writes: remove it, and resume"
        ) from None


def _stamp(path: Path) -> list[int]:
    """Size, and nanoseconds of the last change, which a file that takes another's place has of its own."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
