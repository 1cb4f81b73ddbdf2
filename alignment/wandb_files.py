"""The .wandb file of a W&B run as its own process wrote it: what a killed one has left of its history.

A LevelDB log behind a header of 7 bytes: blocks of 32 KiB, in which a record is cut into chunks (crc32 of type and
content, length, type; 1 is whole, 2 first, 3 middle, 4 last). No chunk crosses the end of a block.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK, CHUNK = 7, 32768, 7


def records(path: Path) -> Iterator[Any]:
    """Its protobuf records, up to the first that is not whole, which is where a killed process stopped."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    position, record = HEADER, b""
    while position + CHUNK <= len(data):
        left = BLOCK - position % BLOCK
        checksum, length, kind = struct.unpack_from("<IHB", data, position) if left >= CHUNK else (0, 0, 0)
        if kind == 0:  # padding
            position += left
            continue
        chunk = data[position + CHUNK : position + CHUNK + length]
        if len(chunk) < length or checksum != zlib.crc32(bytes([kind]) + chunk):
            return
        position, record = position + CHUNK + length, record + chunk
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)  # type: ignore[attr-defined]
            record = b""


def history(path: Path) -> list[dict[str, Any]]:
    """The rows that were logged."""
    rows = (record.history.item for record in records(path) if record.WhichOneof("record_type") == "history")
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items} for items in rows]
