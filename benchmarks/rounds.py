"""Ways of doing the same work, timed in turn: A B A B …, so that a machine that slows down slows all of them.

Each way is called once before the clock runs, to warm up and to show that it does the same work: a comparison
of different work is an error, not a ratio.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from alignment.errors import AlignmentError
from alignment.progress import duration

TOLERANCE = 1e-4
"""Largest difference between two ways' numbers for the same work: rewards of a text, losses of a step."""

Way = Callable[[], list[float]]
"""Does the whole workload and returns the numbers that it comes to (rewards, losses), in order."""
Note = Callable[[str], None]


class DifferentWorkError(AlignmentError):
    """Two ways came to different numbers."""


def interleaved(
    ways: Mapping[str, Way],
    rounds: int,
    on_note: Note,
    *,
    title: str,
    clock: Callable[[], float] = time.perf_counter,
    tolerance: float = TOLERANCE,
) -> dict[str, list[float]]:
    """Seconds of each way, one number per round; the ways take turns within a round.

    Raises DifferentWorkError where a way's numbers differ from the first way's by more than `tolerance`.
    """
    on_note(f"{title}: warm-up of {len(ways)} ways, {rounds} rounds follow")
    check_same_work({name: way() for name, way in ways.items()}, tolerance)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for done in range(1, rounds + 1):
        for name, way in ways.items():
            begun = clock()
            way()
            seconds[name].append(clock() - begun)
        took = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
        left = sum(map(sum, seconds.values())) / done * (rounds - done)
        on_note(f"{title}: round {done}/{rounds} | {took}" + (f" | {duration(left)} left" if done < rounds else ""))
    return seconds


def check_same_work(numbers: Mapping[str, Sequence[float]], tolerance: float = TOLERANCE) -> None:
    """Raise DifferentWorkError unless all ways came to the same numbers, as near as `tolerance`."""
    (first, expected), *others = numbers.items()
    for name, got in others:
        if len(got) != len(expected):
            raise DifferentWorkError(f"{name} came to {len(got)} numbers, {first} to {len(expected)}")
        for index, (a, b) in enumerate(zip(expected, got, strict=True)):
            # Not `abs(a - b) > tolerance`, which a NaN would pass.
            if not abs(a - b) <= tolerance:
                raise DifferentWorkError(f"number {index}: {first} came to {a}, {name} to {b}")
