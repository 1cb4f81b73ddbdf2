"""Pointers in S3, such as `runs/latest`: one small object that says which of several things counts.

A pointer moves only from where its mover saw it: `If-Match` with the ETag that was read, `If-None-Match: *` where there
was none. AWS, moto and Ceph (from 16 on, seen) keep both conditions, and of several movers at once exactly one wins.
Each move writes a number drawn at random beside the value. So an ETag never comes back when a value does, and a mover
whose answer got lost recognises what it wrote.
"""

import json
import uuid
from dataclasses import dataclass

from alignment.errors import StorageConflict, StorageError
from alignment.s3_objects import read_bytes, write_bytes


@dataclass(frozen=True)
class Pointer:
    """What a pointer says, and the token that moving it on from there takes."""

    value: str
    token: str


def read_pointer(uri: str) -> Pointer | None:
    """The pointer as it is now, None where there is none. Raises StorageError."""
    found = read_bytes(uri)
    if found is None:
        return None
    data, token = found
    try:
        value = json.loads(data)["value"]
    except (ValueError, TypeError, KeyError):
        value = None
    if not isinstance(value, str):
        raise StorageError(f"{uri}: is no pointer of this program's; delete it, or name another place")
    return Pointer(value, token)


def move_pointer(uri: str, value: str, token: str | None) -> Pointer:
    """Let a pointer say `value`, if it is still as `read_pointer` found it; None for one that was not there.

    Raises StorageConflict where somebody else moved it: read it again and decide anew. Raises StorageError.
    """
    data = json.dumps({"value": value, "move": uuid.uuid4().hex}).encode()
    try:
        written = write_bytes(uri, data, if_absent=token is None, if_match=token)
    except StorageConflict as conflict:
        raise StorageConflict(f"{uri}: somebody else moved this pointer; read it again and decide anew") from conflict
    return Pointer(value, written)
