"""How sequences are laid out for training: one a row, or several end to end in a row.

    padded  | p p r r r eos pad |                each its own row, padded on the right
    packed  | p p r r r eos | p r r eos |        several in a row; positions restart with each

Neither carries an attention mask. Padding on the right is behind everything a causal model looks back at. In a row of
several, transformers sees where positions restart and lets no sequence attend to another; an explicit mask would take
the place of a model's own (sliding windows, for one). Models that know nothing of positions (recurrent ones, ALiBi) or
count them themselves would leak from one sequence to the next: `packing_leak` finds them out.

Legend: B rows, T tokens, N counted tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from alignment.errors import ConfigError
from alignment.types import TokenSequence

PROBE_LENGTHS = (5, 7)
"""Tokens of the two sequences that `packing_leak` lays end to end."""

MOST_PADDING = 0.05
"""Share of a packed batch that may be padding. Fewer rows would hold less of it, at more attention per token."""


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Rows of token ids and what of them is predicted. `position_ids` is None where each row is one sequence.

    `predicts` are the places, counted row by row, whose next token the loss counts.
    Shape: input_ids, position_ids (B, T); predicts, targets (N,).
    """

    input_ids: Tensor
    position_ids: Tensor | None
    predicts: Tensor
    targets: Tensor


def pack(lengths: Sequence[int], context: int | None = None) -> list[list[int]]:
    """Indices of sequences by row: as many rows of about one length as keep padding below `MOST_PADDING`.

    Attention costs a row's length squared: hence many rows, not one. Where they would be longer than the model's
    `context` of tokens, which some cannot read even where positions restart, the fewest rows within it, however padded.
    """
    total, longest = sum(lengths), max(lengths)
    widest = total if context is None else max(context, longest)
    for count in range(min(int(total / ((1 - MOST_PADDING) * longest)), len(lengths)), 0, -1):
        rows, width = _rows(lengths, count)
        if width <= widest and total >= (1 - MOST_PADDING) * count * width:
            return rows
    counts = range(1, len(lengths) + 1)  # the last has a row for each
    return next(rows for rows, width in (_rows(lengths, count) for count in counts) if width <= widest)


def _rows(lengths: Sequence[int], count: int) -> tuple[list[list[int]], int]:
    """`count` rows, and the tokens of the longest: the longest sequence first, each into the shortest row."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        shortest = filled.index(min(filled))
        rows[shortest].append(i)
        filled[shortest] += lengths[i]
    return rows, max(filled)


def sequence_batch(
    sequences: Sequence[TokenSequence],
    *,
    packed: bool,
    context: int | None = None,
    device: torch.device | str = "cpu",
) -> SequenceBatch:
    """Sequences as a batch: one a row, or packed into rows of about one length within the model's `context`."""
    order = pack([len(s.ids) for s in sequences], context) if packed else [[i] for i in range(len(sequences))]
    rows = [[sequences[i] for i in row] for row in order]
    width = max(sum(len(s.ids) for s in row) for row in rows)
    shape = (len(rows), width)
    ids = torch.zeros(shape, dtype=torch.long)  # of padding any token will do: nothing looks at it
    positions = torch.zeros(shape, dtype=torch.long)  # padding: a token that looks at itself, within any context
    targets, learned = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens = torch.tensor(list(chain.from_iterable(s.ids for s in row)))
        counted = torch.tensor(list(chain.from_iterable(s.learned for s in row)))
        ids[i, : len(tokens)] = tokens
        # A token is predicted at the place before its own; a sequence's first token is never counted.
        targets[i, : len(tokens) - 1], learned[i, : len(tokens) - 1] = tokens[1:], counted[1:]
        start = 0
        for sequence in row:
            positions[i, start : start + len(sequence.ids)] = torch.arange(len(sequence.ids))
            start += len(sequence.ids)
    predicts = learned.flatten().nonzero().squeeze(1)
    return SequenceBatch(
        input_ids=ids.to(device),
        position_ids=positions.to(device) if packed else None,
        predicts=predicts.to(device),
        targets=targets.flatten()[predicts].to(device),
    )


@torch.no_grad()
def packing_leak(model: nn.Module) -> float:
    """How far logits of a packed sequence move with what stands before it; 0 where it reads as it does alone.

    Under ZeRO-3 all ranks must call it. The model must be in evaluation mode.
    """
    parameter = next(model.parameters())
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    first, second = PROBE_LENGTHS
    ids = torch.arange(first + second) * 37 % vocabulary
    other = torch.cat([(ids[:first] + 1) % vocabulary, ids[first:]])
    packed = torch.stack([ids, other]).to(parameter.device)
    positions = torch.cat([torch.arange(first), torch.arange(second)]).repeat(2, 1).to(parameter.device)
    logits = model(input_ids=packed, position_ids=positions, use_cache=False).logits[:, first:].float()
    alone = model(input_ids=packed[:1, first:], use_cache=False).logits[0].float()
    # Rounding differs with the shape of the batch; bfloat16 keeps 8 bits.
    share = 0.05 if parameter.dtype == torch.bfloat16 else 1e-3
    scale = float(alone.abs().max())
    leak, shift = float((logits[0] - logits[1]).abs().max()), float((logits[0] - alone).abs().max())
    return max(leak, shift) if leak > 1e-5 * scale or shift > share * scale else 0.0


def check_packing(model: nn.Module) -> None:
    """Raise ConfigError where packed sequences leak into each other; see `packing_leak`."""
    leak = packing_leak(model)
    if leak:
        raise ConfigError(
            f"sft.packing (rows): this policy's architecture does not keep packed sequences apart (logits move by "
            f"{leak:.2g} with what stands before): set sft.packing=none"
        )
