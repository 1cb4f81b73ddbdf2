"""Rows whose prompt is stored once for all of its samples, and each row's own tokens beside it, written in place.

A row attends to its prompt and to its own tokens apart; the two are put together by how much mass each holds. All
samples of a prompt look at its keys in one matrix product, as do the query heads that share a key head: nothing is
repeated. A row that ends makes room at once: the last row moves to its place, and a prompt whose rows have all ended
gives its slot to one that waits.

Legend: B live rows, P prompt slots, n samples a prompt, H key heads, G query heads to each, D head size, L prompt
columns, T columns of own tokens, V vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from models.batching import TokenIds
from models.prefill import attention, prefill, states
from models.rows import Job, Room

PREFILL_TOKENS = {"cpu": 512, "cuda": 16_384}
"""Prompt tokens, padding included, that are read at once: enough for the device's full rate, and on a CPU few enough
that prompts of like length are together."""

SLOT_GROUPS = {"cpu": 4, "cuda": 1}
"""Matrix products that the prompts' keys are divided among, by length: less padding, and on a GPU more launches."""


@dataclass(frozen=True, slots=True)
class Column:
    """Where a step writes: `where` indexes one column of each live row, `columns` counts those that any row has then.

    The layers are given this, not the rows: two that hold each other are freed only when the garbage collector runs,
    which is seldom, and with them a whole cache.
    """

    where: Any
    columns: int


