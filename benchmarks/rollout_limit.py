"""What generating would take if it were matrix products alone, at the rate that this machine does them."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PREFILL_ROWS = 512
"""Rows of a matrix product in prefill, where more make it no faster."""
SECONDS_PER_SHAPE = 0.25
STREAMED_BYTES = 400e6
"""Weights that take turns where each is to come from memory: more than a core's caches hold."""

Shape = tuple[int, int, int]
"""Rows, inputs and outputs of a matrix product."""


@dataclass(frozen=True, slots=True)
class Limit:
    """`seconds` for `operations` floating-point operations, each product's weight in the cache.

    `streamed_seconds`, where it has to come from memory, as all of a model's do for every token.
    """

    seconds: float
    streamed_seconds: float
    operations: float


def limit_seconds(model: Any, lengths: Sequence[int], *, samples: int, tokens: int) -> Limit:
    """The least time for `samples` responses of `tokens` tokens to each prompt, none of which is read twice.

    Attention counts with its operations at the mean rate of the products; norms, activations and drawing count nothing.
    """
    work = products(model, lengths, samples=samples, tokens=tokens)
    counted, attended = _operations(work), _attention(model.config, lengths, samples, tokens)
    seconds, streamed = (
        sum(count * 2 * s[1] * s[2] / _rate(s, streamed_bytes) for s, count in work.items())
        for streamed_bytes in (0.0, STREAMED_BYTES)
    )
    whole = 1 + attended / counted
    return Limit(seconds * whole, streamed * whole, counted + attended)


def operations(model: Any, lengths: Sequence[int], *, samples: int, tokens: int) -> float:
    """Floating-point operations of the same responses, attention included."""
    work = products(model, lengths, samples=samples, tokens=tokens)
    return _operations(work) + _attention(model.config, lengths, samples, tokens)


def products(model: Any, lengths: Sequence[int], *, samples: int, tokens: int) -> Counter[Shape]:
    """How many rows go through each shape of matrix product."""
    rows, read = len(lengths) * samples, sum(lengths)
    work: Counter[Shape] = Counter()
    head = model.get_output_embeddings()
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        outputs, inputs = layer.weight.shape
        if layer is head:
            work[rows, inputs, outputs] += len(lengths) + rows * (tokens - 1)
        else:
            work[PREFILL_ROWS, inputs, outputs] += read
            work[rows, inputs, outputs] += rows * (tokens - 1)
    return work


def _operations(work: Counter[Shape]) -> float:
    return sum(count * 2.0 * inputs * outputs for (_, inputs, outputs), count in work.items())


def _attention(config: Any, lengths: Sequence[int], samples: int, tokens: int) -> float:
    """Operations of queries × keys and weights × values: four a pair of positions and query channel."""
    pairs = sum(n * (n + 1) / 2 + samples * sum(n + t for t in range(1, tokens)) for n in lengths)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4.0 * pairs * config.num_hidden_layers * config.num_attention_heads * size


def _rate(shape: Shape, streamed_bytes: float) -> float:
    """Floating-point operations a second of `rows` × inputs by inputs × outputs, as a linear layer does them.

    The weights that take turns are `streamed_bytes` in all; one where that is less.
    """
    rows, inputs, outputs = shape
    x = torch.randn(rows, inputs)
    weights = torch.randn(max(1, int(streamed_bytes / (4 * inputs * outputs))), outputs, inputs)
    nn.functional.linear(x, weights[0])
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < SECONDS_PER_SHAPE:
        nn.functional.linear(x, weights[count % len(weights)])
        count += 1
    return 2.0 * rows * inputs * outputs * count / (time.perf_counter() - begun)
