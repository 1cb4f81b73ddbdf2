"""What is told of a run beside its files: a stream of items that writers (W&B, TensorBoard) draw as they can.

Each item bears a mark, its name within the run, so that a writer that several processes open one after the other takes
it once.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from alignment.tracked_metrics import Points


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values lie between each two neighbours of `edges`, which are one more than `counts`."""

    counts: tuple[int, ...]
    edges: tuple[float, ...]
    total: float
    squares: float
    """Sum of the values, and of their squares."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of plain values."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Record:
    """What a record of metrics.jsonl, of kind "step" or "validation", has to be drawn at RS step `step`."""

    kind: str
    step: int
    points: Points
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)

    @property
    def mark(self) -> str:
        """Names it within the run."""
        return f"{self.kind} {self.step}"


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that a person should know at once."""

    mark: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Summary:
    """The run's result, by names like `evaluation/win_rate`. A later one replaces it."""

    values: Mapping[str, Any]
    mark: str = ""
    """None: it may be told again."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a model: its URI, sha256 (hex) and bytes; None where they are not known."""

    uri: str
    sha256: str
    bytes: int | None


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model where it lies: nothing of it is uploaded. `is_input` says that the run used it and did not make it."""

    name: str
    kind: str
    files: Mapping[str, StoredFile]
    details: Mapping[str, Any]
    aliases: tuple[str, ...] = ()
    is_input: bool = False

    @property
    def mark(self) -> str:
        """Names it within the run: other files, or another alias, are told anew."""
        content = hashlib.sha256(" ".join(file.sha256 for file in self.files.values()).encode()).hexdigest()
        return " ".join(("model", self.name, content[:16], *self.aliases))


Item = Record | Alert | Summary | StoredModel


class Writer(Protocol):
    """Draws items; raises whatever it meets, which ends it (see `alignment.tracking`)."""

    name: str

    def has(self, item: Item) -> bool:
        """Whether the item was written, by whatever process of the run. Asked once of each, in the run's order."""

    def write(self, item: Item) -> None:
        """Draw the item, or pass over what it has no form for."""

    def close(self, *, failed: bool) -> None:
        """Write what is left."""
