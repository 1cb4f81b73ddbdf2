"""How sequences are laid out for supervised fine-tuning: one a row, or several end to end in a row.

    none    | p p r r r eos pad |        each example its own row, padded on the right
    rows    | p p r r r eos | p r r eos |        several in a row; positions restart with each

Neither carries an attention mask. Padding on the right is behind everything a causal model looks back at. In a row of
several, transformers sees where positions restart and lets no sequence attend to another; an explicit mask would take
the place of a model's own (sliding windows, for one). Models that know nothing of positions (recurrent ones, ALiBi) or
count them themselves would leak from one sequence to the next: `check_packing` finds them out.

Legend: B rows, T tokens, C columns in which at least one row predicts a counted token, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from alignment.errors import ConfigError
from alignment.types import TokenSequence
from models.losses import response_loss_sum

PROBE_LENGTHS = (5, 7)
"""Tokens of the two sequences that `check_packing` lays end to end."""


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Rows of token ids and what of them is predicted. `position_ids` is None where each row is one sequence.

    Shape: input_ids, position_ids (B, T); columns (C,); targets, learned (B, C).
    """

    input_ids: Tensor
    position_ids: Tensor | None
    columns: Tensor
    targets: Tensor
    learned: Tensor


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices of sequences by row: the longest first, each into the first row with room (first fit decreasing).

    A sequence that is longer than `row_tokens` gets a row to itself.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((row for row, left in enumerate(room) if lengths[i] <= left), None)
        if place is None:
            rows.append([i])
            room.append(row_tokens - lengths[i])
        else:
            rows[place].append(i)
            room[place] -= lengths[i]
    return rows


def sequence_batch(
    sequences: Sequence[TokenSequence], *, row_tokens: int | None, device: torch.device | str = "cpu"
) -> SequenceBatch:
    """Sequences as a batch: one a row, or packed into rows of at most `row_tokens` tokens."""
    packed = pack([len(s.ids) for s in sequences], row_tokens) if row_tokens else [[i] for i in range(len(sequences))]
    rows = [[sequences[i] for i in row] for row in packed]
    width = max(sum(len(s.ids) for s in row) for row in rows)
    shape = (len(rows), width)
    ids = torch.zeros(shape, dtype=torch.long)  # of padding any token will do: nothing looks at it
    positions = torch.arange(width).repeat(len(rows), 1)
    targets, learned = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens = torch.tensor(list(chain.from_iterable(s.ids for s in row)))
        counted = torch.tensor(list(chain.from_iterable(s.learned for s in row)))
        ids[i, : len(tokens)] = tokens
        # A token is predicted at the place before its own; a sequence's first token is never counted.
        targets[i, : len(tokens) - 1], learned[i, : len(tokens) - 1] = tokens[1:], counted[1:]
        start = 0
        for sequence in row:
            positions[i, start:] = torch.arange(width - start)  # the padding goes on from the last sequence
            start += len(sequence.ids)
    columns = learned.any(dim=0).nonzero().squeeze(1)
    return SequenceBatch(
        input_ids=ids.to(device),
        position_ids=positions.to(device) if row_tokens else None,
        columns=columns.to(device),
        targets=targets[:, columns].to(device),
        learned=learned[:, columns].to(device),
    )


def sequence_logits(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Logits in the columns that predict a counted token; the output head is spared the others. Shape: (B, C, V)."""
    positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    output = model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=batch.columns, **positions)
    logits: Tensor = output.logits
    return logits


def sequence_loss_sum(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Cross-entropy summed over the counted tokens, in nats; a scalar in float32."""
    return response_loss_sum(sequence_logits(model, batch), batch.targets, batch.learned)


@torch.no_grad()
def check_packing(model: nn.Module, *, vocabulary: int, device: torch.device | str = "cpu") -> None:
    """Raise ConfigError where a packed sequence reads as another than it does alone: its logits tell.

    Under ZeRO-3 all ranks must call it. The model must be in evaluation mode.
    """
    first, second = PROBE_LENGTHS
    ids = torch.arange(first + second) * 37 % vocabulary
    other = torch.cat([(ids[:first] + 1) % vocabulary, ids[first:]])
    packed = torch.stack([ids, other]).to(device)
    positions = torch.cat([torch.arange(first), torch.arange(second)]).repeat(2, 1).to(device)
    logits = model(input_ids=packed, position_ids=positions, use_cache=False).logits[:, first:].float()
    alone = model(input_ids=packed[:1, first:], use_cache=False).logits[0].float()
    # Rounding differs with the shape of the batch; bfloat16 keeps 8 bits.
    share = 0.05 if next(model.parameters()).dtype == torch.bfloat16 else 1e-3
    scale = float(alone.abs().max())
    leak, shift = float((logits[0] - logits[1]).abs().max()), float((logits[0] - alone).abs().max())
    if leak > 1e-5 * scale or shift > share * scale:
        raise ConfigError(
            f"sft.packing (rows): this policy's architecture does not keep packed sequences apart (logits move by "
            f"{max(leak, shift):.2g} with what stands before): set sft.packing=none"
        )
