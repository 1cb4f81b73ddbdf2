"""A look at a folder's tokenizer.json before tokenizers reads it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignment.foreign_json import parse_json

MOST_TOKENS = 1 << 24
"""More than any vocabulary has. tokenizers keeps a list of the ids up to the largest that have no token: of a file that
names 4294967295, 16 GB."""


def check_tokenizer(source: str | Path) -> None:
    """Raise ValueError where tokenizer.json in a model's folder is none, or numbers its tokens beyond MOST_TOKENS."""
    path = Path(source) / "tokenizer.json"
    if not path.is_file():  # of a hub's model, or of a kind of tokenizer that has another file
        return
    numbers = (number for number in _ids(parse_json(path.read_bytes())) if isinstance(number, int | float))
    largest = max(numbers, default=0)
    if not largest <= MOST_TOKENS:
        raise ValueError(f"its tokenizer.json has the token id {largest:g}, and no vocabulary is that large")


def _ids(values: Any) -> Iterator[Any]:
    values = values if isinstance(values, dict) else {}
    model, added = values.get("model"), values.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    yield from vocabulary.values() if isinstance(vocabulary, dict) else ()
    yield from (token.get("id") for token in added if isinstance(token, dict)) if isinstance(added, list) else ()
