"""The order in which a training reads its examples, from one source or from several with weights.

A function of (sizes, weights, seed, epoch) alone, so that a resume needs no reader's state. An epoch is as many
examples as all sources hold together; of these each source gives its weight's share, the same number every epoch,
going on through permutations of its own: a small source is read several times in an epoch, a large one over several.
One source alone, or weights in proportion to the sizes, read every example once an epoch.
"""

import functools
import hashlib
from collections.abc import Sequence

from alignment.errors import ConfigError


def per_epoch(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Examples that each source gives to an epoch; they sum to the sum of `sizes` (largest remainders).

    Raises ConfigError where a source would give none.
    """
    total, whole = sum(sizes), sum(weights)
    exact = [total * weight / whole for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        weight = weights[counts.index(0)]
        raise ConfigError(
            f"sft.train gives a source the weight {weight:g} of {whole:g}, which is less than one of the {total} "
            "examples of an epoch: raise the weight, or leave the source out"
        )
    return counts


@functools.lru_cache(maxsize=1)
def epoch_order(
    sizes: tuple[int, ...], weights: tuple[float, ...], *, seed: int, epoch: int
) -> tuple[tuple[int, int], ...]:
    """(source, index) of each example of an epoch (from 0), in the order they are read."""
    drawn: list[tuple[int, int]] = []
    for source, (size, count) in enumerate(zip(sizes, per_epoch(sizes, weights), strict=True)):
        position = epoch * count
        while position < (epoch + 1) * count:
            lap, first = divmod(position, size)
            permutation = _permutation(size, f"{seed}/source-{source}/lap-{lap}")
            taken = permutation[first : first + (epoch + 1) * count - position]
            drawn += [(source, index) for index in taken]
            position += len(taken)
    return tuple(drawn[i] for i in _permutation(len(drawn), f"{seed}/epoch-{epoch}"))


def _permutation(size: int, stream: str) -> list[int]:
    import torch

    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(stream.encode()).digest()[:7], "big"))
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order
