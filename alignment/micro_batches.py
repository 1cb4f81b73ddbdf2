"""How an optimizer step's examples are dealt to ranks and their micro-batches.

All ranks must run forward and backward equally often, so a rank that runs short takes micro-batches of zero weight.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from alignment.engine import Ranks
from alignment.types import TokenSequence

Item = TypeVar("Item")


def sequence_micro_batches(
    batch: Sequence[TokenSequence], size: int, ranks: Ranks, passes: int, *, packed: bool
) -> list[tuple[Sequence[TokenSequence], float]]:
    """This rank's part as `passes` micro-batches of at most `size` sequences, with weight 1, or 0 for a filler.

    Sequences that are packed are spread so that all micro-batches take equally long, others lie with their like.
    """
    if packed:
        dealt = balanced(batch, size, passes * ranks.world_size)[ranks.rank :: ranks.world_size]
    else:
        dealt = deal(batch, size, ranks, passes, _length)
    shortest = [min(batch, key=_length)]
    return [(rows or shortest, 1.0 if rows else 0.0) for rows in dealt]


def deal(
    batch: Sequence[Item], size: int, ranks: Ranks, passes: int, length: Callable[[Item], int]
) -> list[Sequence[Item]]:
    """This rank's micro-batches: rows of like length together, dealt in turn; empty ones fill up to `passes`."""
    by_length = sorted(batch, key=length, reverse=True)
    micro_batches = [by_length[i : i + size] for i in range(0, len(by_length), size)]
    mine = micro_batches[ranks.rank :: ranks.world_size]
    return [*mine, *([[]] * (passes - len(mine)))]


def balanced(batch: Sequence[TokenSequence], size: int, count: int) -> list[Sequence[TokenSequence]]:
    """The batch in `count` groups of at most `size` each, of about as many tokens: packed, they take equally long."""
    groups: list[list[TokenSequence]] = [[] for _ in range(count)]
    tokens = [0] * count
    for sequence in sorted(batch, key=_length, reverse=True):
        smallest = min((i for i in range(count) if len(groups[i]) < size), key=tokens.__getitem__)
        groups[smallest].append(sequence)
        tokens[smallest] += len(sequence.ids)
    return list(groups)


def _length(sequence: TokenSequence) -> int:
    return len(sequence.ids)
