"""Files from S3: ranges in parallel, going on where a killed download stopped, verified by sha256.

What has arrived is in `.NAME.partial` beside the place: the object's bytes, and behind them a journal, one line with
the object's ETag and one with the number of each range that is whole. A finished file is cut to its size, verified and
renamed. A lock on the partial file lets a second process wait for the first instead of writing into the same one.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from alignment.atomic_files import disk_errors, sync_folder
from alignment.errors import StorageConflict, StorageError
from alignment.s3 import object_location
from alignment.s3_connection import ATTEMPTS, answered, pause_after, s3_client
from alignment.s3_errors import explained, is_broken_connection
from alignment.s3_objects import StoredObject, require_bucket, stat_object
from alignment.s3_threads import in_parallel, serialised

RANGE_BYTES = 8 << 20
"""Size of a range, of all but the last."""
WRITE_BYTES = 1 << 20
"""What a thread reads or writes at a time."""
JOURNAL_BYTES = 16 << 20
"""More than any journal has: what lies behind the end may be the rest of another, larger object."""


class _Damaged(Exception):
    """What was written is not the object: its sha256 differs, or the object was replaced meanwhile."""


def download_file(
    uri: str, path: Path, *, sha256: str | None = None, on_bytes: Callable[[int], None] | None = None
) -> None:
    """Fetch an object into a file, which is replaced whole or not at all; one that holds it already is left.

    What is written must have the object's size, and the sha256 that is given and that the object's metadata states: a
    mismatch is fetched once more from scratch, then StorageError. An object written by other tools may state none, and
    then with none given only its size is compared. `on_bytes` is told the bytes of each range that is done. Raises
    StorageError and DiskError.
    """
    report = serialised(on_bytes)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked_partial(path) as (partial, file):
            for last_try in (False, True):
                stored = _expected(uri, sha256)
                if holds(path, stored):
                    partial.unlink()
                    report(stored.size)
                    return
                try:
                    _fetch(stored, file, report)
                    _verify(stored, file)
                except _Damaged as damage:
                    file.truncate(0)
                    if last_try:
                        raise StorageError(
                            f"{uri}: {damage}, twice; it was damaged or is being written: upload it again"
                        ) from None
                    continue
                os.fsync(file.fileno())
                file.truncate(stored.size)
                partial.replace(path)
                sync_folder(path.parent)
                return


def holds(path: Path, stored: StoredObject) -> bool:
    """Whether a file is there and has an object's size and sha256; never where the sha256 is not known."""
    if stored.sha256 is None or not path.is_file() or path.stat().st_size != stored.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == stored.sha256


def partial_path(path: Path) -> Path:
    """Where the beginnings of a download of `path` are kept."""
    return path.with_name(f".{path.name}.partial")


def _expected(uri: str, sha256: str | None) -> StoredObject:
    """The object as it must arrive. Raises StorageError where there is none, or not the one that is asked for."""
    stored = stat_object(uri)
    if stored is None:
        require_bucket(uri)
        raise StorageError(f"{uri}: there is no such object; check the name")
    if sha256 is not None and stored.sha256 not in (None, sha256):
        raise StorageError(f"{uri}: has sha256 {stored.sha256}, not {sha256}: it was replaced; name the new one")
    return StoredObject(uri, stored.size, sha256 or stored.sha256, stored.etag)


def _fetch(stored: StoredObject, file: BinaryIO, report: Callable[[int], None]) -> None:
    """Fetch the ranges that the partial file lacks. Raises _Damaged and StorageError."""
    done = _begin(stored, file)
    starts = {number: number * RANGE_BYTES for number in range(-(-stored.size // RANGE_BYTES))}
    sizes = {number: min(RANGE_BYTES, stored.size - start) for number, start in starts.items()}
    for number in sorted(done & starts.keys()):
        report(sizes[number])
    journal = serialised(lambda number: _append(file, f"{number}\n"))

    def fetch(number: int) -> None:
        _fetch_range(stored, file, starts[number], sizes[number])
        journal(number)
        report(sizes[number])

    in_parallel(fetch, [number for number in starts if number not in done])


def _begin(stored: StoredObject, file: BinaryIO) -> set[int]:
    """The ranges that an earlier download of this very object left; a partial file of anything else is emptied."""
    head = f"{stored.etag} {stored.size} {RANGE_BYTES}"
    file.seek(stored.size)
    lines = file.read(JOURNAL_BYTES).split(b"\n")[:-1]  # a line that a kill cut off has no end
    if lines and lines[0] == head.encode() and all(line.isdigit() for line in lines[1:]):
        return {int(line) for line in lines[1:]}
    file.truncate(0)
    file.truncate(stored.size)
    _append(file, f"{head}\n")
    return set()


def _append(file: BinaryIO, line: str) -> None:
    os.pwrite(file.fileno(), line.encode(), os.fstat(file.fileno()).st_size)


def _fetch_range(stored: StoredObject, file: BinaryIO, start: int, size: int) -> None:
    """Write bytes `start` to `start + size` of the object; a stream that breaks goes on from where it broke."""
    from botocore.exceptions import BotoCoreError

    at, failures = start, 0
    with explained(stored.uri):
        while at < start + size:
            begun_at = at
            try:
                for chunk in _stream(stored, at, start + size):
                    os.pwrite(file.fileno(), chunk, at)
                    at += len(chunk)
            except BotoCoreError as error:
                failures = 1 if at > begun_at else failures + 1
                if failures == ATTEMPTS or not is_broken_connection(error):
                    raise
                pause_after(failures)


def _stream(stored: StoredObject, start: int, end: int) -> Iterator[bytes]:
    """Bytes `start` to `end` of the object in chunks. Raises _Damaged where it is no longer that object."""
    from botocore.exceptions import ResponseStreamingError

    location = object_location(stored.uri)
    try:
        with explained(stored.uri):
            answer = _get(location.bucket, location.key, stored.etag, f"bytes={start}-{end - 1}")
    except StorageConflict:
        raise _Damaged("it was replaced while it was fetched") from None
    with contextlib.closing(answer["Body"]) as body:
        if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
            raise StorageError(f"{stored.uri}: the server does not answer range requests; use another")
        if answer["ContentLength"] != end - start:
            raise ResponseStreamingError(error=f"{answer['ContentLength']} bytes of {end - start} announced")
        yield from body.iter_chunks(WRITE_BYTES)


def _get(bucket: str, key: str, etag: str, span: str) -> Any:
    return answered(s3_client().get_object, "ContentLength", Bucket=bucket, Key=key, IfMatch=etag, Range=span)


def _verify(stored: StoredObject, file: BinaryIO) -> None:
    """Raises _Damaged where the object's bytes in the file do not have its sha256."""
    if stored.sha256 is None:
        return
    found = hashlib.sha256()
    file.seek(0)
    for chunk in read_exactly(file, stored.size):
        found.update(chunk)
    if found.hexdigest() != stored.sha256:
        raise _Damaged(f"what arrived has sha256 {found.hexdigest()}, not {stored.sha256}")


def read_exactly(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes of a file in chunks. Raises EOFError if there are fewer."""
    while size > 0:
        chunk = file.read(min(WRITE_BYTES, size))
        if not chunk:
            raise EOFError("it became shorter while it was read")
        size -= len(chunk)
        yield chunk


@contextlib.contextmanager
def _locked_partial(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """The partial file of `path`, open and locked; waits while another process fetches the same file."""
    partial = partial_path(path)
    while True:
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The one before may have renamed or removed it while this one waited.
            if partial.exists() and os.path.samestat(partial.stat(), os.fstat(file.fileno())):
                yield partial, file
                return
