"""How prompts and responses are laid out in tensors: prompts padded on the left, responses on the right.

So the response of every row fills the same columns, and a model's `logits_to_keep` spares it the output
head on the prompt, whatever the architecture.

    | pad pad p p p | r r r eos pad |        B rows, P prompt columns, R response columns
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TokenIds = Sequence[int]


@dataclass(frozen=True, slots=True)
class ResponseBatch:
    """Token ids of B prompt–response pairs and what a causal LM needs to read them.

    Shape: input_ids, attention_mask, position_ids (B, P + R); targets, response_mask (B, R).
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    targets: Tensor
    response_mask: Tensor


def left_pad(rows: Sequence[TokenIds], pad_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows of token ids padded on the left, and their mask. Shape: both (B, P)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def response_batch(
    prompts: Sequence[TokenIds], responses: Sequence[TokenIds], pad_id: int, device: torch.device | str = "cpu"
) -> ResponseBatch:
    """Prompts and responses, one of each a row, as a batch. Prompts must hold a token or more."""
    prompt_ids, prompt_mask = left_pad(prompts, pad_id)
    width = max(len(row) for row in responses)
    targets = torch.full((len(responses), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(targets)
    for i, row in enumerate(responses):
        targets[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    attention_mask = torch.cat([prompt_mask, mask], dim=1)
    return ResponseBatch(
        input_ids=torch.cat([prompt_ids, targets], dim=1).to(device),
        attention_mask=attention_mask.to(device),
        position_ids=position_ids(attention_mask).to(device),
        targets=targets.to(device),
        response_mask=mask.bool().to(device),
    )


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that padding does not shift them. Shape: (B, T)."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def response_logits(model: nn.Module, batch: ResponseBatch) -> Tensor:
    """Logits that predict each response token. Shape: (B, R, V)."""
    width = batch.targets.shape[1]
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=width + 1,
    )
    logits: Tensor = output.logits[:, :-1]
    return logits
