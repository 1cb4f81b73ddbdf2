"""JSON that somebody else may have written: read as data of a sane shape, or refused.

Python's parser takes whatever nests less deeply than its own stack allows, and then the next one who walks the value
(repr, a copy, a validator) runs out of stack.
"""

import json
from pathlib import Path
from typing import Any

from alignment.errors import AlignmentError

DEEPEST = 100
"""Most levels of lists and objects; what this program reads or writes has fewer than ten."""


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError for anything else, and for what nests too deeply."""
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"it nests more than {DEEPEST} levels deep") from error
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
        raise ValueError(f"it nests more than {DEEPEST} levels deep")
    # An escaped half of a surrogate pair is valid JSON, but no text: tokenizers, Parquet and file names fail on it.
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def parse_object(data: bytes | str) -> dict[str, Any]:
    """The object of a JSON text. Raises ValueError."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def read_object(path: Path, error: type[AlignmentError], remedy: str) -> dict[str, Any]:
    """The object in a file. Raises `error`, naming the file, the reason and the remedy."""
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as reason:
        raise error(f"{path} cannot be read: {reason}; {remedy}") from reason


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True
