"""Which items a writer has taken, over all processes of a run: a line each in a file beside what it wrote.

    begun offline-run-20261127_081946-r1
    step 1
    validation 1
    ended

A process that is killed loses what its writer had not yet put on the disk: the marks of a part that has begun and not
ended are doubtful until somebody has looked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BEGUN, ENDED = "begun ", "ended"


@dataclass(frozen=True, slots=True)
class Part:
    """What one process marked. `name` is "" for marks of a writer that has no parts."""

    name: str
    marks: tuple[str, ...]
    has_ended: bool


class Marks:
    """The file of marks, read once and appended to. `lost` says which of a part's marks stand for nothing."""

    def __init__(self, path: Path, lost: Callable[[Part], set[str]] = lambda _: set()) -> None:
        self.path = path
        self.parts = _parts(path)
        self._known = {mark for part in self.parts for mark in {*part.marks} - lost(part)}

    def __contains__(self, mark: str) -> bool:
        return mark in self._known

    def add(self, mark: str) -> None:
        """An item was taken."""
        self._known.add(mark)
        self._append(mark)

    def begin(self, name: str) -> None:
        """What follows is of a part of this name."""
        self._append(f"{BEGUN}{name}")

    def end(self) -> None:
        """The part is whole on the disk, or at the server."""
        self._append(ENDED)

    def _append(self, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(f"{line}\n")


def _parts(path: Path) -> list[Part]:
    if not path.exists():
        return []
    parts: list[Part] = []
    name, marks = "", list[str]()
    for line in [*filter(None, path.read_text().splitlines()), BEGUN]:
        if line.startswith(BEGUN):
            if marks or name:
                parts.append(Part(name, tuple(m for m in marks if m != ENDED), ENDED in marks or not name))
            name, marks = line.removeprefix(BEGUN), []
        else:
            marks.append(line)
    return parts
