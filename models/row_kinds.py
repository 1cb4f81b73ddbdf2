"""Which kind of rows a model is decoded by: the one that gives its own logits, tried on a few short prompts.

A model that counts positions by its cache, or reads padding as text, gives other tokens than it would alone, and no
error. So each kind is asked for what the model says without cache and padding. Left out on purpose: decoding such a
model without padding, prompts of one length at a time.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from alignment.errors import ModelError
from models.batching import TokenIds
from models.memory import is_out_of_memory
from models.own_rows import OwnRows
from models.prefill import plain_cache
from models.rows import Job, Room, Rows, most_room
from models.shared_rows import SharedRows

PROBES = ((3, 4, 5, 6), (4, 6), (5, 3))
"""Prompts that are tried, two of them padded, and token ids where the vocabulary has so many."""
ROOM = Room(rows=3, tokens=2, prompts=3, width=4)

ENOUGH = 2
"""Probes that have to agree: a third may meet other experts by rounding. At least one of two is padded."""
TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.2, torch.float16: 0.2, torch.float64: 0.02}
"""Distance of logits, by the norm, from those that are right; a wrong position gives about 1."""

FAULTS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""What models raise where a cache or a mask is not what they expect."""

T = TypeVar("T")


def rows_for(
    model: PreTrainedModel, prompts: Sequence[TokenIds], samples: int, tokens: int, *, budget: int, pad_id: int
) -> Rows:
    """Rows for these prompts, at most `tokens` to a response. Raises ConfigError where not one fits in `budget`.

    Raises ModelError where no kind of rows gives the model's logits.
    """
    lengths, probes = [len(prompt) for prompt in prompts], _probes(model)
    expected = _alone(model, probes)
    like = _tried(lambda: plain_cache(model, pad_id, tokens=max(lengths) + tokens))
    if isinstance(like, DynamicCache):
        shared = SharedRows(model, probes, like, ROOM, samples=1, pad_id=pad_id)
        if _fault(shared, expected) is None:
            room = most_room(lengths, samples, tokens, budget=budget, shared=True)
            return SharedRows(model, prompts, like, room, samples=samples, pad_id=pad_id)
    fault = like if isinstance(like, Exception) else _fault(OwnRows(model, probes, ROOM, pad_id=pad_id), expected)
    if fault is not None:
        raise ModelError(
            f"rollouts cannot be sampled from a model of type {model.config.model_type} here: {fault}. Take a "
            "policy.model that reads position_ids and caches keys and values alone"
        ) from fault
    return OwnRows(model, prompts, most_room(lengths, samples, tokens, budget=budget, shared=False), pad_id=pad_id)


def _probes(model: PreTrainedModel) -> list[list[int]]:
    vocabulary = model.config.get_text_config().vocab_size
    return [[token % vocabulary for token in probe] for probe in PROBES]


def _alone(model: PreTrainedModel, probes: list[list[int]]) -> Tensor:
    """What the model says after each probe and its last token once more, without cache and padding: (3, V)."""
    device = next(model.parameters()).device
    parts = [
        model(input_ids=torch.tensor([[*one, one[-1]] for one in some], device=device), use_cache=False).logits[:, -1]
        for some in (probes[:1], probes[1:])  # those of one length together
    ]
    return torch.cat(parts).float()


def _fault(rows: Rows, expected: Tensor) -> Exception | None:
    """Why these rows, which are for the probes, are not right; None where they are."""

    def step() -> Tensor:
        begun, _ = rows.begin(deque(Job(i, 0) for i in range(len(PROBES))))
        last = [PROBES[job.prompt][-1] % expected.shape[1] for job in begun]
        return rows.step(torch.tensor(last, device=expected.device))

    found = _tried(step)
    if isinstance(found, Exception) or not bool(torch.isfinite(expected).all()):
        return found if isinstance(found, Exception) else None  # of weights that diverged, `draw` tells
    scale = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    near = (found.float() - expected).norm(dim=-1) <= TOLERANCE[found.dtype] * scale
    if int(near.sum()) >= ENOUGH:
        return None
    return ValueError("in a batch of prompts it gives other logits than for each alone")


def _tried(work: Callable[[], T]) -> T | Exception:
    """What `work` returns, or how it failed, unless for want of memory."""
    try:
        return work()
    except FAULTS as error:
        if is_out_of_memory(error):
            raise
        return error
