"""A local cache of folders that were fetched from S3, with a limit on its size.

    $RS_CACHE or ~/.cache/rejection-sampling
      folders/<key>/entry.json   what it is and how much room it takes, written before anything is fetched
      folders/<key>/partial/     while it is fetched; a killed download goes on from here
      folders/<key>/content/     whole
      locks/<key>.lock           shared by whoever uses the folder, exclusive to fetch or remove it
      locks/room.lock            exclusive to make room

The key is of the name and the digest, so another version has another place. What was not used for longest goes first,
what is in use never. Locks end with their process, whatever ends it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from alignment.atomic_files import disk_errors, sync_folder, write_json
from alignment.errors import ConfigError, StorageError
from alignment.s3 import parse_uri
from alignment.s3_folders import pull_folder
from alignment.s3_objects import list_objects


@dataclass(frozen=True)
class _Entry:
    """One folder of the cache; `used` is when, in ns of Unix time."""

    key: str
    bytes: int
    used: int


def cache_root() -> Path:
    """Where the cache is: $RS_CACHE or ~/.cache/rejection-sampling."""
    named = os.environ.get("RS_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "rejection-sampling"


def _node_limit() -> int | None:
    """RS_CACHE_LIMIT_GB in bytes, None where it is not set. Raises ConfigError."""
    text = os.environ.get("RS_CACHE_LIMIT_GB")
    if not text:
        return None
    if not re.fullmatch(r"\d+(\.\d+)?", text) or not float(text):
        raise ConfigError(f"RS_CACHE_LIMIT_GB ({text}) must be a number above 0, of gigabytes")
    return round(float(text) * 1e9)


def _key(uri: str, sha256: str) -> str:
    return hashlib.sha256(f"{parse_uri(uri).uri} {sha256}".encode()).hexdigest()[:24]


@contextlib.contextmanager
def cached_folder(
    uri: str, sha256: str, limit_bytes: int, *, on_note: Callable[[str], None] | None = None
) -> Iterator[Path]:
    """A local copy of the folder below `uri`, fetched unless it is there; it stays while the body runs.

    `sha256` names the version (a manifest's or the weights' digest): a folder that is there under it is not asked
    about again. Each file is verified as it is fetched (`alignment.s3_download`). The copy is for reading alone.
    RS_CACHE_LIMIT_GB, where it is set, is this node's limit instead of `limit_bytes`.
    Raises StorageError, where it would not fit in the limit too, ConfigError and DiskError.
    """
    root, key, limit_bytes = cache_root(), _key(uri, sha256), _node_limit() or limit_bytes
    content = root / "folders" / key / "content"
    with disk_errors(root):
        (root / "locks").mkdir(parents=True, exist_ok=True)
    with open(root / "locks" / f"{key}.lock", "ab") as lock:
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if content.is_dir():
                break
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not content.is_dir():
                _fetch(root, key, uri, sha256, limit_bytes, on_note)
            # An exclusive lock becomes a shared one with a gap in between, in which the folder may go: look again.
        now = time.time_ns()  # the kernel's own stamps are some milliseconds coarse, so that uses in a row would tie
        os.utime(content.parent / "entry.json", ns=(now, now))
        yield content


def forget_folder(uri: str, sha256: str) -> None:
    """Remove a copy that was found damaged, so that it is fetched anew; one that others use stays."""
    root, key = cache_root(), _key(uri, sha256)
    _removed(root, _Entry(key, 0, 0))


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in the cache for what is made here and sent; what killed processes left of theirs goes first."""
    exports = cache_root() / "exports"
    with disk_errors(exports), contextlib.ExitStack() as stack:
        exports.mkdir(parents=True, exist_ok=True)
        place = exports / uuid.uuid4().hex
        with _locked(exports / "sweep"):
            for path in exports.glob("*.lock"):
                _sweep_scratch(path)
            stack.enter_context(_locked(place.with_suffix(".lock")))
            place.mkdir()
        stack.callback(_remove_scratch, place)
        held = stack.pop_all()
    with held:
        yield place


def _sweep_scratch(path: Path) -> None:
    with open(path, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        _remove_scratch(path.with_suffix(""))


def _remove_scratch(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.with_suffix(".lock").unlink(missing_ok=True)


def _fetch(
    root: Path, key: str, uri: str, sha256: str, limit_bytes: int, on_note: Callable[[str], None] | None
) -> None:
    """Fetch a folder into its place. The caller holds its lock."""
    size = sum(entry.size for entry in list_objects(uri))
    folder = root / "folders" / key
    with _locked(root / "locks" / "room.lock"):
        _make_room(root, key, uri, size, limit_bytes)
        write_json(folder / "entry.json", {"uri": uri, "sha256": sha256, "bytes": size})
    pull_folder(uri, folder / "partial", on_note=on_note)
    with disk_errors(folder):
        (folder / "partial").rename(folder / "content")
        sync_folder(folder)


def _make_room(root: Path, key: str, uri: str, size: int, limit_bytes: int) -> None:
    """Remove folders that nobody uses, longest unused first, until `size` bytes fit. Raises StorageError."""
    entries = [entry for entry in _entries(root) if entry.key != key]
    taken = sum(entry.bytes for entry in entries)
    for entry in sorted(entries, key=lambda entry: entry.used):
        if taken + size <= limit_bytes:
            break
        if size <= limit_bytes and _removed(root, entry):
            taken -= entry.bytes
    if taken + size > limit_bytes:
        raise StorageError(
            f"{uri}: takes {size / 1e6:.0f} MB and does not fit in the cache {root}, whose limit is "
            f"{limit_bytes / 1e6:.0f} MB and where {taken / 1e6:.0f} MB cannot go now; raise the limit "
            "(run.cache_limit_gb or RS_CACHE_LIMIT_GB), or set RS_CACHE"
        )


def _removed(root: Path, entry: _Entry) -> bool:
    """Whether a folder could be removed: not while anybody holds its lock."""
    with open(root / "locks" / f"{entry.key}.lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        folder = root / "folders" / entry.key
        with disk_errors(folder):
            if (folder / "content").is_dir():  # first out of its place, so that a kill leaves no half of it there
                (folder / "content").rename(folder / "partial")
            shutil.rmtree(folder / "partial", ignore_errors=True)
            shutil.rmtree(folder)  # entry.json last: while anything of it is here, its room counts
        return True


def _entries(root: Path) -> list[_Entry]:
    found = []
    for path in (root / "folders").glob("*/entry.json"):
        with contextlib.suppress(FileNotFoundError):  # removed by another process just now
            size = json.loads(path.read_text())["bytes"]
            found.append(_Entry(path.parent.name, size, path.stat().st_mtime_ns))
    return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    with open(path, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