class OwnTokens(DynamicLayer):
    """A layer's keys and values of all rows' own tokens, (rows, H, tokens, D) with room for all that may come."""

    column: Column

    def __init__(self, like: Tensor, like_value: Tensor, room: Room) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized, self.dtype, self.device = True, like.dtype, like.device
        self.all_keys = like.new_zeros(room.rows, like.shape[1], room.tokens, like.shape[3])
        self.all_values = like.new_zeros(room.rows, like_value.shape[1], room.tokens, like_value.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write one column of each live row; returns views of everything so far, (B, H, T, D)."""
        count, columns, where = len(key_states), self.column.columns, self.column.where
        self.all_keys[where], self.all_values[where] = key_states[:, :, 0], value_states[:, :, 0]
        self.keys, self.values = self.all_keys[:count, :, :columns], self.all_values[:count, :, :columns]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Columns before the one that is written next."""
        return self.column.columns - 1


class SharedRows:
    """See the module. `like` is the cache of any prompt: its shapes and types are those of the slots."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[TokenIds],
        like: DynamicCache,
        room: Room,
        *,
        samples: int,
        pad_id: int,
    ) -> None:
        self._model, self._prompts, self._samples, self._room, self._pad_id = model, prompts, samples, room, pad_id
        self._own = [OwnTokens(keys, values, room) for keys, values in states(like)]
        self._shared = [(_slots(keys, room), _slots(values, room)) for keys, values in states(like)]
        self._device = self._shared[0][0].device
        self._bias = torch.zeros(room.prompts, 1, 1, room.width, device=self._device)
        self._slot_of: dict[int, int] = {}
        self._width_of: dict[int, int] = {}  # of the batch that the prompt was read in
        self._first: dict[int, Tensor] = {}  # the logits after a prompt that is not done with
        self._jobs: list[Job] = []
        self._lengths: list[int] = []

    def begin(self, waiting: "deque[Job]") -> tuple[list[Job], list[Tensor]]:
        """See `models.rows.Rows`. Prompts are read when all of their samples find room, or nothing is live."""
        begun: list[Job] = []
        while waiting and len(self._jobs) < self._room.rows:
            if waiting[0].prompt not in self._slot_of and not self._read(waiting):
                break
            job = waiting.popleft()
            begun.append(job)
            self._jobs.append(job)
            self._lengths.append(0)
        firsts = [self._first[job.prompt][None] for job in begun]
        open_prompt = waiting[0].prompt if waiting else None
        self._first = {prompt: logits for prompt, logits in self._first.items() if prompt == open_prompt}
        return begun, firsts

    def _read(self, waiting: "deque[Job]") -> bool:
        """Read the next prompts into free slots; False where that has to wait."""
        free_rows = self._room.rows - len(self._jobs)
        free = sorted(set(range(self._room.prompts)) - set(self._slot_of.values()))
        if not free or (self._jobs and free_rows < min(self._samples, self._room.rows)):
            return False
        coming = list(dict.fromkeys(job.prompt for job in waiting))
        longest = len(self._prompts[coming[0]])
        count = max(1, min(len(free), -(-free_rows // self._samples), PREFILL_TOKENS[self._device.type] // longest))
        read = prefill(self._model, [self._prompts[i] for i in coming[:count]], self._pad_id)
        slots = torch.tensor(free[: len(coming[:count])], device=self._device)
        for (all_keys, all_values), (keys, values) in zip(self._shared, states(read.cache), strict=True):
            all_keys[slots, :, :longest], all_values[slots, :, :longest] = keys, values
        bias = torch.full((len(slots), self._room.width), -torch.inf, device=self._device)
        bias[:, :longest] = torch.where(read.mask == 1, 0.0, -torch.inf)
        self._bias[slots, 0, 0] = bias
        for prompt, slot, logits in zip(coming, slots.tolist(), read.logits, strict=False):
            self._slot_of[prompt], self._width_of[prompt], self._first[prompt] = slot, longest, logits
        return True

    def drop(self, ended: Sequence[int]) -> list[int]:
        """See `models.rows.Rows`. Rows from the end move to the places that are free now."""
        gone = set(ended)
        count = len(self._jobs) - len(gone)
        holes = sorted(i for i in gone if i < count)
        movers = [i for i in range(count, len(self._jobs)) if i not in gone]
        order = list(range(count))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if holes:
            to, source = torch.tensor(holes, device=self._device), torch.tensor(movers, device=self._device)
            columns = max(self._lengths)
            for layer in self._own:
                for kept in (layer.all_keys, layer.all_values):
                    kept[to, :, :columns] = kept[source, :, :columns]
        self._jobs, self._lengths = [self._jobs[i] for i in order], [self._lengths[i] for i in order]
        needed = {job.prompt for job in self._jobs} | set(self._first)
        self._slot_of = {prompt: slot for prompt, slot in self._slot_of.items() if prompt in needed}
        return order

    def step(self, tokens: Tensor) -> Tensor:
        """See `models.rows.Rows`."""
        lengths, device = torch.tensor(self._lengths, device=self._device), self._device
        count, columns = len(lengths), max(self._lengths) + 1
        before = torch.tensor([len(self._prompts[job.prompt]) for job in self._jobs], device=device)
        seats = [self._slot_of[job.prompt] * self._samples + job.sample for job in self._jobs]
        self._used = max(self._slot_of.values()) + 1
        self._groups = self._slot_groups()
        # Rows in the order of their seats, and of one length, are the usual case, and need no index.
        self._seats = None if seats == list(range(self._used * self._samples)) else torch.tensor(seats, device=device)
        self._own_bias = None
        where: Any = (slice(count), slice(None), self._lengths[0])
        if min(self._lengths) < max(self._lengths):
            where = (torch.arange(count, device=device), slice(None), lengths)
            beyond = torch.arange(columns, device=device) > lengths[:, None]
            bias = torch.zeros(beyond.shape, device=device).masked_fill_(beyond, -torch.inf)
            self._own_bias = bias[:, None, None]
        for layer in self._own:
            layer.column = Column(where, columns)
        with attention(self._attend):
            output = self._model(
                input_ids=tokens[:, None],
                # Of four dimensions, so that no model makes one of its own: `_attend` looks at none.
                attention_mask=torch.zeros(count, 1, 1, 1, dtype=torch.bool, device=device),
                position_ids=(before + lengths)[:, None],
                past_key_values=Cache(layers=list(self._own)),
                use_cache=True,
            )
        self._lengths = [length + 1 for length in self._lengths]
        logits: Tensor = output.logits[:, -1]
        return logits

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float | None = None, **__: Any
    ) -> tuple[Tensor, None]:
        """Attention of one new token a row. Shape: query (B, H·G, 1, D), key and value (B, H, T, D)."""
        rows, heads, size = len(query), key.shape[1], query.shape[3]
        grouped, scale = query.reshape(rows, heads, -1, size), size**-0.5 if scaling is None else scaling
        own, own_mass = _softmax_attention(grouped, key, value, self._own_bias, scale)
        seated, (keys, values) = self._seated(grouped), self._shared[module.layer_idx]
        parts = [
            _softmax_attention(
                seated[slots], keys[slots, :, :width], values[slots, :, :width], self._bias[slots, ..., :width], scale
            )
            for slots, width in self._groups
        ]
        found, mass = (self._stood(torch.cat(part)) for part in zip(*parts, strict=True))
        merged = torch.lerp(own, found, torch.sigmoid(mass - own_mass)).to(value.dtype)
        return merged.reshape(rows, 1, -1, own.shape[3]), None

    def _slot_groups(self) -> list[tuple[slice, int]]:
        """Slots side by side, each group with the columns that its widest prompt takes: less padding is looked at."""
        widths = [0] * self._used
        for prompt, slot in self._slot_of.items():
            widths[slot] = self._width_of[prompt]
        size = -(-self._used // SLOT_GROUPS[self._device.type])
        return [
            (slice(start, min(start + size, self._used)), max(1, *widths[start : start + size]))
            for start in range(0, self._used, size)
        ]

    def _seated(self, grouped: Tensor) -> Tensor:
        """(B, H, G, D) as (P, H, n·G, D): with the other samples of its prompt."""
        if self._seats is not None:
            places = grouped.new_zeros(self._used * self._samples, *grouped.shape[1:])
            grouped = places.index_copy_(0, self._seats, grouped)
        seated: Tensor = grouped.unflatten(0, (self._used, self._samples)).transpose(1, 2).flatten(2, 3)
        return seated

    def _stood(self, seated: Tensor) -> Tensor:
        """(P, H, n·G, D) as (B, H, G, D) again."""
        places: Tensor = seated.unflatten(2, (self._samples, -1)).transpose(1, 2).flatten(0, 1)
        return places if self._seats is None else places[self._seats]


def _softmax_attention(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of its softmax's sum, both in float32: (P, H, queries, D) and (P, H, queries, 1).

    Scores and sums are float32, as `sdpa` has them: of half precision scores, a softmax is off by a per cent.
    """
    scores = _product(query, keys.transpose(-1, -2)).mul_(scale)
    if bias is not None:
        scores += bias
    largest = scores.amax(-1, keepdim=True)
    total = scores.sub_(largest).exp_().sum(-1, keepdim=True)
    found = _product(scores, values)
    return found.div_(total), largest + total.log()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, which a GPU makes of half precision without a copy.

    Shape: (P, H, m, k), (P, H, k, n).
    """
    if right.dtype == torch.float32 or right.device.type == "cpu":
        return torch.matmul(left.float(), right.float())
    product = torch.bmm(left.flatten(0, 1).to(right.dtype), right.flatten(0, 1), out_dtype=torch.float32)
    made: Tensor = product.unflatten(0, left.shape[:2])
    return made


def _slots(like: Tensor, room: Room) -> Tensor:
    return like.new_zeros(room.prompts, like.shape[1], room.width, like.shape[3])
