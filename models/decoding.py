"""Responses from a causal LM: each prompt is prefilled once, its cache expanded to n rows and written in place.

How a token is drawn stands in `models.sampling`.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from models.batching import TokenIds, left_pad, position_ids
from models.sampling import Sample, Sampling, adjusted, before_stop, draw, log_probs

Decode = Callable[[TokenIds, TokenIds], str]
"""The text of a response: from the tokens of its prompt and its own."""


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
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    uniforms: Tensor,
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    decode: Decode | None = None,
) -> list[list[Sample]]:
    """n responses to each of P prompts, decoded as one batch of P × n rows.

    Shape: uniforms (P, n, max_new_tokens) in [0, 1); returns P lists of n samples. Stop strings need `decode`.
    """
    if sampling.stop and decode is None:
        raise ValueError("stop strings are looked for in a text: give `decode`")
    device = next(model.parameters()).device
    num_prompts, n, _ = uniforms.shape
    numbers = uniforms.flatten(0, 1).to(device)
    prompt_ids, mask = left_pad(prompts, pad_id=eos_ids[0], device=device)
    width = prompt_ids.shape[1]
    logits, cache = _prefill(model, prompt_ids, mask, n=n, room=sampling.max_new_tokens)
    eos = torch.tensor(list(eos_ids), device=device)

    rows = torch.arange(num_prompts * n, device=device)  # which sample each live row of the batch is
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    mask = torch.cat([mask.repeat_interleave(n, 0), mask.new_ones(len(rows), sampling.max_new_tokens)], dim=1)
    positions = mask[:, :width].sum(-1, keepdim=True)
    # What a row has seen; the rest is filled with its prompt's last token, which it has.
    seen = prompt_ids[:, -1:].repeat_interleave(n, 0).repeat(1, width + sampling.max_new_tokens)
    seen[:, :width] = torch.where(mask[:, :width] == 1, prompt_ids.repeat_interleave(n, 0), seen[:, :width])
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in rows]
    for t in range(sampling.max_new_tokens):
        wanted = adjusted(logits, sampling, seen=seen[rows], lengths=torch.full_like(rows, t), ending=eos)
        drawn = draw(wanted, numbers[rows, t], sampling)
        live = ~done[rows]
        logged = log_probs(logits, drawn)
        for row, token, value, is_live in zip(
            rows.tolist(), drawn.tolist(), logged.tolist(), live.tolist(), strict=True
        ):
            if is_live:
                found[row][0].append(token)
                found[row][1].append(value)
        seen[rows, width + t] = drawn
        done[rows] |= torch.isin(drawn, eos)
        if decode is not None and sampling.stop:
            for row in rows[~done[rows]].tolist():
                text = decode(prompts[row // n], found[row][0])
                done[row] = before_stop(text, sampling.stop) != text
        if bool(done.all()) or t + 1 == sampling.max_new_tokens:
            break
        alive = ~done[rows]
        if int(alive.sum()) * 2 <= len(rows):  # copying the cache pays only when it shrinks a good deal
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, mask, positions, drawn = rows[keep], mask[keep], positions[keep], drawn[keep]
        output = model(
            input_ids=drawn[:, None],
            attention_mask=mask[:, : width + t + 1],
            position_ids=positions + t,
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
    samples = [
        Sample(tuple(tokens), "stop" if bool(ended) else "length", tuple(logged))
        for (tokens, logged), ended in zip(found, done.tolist(), strict=True)
    ]
    return [samples[i * n : (i + 1) * n] for i in range(num_prompts)]


@torch.inference_mode()
def stream(
    model: PreTrainedModel, prompt: TokenIds, uniforms: Tensor, sampling: Sampling, *, eos_ids: Sequence[int]
) -> Iterator[int]:
    """The tokens of one response as they are drawn, the ending one included: those of `sample` for the same numbers.

    Stop strings are the caller's, who has the text.

    Shape: uniforms (max_new_tokens,) in [0, 1).
    """
    device = next(model.parameters()).device
    prompt_ids, mask = left_pad([prompt], pad_id=eos_ids[0], device=device)
    logits, cache = _prefill(model, prompt_ids, mask, n=1, room=sampling.max_new_tokens)
    seen, eos = torch.tensor([list(prompt)], device=device), torch.tensor(list(eos_ids), device=device)
    for t in range(sampling.max_new_tokens):
        lengths = torch.tensor([t], device=device)
        wanted = adjusted(logits, sampling, seen=seen, lengths=lengths, ending=eos)
        drawn = draw(wanted, uniforms[None, t].to(device), sampling)
        seen = torch.cat([seen, drawn[:, None]], dim=1)
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
