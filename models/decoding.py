"""Sampling from a causal LM: each prompt is prefilled once, its cache expanded to n rows and written in place.

A token is drawn by inverting the cumulative distribution at a uniform number that the caller supplies, so
a sample is a function of its logits and its own numbers: neither the batch around it nor the number of
ranks has a say in its randomness.

Left out on purpose: beam search and penalties, which rejection sampling has no use for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from alignment.errors import TrainingError
from alignment.types import FinishReason
from models.batching import TokenIds, left_pad, position_ids


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `top_k` 0 and `top_p` 1 leave the distribution whole."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One response: its token ids, the ending token included, and why it ended."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class InPlaceLayer(DynamicLayer):
    """A layer's cache with room for all tokens to come: growing writes a column instead of copying the whole."""

    def __init__(self, filled: DynamicLayer, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        keys, values = filled.keys, filled.values
        if keys is None or values is None:
            raise ValueError("only a layer that was filled by a prefill can be given room")
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device
        self._length = keys.shape[-2]
        self._key_buffer, self._value_buffer = _with_room(keys, room), _with_room(values, room)
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append (B, heads, 1, head size) states; returns views of everything so far."""
        start, self._length = self._length, self._length + key_states.shape[-2]
        self._key_buffer[:, :, start : self._length] = key_states
        self._value_buffer[:, :, start : self._length] = value_states
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self._key_buffer, self._value_buffer = self._key_buffer[indices], self._value_buffer[indices]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = self._key_buffer[:, :, : self._length], self._value_buffer[:, :, : self._length]
        self.keys, self.values = keys, values
        return keys, values


def _with_room(states: Tensor, room: int) -> Tensor:
    rows, heads, length, size = states.shape
    buffer = states.new_empty(rows, heads, length + room, size)
    buffer[:, :, :length] = states
    return buffer


def batches(prompts: Sequence[TokenIds], samples_per_prompt: int, batch_rows: int) -> Iterator[list[int]]:
    """Indices of prompts in batches of at most `batch_rows` rows, prompts of similar length together."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    size = max(1, batch_rows // samples_per_prompt)
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.inference_mode()
def sample(
    model: PreTrainedModel, prompts: Sequence[TokenIds], uniforms: Tensor, sampling: Sampling, *, eos_ids: Sequence[int]
) -> list[list[Sample]]:
    """n responses to each of P prompts, decoded as one batch of P × n rows.

    Shape: uniforms (P, n, max_new_tokens) in [0, 1); returns P lists of n samples.
    """
    device = next(model.parameters()).device
    num_prompts, n, _ = uniforms.shape
    numbers = uniforms.flatten(0, 1).to(device)
    prompt_ids, mask = left_pad(prompts, pad_id=eos_ids[0], device=device)
    logits, cache = _prefill(model, prompt_ids, mask, n=n, room=sampling.max_new_tokens)
    eos = torch.tensor(list(eos_ids), device=device)

    rows = torch.arange(num_prompts * n, device=device)  # which sample each live row of the batch is
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    mask = torch.cat([mask.repeat_interleave(n, 0), mask.new_ones(len(rows), sampling.max_new_tokens)], dim=1)
    positions = mask[:, : prompt_ids.shape[1]].sum(-1, keepdim=True)
    tokens = torch.full((len(rows), sampling.max_new_tokens), int(eos[0]), device=device)
    for t in range(sampling.max_new_tokens):
        drawn = draw(logits, numbers[rows, t], sampling)
        live = ~done[rows]
        tokens[rows[live], t] = drawn[live]
        done[rows] |= torch.isin(drawn, eos)
        if bool(done.all()) or t + 1 == sampling.max_new_tokens:
            break
        alive = ~done[rows]
        if int(alive.sum()) * 2 <= len(rows):  # copying the cache pays only when it shrinks a good deal
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, mask, positions, drawn = rows[keep], mask[keep], positions[keep], drawn[keep]
        output = model(
            input_ids=drawn[:, None],
            attention_mask=mask[:, : prompt_ids.shape[1] + t + 1],
            position_ids=positions + t,
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
    samples = [_finish(row, set(eos_ids)) for row in tokens.tolist()]
    return [samples[i * n : (i + 1) * n] for i in range(num_prompts)]


@torch.inference_mode()
def stream(
    model: PreTrainedModel, prompt: TokenIds, uniforms: Tensor, sampling: Sampling, *, eos_ids: Sequence[int]
) -> Iterator[int]:
    """The tokens of one response as they are drawn, the ending one included: those of `sample` for the same numbers.

    Shape: uniforms (max_new_tokens,) in [0, 1).
    """
    device = next(model.parameters()).device
    prompt_ids, mask = left_pad([prompt], pad_id=eos_ids[0], device=device)
    logits, cache = _prefill(model, prompt_ids, mask, n=1, room=sampling.max_new_tokens)
    for t in range(sampling.max_new_tokens):
        drawn = draw(logits, uniforms[None, t].to(device), sampling)
        yield int(drawn)
        if int(drawn) in eos_ids or t + 1 == sampling.max_new_tokens:
            return
        logits = model(input_ids=drawn[:, None], past_key_values=cache, use_cache=True).logits[:, -1]


def _prefill(model: PreTrainedModel, prompt_ids: Tensor, mask: Tensor, *, n: int, room: int) -> tuple[Tensor, Cache]:
    """The logits after each prompt and its cache, both repeated for n samples. Shape: logits (P × n, V)."""
    cache = DynamicCache(config=model.config)
    output = model(
        input_ids=prompt_ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(n)
    # Sliding-window and other special layers keep their own kind of cache.
    cache.layers = [InPlaceLayer(layer, room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return output.logits[:, -1].repeat_interleave(n, 0), cache


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """One token a row by inverse CDF. Shape: logits (B, V), uniforms (B,) in [0, 1); returns (B,).

    Precise to float32: a token of probability below 6e-8 may never be drawn. Raises TrainingError for NaN.
    """
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    probabilities = _restrict(probabilities, sampling.top_k, sampling.top_p)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1]
    if not bool(torch.isfinite(total).all()):
        raise TrainingError("the policy's probabilities are not finite: training diverged. Lower training.lr")
    # Strictly below the total, so that rounding never lands past the last token that may be drawn.
    target = torch.minimum(uniforms.to(total.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _restrict(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero outside the k most probable tokens and outside the smallest set of mass top_p. Not renormalised."""
    if top_k and top_k < probabilities.shape[-1]:
        kept, ids = probabilities.topk(top_k, dim=-1)
        probabilities = torch.zeros_like(probabilities).scatter(-1, ids, kept)
    if top_p < 1:
        ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        ranked = ranked.masked_fill(before >= top_p * ranked.sum(-1, keepdim=True), 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, ids, ranked)
    return probabilities


def _finish(tokens: list[int], eos_ids: set[int]) -> Sample:
    for i, token in enumerate(tokens):
        if token in eos_ids:
            return Sample(tuple(tokens[: i + 1]), "stop")
    return Sample(tuple(tokens), "length")
