"""Rows of any causal LM: each with a copy of its prompt's cache, attended to as the model itself does.

For models whose attention `models.prefill.plain_cache` finds to be of another kind. Rows begin together, and others
take their place when all have ended.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from models.batching import TokenIds
from models.prefill import prefill
from models.rows import Job, Room


class InPlaceLayer(DynamicLayer):
    """The rows `index` of a layer's cache with room for all tokens to come: growing writes a column, copying none."""

    def __init__(self, filled: DynamicLayer, index: Tensor, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        keys, values = filled.keys, filled.values
        if keys is None or values is None:
            raise ValueError("only a layer that was filled by a prefill can be given room")
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device
        self._length = keys.shape[-2]
        self._key_buffer, self._value_buffer = _with_room(keys, index, room), _with_room(values, index, room)
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


def _with_room(states: Tensor, index: Tensor, room: int) -> Tensor:
    _, heads, length, size = states.shape
    buffer = states.new_empty(len(index), heads, length + room, size)
    buffer[:, :, :length] = states[index]
    return buffer


class OwnRows:
    """See the module."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[TokenIds], room: Room, *, pad_id: int) -> None:
        self._model, self._prompts, self._room, self._pad_id = model, prompts, room, pad_id
        self._cache: Any = None
        self._place: list[int] = []  # where in the cache each live row is
        self._columns = 0

    def begin(self, waiting: "deque[Job]") -> tuple[list[Job], list[Tensor]]:
        """See `models.rows.Rows`. Nothing begins while a row is live."""
        if self._place or not waiting:
            return [], []
        jobs = [waiting.popleft() for _ in range(min(self._room.rows, len(waiting)))]
        prompts = list(dict.fromkeys(job.prompt for job in jobs))
        read = prefill(self._model, [self._prompts[i] for i in prompts], self._pad_id)
        index = torch.tensor([prompts.index(job.prompt) for job in jobs], device=read.mask.device)
        self._cache, room = read.cache, self._room.tokens
        layers: list[Any] = self._cache.layers
        for i, layer in enumerate(layers):  # one at a time: two copies of the whole would be twice the memory
            if type(layer) is DynamicLayer:
                layers[i] = InPlaceLayer(layer, index, room)
            else:  # sliding windows and other special layers keep their own kind of cache
                layer.batch_select_indices(index)
        mask = read.mask[index]
        self._mask = torch.cat([mask, mask.new_ones(len(jobs), room)], dim=1)
        self._positions, self._columns = mask.sum(-1, keepdim=True), mask.shape[1]
        self._place = list(range(len(jobs)))
        return jobs, [read.logits[index]]

    def drop(self, ended: Sequence[int]) -> list[int]:
        """See `models.rows.Rows`. Half of the rows gone, the cache is copied; all of them, let go."""
        gone = set(ended)
        order = [i for i in range(len(self._place)) if i not in gone]
        self._place = [self._place[i] for i in order]
        if not self._place:
            self._cache = None  # before the next one is made
        elif 2 * len(self._place) <= len(self._mask):
            keep = torch.tensor(self._place, device=self._mask.device)
            self._cache.batch_select_indices(keep)
            self._mask, self._positions = self._mask[keep], self._positions[keep]
            self._place = list(range(len(order)))
        return order

    def step(self, tokens: Tensor) -> Tensor:
        """See `models.rows.Rows`. Rows that are done with are computed beside the others."""
        place = torch.tensor(self._place, device=tokens.device)
        everyone = torch.full((len(self._mask),), self._pad_id, device=tokens.device)
        everyone[place] = tokens
        self._columns += 1
        output = self._model(
            input_ids=everyone[:, None],
            attention_mask=self._mask[:, : self._columns],
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._positions = self._positions + 1
        logits: Tensor = output.logits[place, -1]
        return logits
