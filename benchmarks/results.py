"""Ratios of the benchmarks, higher always better: their arithmetic, their file, and the table of all of them.

    python -m benchmarks.results        print what benchmarks/results/latest.json holds

A run of a benchmark replaces its own entries in that file and keeps the others. No timing fails a command.
"""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from alignment.atomic_files import write_json
from alignment.errors import AlignmentError, DataError
from alignment.progress import ProgressLines

LATEST = Path(__file__).resolve().parent / "results" / "latest.json"


@dataclass(frozen=True, slots=True)
class Result:
    """One comparison. `low` and `high` are the smallest and the largest ratio of its rounds, `ratio` the median."""

    name: str
    ratio: float
    low: float
    high: float
    target: float
    against: str
    """What ours is compared with, and what the reader should know about how."""
    command: str
    """Runs the comparison again."""

    @property
    def reached(self) -> bool:
        return self.ratio >= self.target


def result(name: str, ratios: Sequence[float], *, target: float, against: str, command: str) -> Result:
    """The result of one ratio per round. Raises ValueError without rounds."""
    if not ratios:
        raise ValueError(f"{name}: a ratio needs at least one round")
    return Result(name, statistics.median(ratios), min(ratios), max(ratios), target, against, command)


def speedups(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times faster ours was, round by round, from seconds for the same work. Raises ValueError."""
    return [t / o for t, o in zip(theirs, ours, strict=True)]


def read_results(path: Path = LATEST) -> list[Result]:
    """What the file holds; nothing where there is none yet. Raises DataError."""
    if not path.exists():
        return []
    try:
        return [_parsed(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a list of results ({error}): delete it and run the benchmarks again") from error


def record(results: Sequence[Result], path: Path = LATEST) -> None:
    """Put results in the file: each takes the place of the one of its name. Raises DataError, DiskError."""
    kept = {one.name: one for one in read_results(path)} | {one.name: one for one in results}
    write_json(path, [asdict(one) for one in kept.values()])


def table(results: Sequence[Result]) -> str:
    """The results for people, one line each."""
    width = max((len(one.name) for one in results), default=4)
    lines = [f"{'name':{width}}  {'ratio':>6}  {'lowest - highest':>16}  {'target':>6}  reached"]
    for one in results:
        spread = f"{one.low:.3f} - {one.high:.3f}"
        reached = "yes" if one.reached else "NO"
        lines.append(f"{one.name:{width}}  {one.ratio:6.3f}  {spread:>16}  {one.target:6.2f}  {reached}")
        lines.append(f"{'':{width}}  against {one.against}")
    return "\n".join(lines)


def shown(make: Callable[[], Sequence[Result]]) -> int:
    """What a benchmark's command ends with: its results as a table; 1 and the reason where they could not be made.

    0 whatever the ratios are.
    """
    try:
        results = make()
    except AlignmentError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(results))
    return 0


def noted() -> Callable[[str], None]:
    """A line of progress at a time, on standard error."""
    lines = ProgressLines(total_steps=1)
    return lambda text: lines.update({"kind": "note", "text": text})


def _parsed(entry: Any) -> Result:
    """One entry of the file. Raises ValueError, TypeError."""
    if not isinstance(entry, dict) or set(entry) != {field.name for field in fields(Result)}:
        raise ValueError(f"entry {str(entry)[:80]!r}")
    return Result(**entry)


def main() -> int:
    """Print the table of the file; 2 where it cannot be read."""
    try:
        results = read_results()
    except AlignmentError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(results) if results else f"{LATEST} holds no results yet: run `make bench`")
    return 0


if __name__ == "__main__":
    sys.exit(main())
