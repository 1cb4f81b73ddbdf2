"""A run that lives under s3://: the copy in which tasks of this node work, and its way there and back.

    s3://bucket/prefix/RUN/...        the same files as in a local run's folder
    s3://bucket/prefix/RUN/writer     a pointer: which copy wrote last

The copy that wrote last is the newest: it is taken as it is, with what a killed task could not send. Any other copy
first becomes what S3 holds. A copy that goes on moves the pointer to itself, and looks at it before it sends: so of two
writers of one run the earlier one ends with a StorageConflict, and so does a lost node that comes back.

A checkpoint's DONE is sent last, and only where none is there, so what has one is whole. Of a run's checkpoints a copy
holds those that it was asked for and those that it made.
"""

import contextlib
import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.atomic_files import disk_errors, write_json
from alignment.errors import DataError, StorageConflict
from alignment.run_folder import RunFolder
from alignment.s3_folders import pull_folder, push_folder
from alignment.s3_objects import delete_objects, list_objects, read_bytes, write_bytes
from alignment.s3_pointers import Pointer, move_pointer, read_pointer
from alignment.s3_transfer import upload_file

STATE = ".mirror.json"
"""Of a copy: its name, and the size and time of each file as it was last sent or fetched."""
SENT_EARLY = ("rollouts", "lineage", "scorers.json", "metrics.jsonl")
"""What is sent while workers still write: files that are replaced whole, and metrics.jsonl, of which a copy is sent."""

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
    copy: str = ""
    seen: dict[str, list[int]] = field(default_factory=dict)
    sealed: set[str] = field(default_factory=set)
    """Names of the checkpoints that S3 holds whole."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def pull(self, wanted: Names, *, writes: bool, wait_s: float) -> None:
        """Make the copy current, with the `wanted` checkpoints; `writes` takes the run over for this copy.

        Raises StorageConflict where another copy takes it over at the same time, AlignmentError where workers of this
        node still write the copy after `wait_s` seconds.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._load_state()
        pointer = read_pointer(f"{self.uri}/writer")
        is_newest = _copy_of(pointer) == self.copy
        with contextlib.ExitStack() as stack:
            if not is_newest:
                stack.enter_context(RunFolder(self.path).lock(wait_s=wait_s))
            names = self._names_there()
            self.sealed = {name.split("/")[1] for name in names if _is_done(name)}
            if not is_newest:
                self._become(names)
            for checkpoint in sorted(wanted(sorted(self.sealed)) & self.sealed):
                self._fetch_checkpoint(checkpoint)
            if writes and not is_newest:
                self._take_over(pointer)
            self._save_state()

    def push(self, *, early: bool) -> None:
        """Send what is new here, then remove the checkpoints that are kept no longer.

        `early` leaves out what may still grow. Raises StorageConflict where another copy has taken the run over,
        StorageError.
        """
        with self.lock:
            self._check_writer()
            self._send_files(early=early)
            for folder in sorted(self.path.glob("checkpoints/step-*")):
                if (folder / "DONE").exists() and folder.name not in self.sealed:
                    self._send_checkpoint(folder)
            names = sorted(self.sealed)
            for name in sorted(set(names) - self.keeps(names)):
                self._remove_checkpoint(name)
            self._save_state()

    def _names_there(self) -> list[str]:
        objects = list_objects(self.uri + "/")
        names = [stored.uri.removeprefix(f"{self.uri}/") for stored in objects]
        return [name for name in names if name.split("/")[0] != "writer"]

    def _become(self, names: Sequence[str]) -> None:
        """Turn the copy into what S3 holds, checkpoints apart, of which those stay that are the same there."""
        there = {name for name in names if not name.startswith("checkpoints/")}
        for name in self._files_here(early=False):
            if name not in there:
                (self.path / name).unlink()
        for folder in self.path.glob("checkpoints/step-*"):
            if folder.name not in self.sealed or not self._is_same_checkpoint(folder):
                shutil.rmtree(folder)
        pull_folder(self.uri, self.path, only=lambda name: name in there, on_note=self.on_note)
        self.seen = {name: _stamp(self.path / name) for name in there}

    def _fetch_checkpoint(self, name: str) -> None:
        """A finished checkpoint appears by a rename, so that a killed fetch leaves none that looks damaged."""
        place = self.path / "checkpoints" / name
        if place.exists():
            return
        staging = place.with_name(f".{name}.fetched")
        pull_folder(f"{self.uri}/checkpoints/{name}", staging, on_note=self.on_note)
        with disk_errors(place):
            staging.rename(place)

    def _take_over(self, pointer: Pointer | None) -> None:
        value = json.dumps({"copy": self.copy, "by": f"process {os.getpid()} on {socket.gethostname()}"})
        move_pointer(f"{self.uri}/writer", value, pointer.token if pointer else None)

    def _check_writer(self) -> None:
        pointer = read_pointer(f"{self.uri}/writer")
        if _copy_of(pointer) != self.copy:
            by = json.loads(pointer.value)["by"] if pointer else "somebody who removed its pointer"
            raise StorageConflict(
                f"{self.uri} has been taken over by {by}: this task ends here, and what it had not sent stays in "
                f"{self.path}. Let one command at a time go on with a run"
            )

    def _files_here(self, *, early: bool) -> Iterator[str]:
        """Names of the copy's files but for checkpoints and what is hidden (locks, files that are being written)."""
        for path in sorted(self.path.rglob("*")):
            name = str(path.relative_to(self.path))
            top = name.split("/")[0]
            if top == "checkpoints" or "/." in f"/{name}" or path.is_symlink() or not path.is_file():
                continue
            if not early or top in SENT_EARLY:
                yield name

    def _send_files(self, *, early: bool) -> None:
        stamps: dict[str, list[int]] = {}
        for name in self._files_here(early=early):
            with contextlib.suppress(FileNotFoundError):  # replaced or removed this instant: the next sending sees it
                stamps[name] = _stamp(self.path / name)
        new = {name for name, stamp in stamps.items() if self.seen.get(name) != stamp}
        if early and "metrics.jsonl" in new:
            new.remove("metrics.jsonl")
            self._send_snapshot("metrics.jsonl")
        if new:
            push_folder(self.path, self.uri, last=(), only=lambda name: name in new)
        self.seen |= {name: stamps[name] for name in new}

    def _send_snapshot(self, name: str) -> None:
        """A file that others append to meanwhile, as it is now."""
        snapshot = self.path / f".{name}.sent"
        with disk_errors(snapshot):
            shutil.copyfile(self.path / name, snapshot)
        upload_file(snapshot, f"{self.uri}/{name}")

    def _send_checkpoint(self, folder: Path) -> None:
        uri = f"{self.uri}/checkpoints/{folder.name}"
        try:
            done = (folder / "DONE").read_bytes()
            self._check_not_sealed(uri, done)
            files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
            left = [stored.uri for stored in list_objects(uri + "/") if stored.uri.removeprefix(f"{uri}/") not in files]
            delete_objects(left)  # of a writer that was lost before it came to DONE
            push_folder(folder, uri, last=(), only=lambda name: name != "DONE", on_note=self.on_note)
        except (FileNotFoundError, DataError):
            if (folder / "DONE").exists():
                raise
        if not (folder / "DONE").exists():  # pruned while it was sent: what came after it is whole
            delete_objects([stored.uri for stored in list_objects(uri + "/")])
            return
        try:
            write_bytes(f"{uri}/DONE", done, if_absent=True)
        except StorageConflict:
            self._check_not_sealed(uri, done)
        self.sealed.add(folder.name)

    def _check_not_sealed(self, uri: str, done: bytes) -> None:
        found = read_bytes(f"{uri}/DONE")
        if found is not None and found[0] != done:
            raise StorageConflict(
                f"{uri} was written by another process meanwhile, and is not the checkpoint in {self.path}: two "
                "commands go on with one run. Stop one of them, and resume"
            )

    def _remove_checkpoint(self, name: str) -> None:
        """DONE first, so that a half-removed folder is no checkpoint."""
        uri = f"{self.uri}/checkpoints/{name}"
        delete_objects([f"{uri}/DONE"])
        delete_objects([stored.uri for stored in list_objects(uri + "/")])
        self.sealed.discard(name)

    def _is_same_checkpoint(self, folder: Path) -> bool:
        found, own = read_bytes(f"{self.uri}/checkpoints/{folder.name}/DONE"), folder / "DONE"
        return found is not None and own.is_file() and own.read_bytes() == found[0]

    def _load_state(self) -> None:
        path = self.path / STATE
        state: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.copy = state.get("copy") or uuid.uuid4().hex
        self.seen = state.get("files", {})
        self._save_state()

    def _save_state(self) -> None:
        write_json(self.path / STATE, {"copy": self.copy, "files": self.seen})


def _copy_of(pointer: Pointer | None) -> str:
    return str(json.loads(pointer.value)["copy"]) if pointer else ""


def _is_done(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 3 and parts[0] == "checkpoints" and parts[2] == "DONE"


def _stamp(path: Path) -> list[int]:
    """Size, and nanoseconds of the last change, which a file that takes another's place has of its own."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
