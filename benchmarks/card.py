"""The card that a benchmark runs on: its rates, its clock, its memory, and the least time that rollouts take on it.

On a CPU the same functions measure that, apart from its memory.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.rollout_limit import operations

ROUNDS, REPEATS = 5, 10
"""Of each rate: the fastest round of so many repeats counts, since everything slower is somebody else's doing."""


@dataclass(frozen=True, slots=True)
class Card:
    """`bandwidth` in bytes a second, read and written, of a copy; `rate` in operations a second of a square product."""

    device: str
    dtype: str
    bandwidth: float
    rate: float

    def clock(self) -> float:
        """Seconds, once everything that was asked of the card is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measured_card(device: str, dtype: str, *, copied: int, side: int) -> Card:
    """The rates of a copy of `copied` bytes and of a product of two matrices of `side` rows and columns."""
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    card = Card(device, dtype, 0.0, 0.0)
    bandwidth = 2 * copied / _fastest(card, lambda: target.copy_(source))
    rate = 2 * side**3 / _fastest(card, lambda: torch.matmul(left, right))
    return Card(device, dtype, bandwidth, rate)


def _fastest(card: Card, work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        begun = card.clock()
        for _ in range(REPEATS):
            work()
        seconds.append((card.clock() - begun) / REPEATS)
    return min(seconds)


def least_rollout_seconds(card: Card, model: Any, lengths: Sequence[int], *, samples: int, tokens: int) -> float:
    """The least time for `samples` responses of `tokens` tokens to each prompt, all side by side, on this card.

    The larger of two: the bytes over its bandwidth (the weights once for the prompts and once a step, each prompt's
    keys and values once a step, each row's own), and the operations over the rate of its products.
    """
    config, size = model.config, torch.finfo(getattr(torch, card.dtype)).bits // 8
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * size  # bytes of a token
    looked_up = model.get_input_embeddings().weight
    weights = sum(p.numel() * size for p in model.parameters() if p is not looked_up or config.tie_word_embeddings)
    rows, read, steps = len(lengths) * samples, sum(lengths), tokens - 1
    own = rows * sum(range(1, tokens))
    moved = weights * (1 + steps) + cached * (read * steps + own)
    return max(moved / card.bandwidth, operations(model, lengths, samples=samples, tokens=tokens) / card.rate)


def held_bytes(card: Card) -> float:
    """Bytes of the card's memory that tensors take now; NaN on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated() if card.device == "cuda" else math.nan


def most_bytes(card: Card, work: Callable[[], Any]) -> float:
    """The most that tensors took at once while `work` ran; NaN on a CPU."""
    if card.device != "cuda":
        return math.nan
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def kernels(card: Card, work: Callable[[], Any]) -> dict[str, float]:
    """How many kernels (operators on a CPU) a call launches, and the share of its seconds in which one runs."""
    from torch.profiler import ProfilerActivity, profile

    on_card = card.device == "cuda"
    activity = ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        begun = card.clock()
        work()
        took = card.clock() - begun
    events = [(e.count, e.self_device_time_total if on_card else e.self_cpu_time_total) for e in seen.key_averages()]
    ran = [(count, micros) for count, micros in events if micros > 0]  # calls of CUDA's runtime take no time there
    return {
        "kernels": sum(count for count, _ in ran),
        "busy": sum(micros for _, micros in ran) / 1e6 / took,
        "seconds": took,
    }


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """The median of one ratio per round, and the smallest and the largest."""
    found = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"ratio": statistics.median(found), "low": min(found), "high": max(found)}
