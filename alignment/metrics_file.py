"""metrics.jsonl as a file that killed writers leave: one record a line, the last of which may be unfinished."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from alignment.errors import DataError
from alignment.foreign_json import parse_json


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One writer of metrics.jsonl at a time: workers and the flow append to it, and a rewrite replaces the file."""
    with open(path.with_name(".metrics.lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def end_of_records(data: bytes) -> int:
    """Where the last whole record of `data` ends: a last line without a newline counts if it is a JSON object.

    No proper prefix of an object is one, so an object that lacks only its newline is whole.
    """
    end = data.rfind(b"\n") + 1
    try:
        return len(data) if isinstance(parse_json(data[end:]), dict) else end
    except ValueError:
        return end


def mend(file: IO[bytes]) -> None:
    """Makes a file that is open for appending end with a whole line."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if not size or file.read(1) == b"\n":
        return
    file.seek(0)
    data = file.read()
    end = end_of_records(data)
    file.truncate(end)
    if end and not data[:end].endswith(b"\n"):
        file.write(b"\n")


def parse_record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """The record in a line of the file `path`. Raises DataError, naming both."""
    try:
        record = parse_json(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: not JSON ({error}): remove the line, then resume the run") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}:{number}: a record is a JSON object, got {line[:60]!r}: remove the line")
    if record.get("kind") in ("step", "validation") and type(record.get("step")) is not int:
        raise DataError(f"{path}:{number}: the record of a {record['kind']} has no step: remove the line")
    return record
