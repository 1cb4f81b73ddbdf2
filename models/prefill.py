"""Prompts through the model, and what a model's attention is found to do while it reads one token.

Most models of transformers hand queries, keys and values to one function, which a context may replace. Some do more
than softmax(q k) v there (softcaps, sinks, position biases), some change what they cached, some have a window that a
response leaves, some compute attention by themselves. Watching one token tells, whatever the architecture is called.

Legend: P prompts, L prompt columns, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.batching import TokenIds, left_pad, position_ids

Attention = Callable[..., tuple[Tensor, Tensor | None]]

PLAIN = {
    "dropout", "is_causal", "output_attentions", "output_router_logits", "position_ids", "scaling", "sliding_window",
    "use_cache",
}  # fmt: skip
"""What a model may tell its attention without making it another function."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Prompts that were read: the logits after each, and their keys and values.

    Shape: logits (P, V), mask (P, L), 0 on the left where a prompt is shorter.
    """

    logits: Tensor
    cache: DynamicCache
    mask: Tensor


def prefill(model: PreTrainedModel, prompts: Sequence[TokenIds], pad_id: int) -> Prefilled:
    """Read the prompts as one batch."""
    ids, mask = left_pad(prompts, pad_id=pad_id, device=next(model.parameters()).device)
    cache = DynamicCache(config=model.config)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Prefilled(output.logits[:, -1], cache, mask)


def states(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer. Shape: (P, heads, L, head size)."""
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[misc, union-attr]


@contextmanager
def attention(function: Attention) -> Iterator[None]:
    """Models whose attention is `sdpa`, the default of most, call `function` instead."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = function
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before


def plain_cache(model: PreTrainedModel, token: int, *, tokens: int) -> DynamicCache | None:
    """The cache of one token if every layer attends, by softmax alone, to just what it cached; else None.

    `tokens` is the longest prompt and response together: a sliding window must hold them all.
    """
    calls: dict[int, tuple[Tensor, Tensor] | None] = {}
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **how: Any) -> Any:
        plain = all(name in PLAIN or told is None for name, told in how.items())
        calls[getattr(module, "layer_idx", -1)] = (key, value) if plain else None
        return usual(module, query, key, value, *rest, **how)

    with attention(watched):
        cache = prefill(model, [[token]], token).cache
    layers = cache.layers
    whole = bool(layers) and set(calls) == set(range(len(layers)))
    return cache if whole and all(_is_plain(layer, calls[i], tokens) for i, layer in enumerate(layers)) else None


def _is_plain(layer: Any, call: tuple[Tensor, Tensor] | None, tokens: int) -> bool:
    if call is None or type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return False
    if isinstance(layer, DynamicSlidingWindowLayer) and tokens > layer.sliding_window:
        return False
    return all(
        cached is not None and cached.shape == seen.shape and torch.equal(cached, seen)
        for cached, seen in zip((layer.keys, layer.values), call, strict=True)
    )
