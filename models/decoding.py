"""Responses from a causal LM: prompts are read once, rows that end make room for others, caches are written in place.

How a token is drawn stands in `models.sampling`; what is kept of prompts and rows in `models.shared_rows`, and for
models of another kind in `models.own_rows`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignment.types import FinishReason
from models.batching import TokenIds
from models.packed_weights import PackedWeights
from models.prefill import prefill
from models.row_kinds import rows_for
from models.rows import Job, longest_first
from models.sampling import Sample, Sampling, adjusted, before_stop, draw

Decode = Callable[[TokenIds, TokenIds], str]
"""The text of a response: from the tokens of its prompt and its own."""


@dataclass(slots=True)
class _Row:
    """A response that is being drawn."""

    job: Job
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


@torch.inference_mode()
def respond(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    uniforms: Tensor,
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    batch_tokens: int,
    decode: Decode | None = None,
) -> Iterator[dict[int, list[Sample]]]:
    """n responses to each of P prompts: those of some prompts at a time, by the prompt's index, as they are done.

    `batch_tokens` bounds the tokens whose keys and values are kept, each row's for the longest response. Stop strings
    need `decode`. Shape: uniforms (P, n, max_new_tokens) in [0, 1). Raises ConfigError where one row exceeds
    `batch_tokens`, ModelError where the model cannot be decoded in batches, TrainingError where it gives NaN.
    """
    if sampling.stop and decode is None:
        raise ValueError("stop strings are looked for in a text: give `decode`")
    device, samples = next(model.parameters()).device, uniforms.shape[1]
    numbers, ending = uniforms.to(device), torch.tensor(list(eos_ids), device=device)
    waiting = longest_first(prompts, samples)
    cache = rows_for(model, prompts, samples, sampling.max_new_tokens, budget=batch_tokens, pad_id=eos_ids[0])
    weights = PackedWeights(model)
    rows: list[_Row] = []
    done: dict[int, dict[int, Sample]] = {}
    logits: list[Tensor] = []
    while True:
        begun, firsts = cache.begin(waiting)
        rows += [_Row(job) for job in begun]
        if not rows:
            return
        logits += firsts
        drawn = _draw(logits[0] if len(logits) == 1 else torch.cat(logits), rows, prompts, numbers, sampling, ending)
        ended = []
        for i, row in enumerate(rows):
            reason = _reason(row, prompts[row.job.prompt], sampling, eos_ids, decode)
            if reason is not None:
                ended.append(i)
                sample = Sample(tuple(row.tokens), reason, tuple(row.log_probs))
                done.setdefault(row.job.prompt, {})[row.job.sample] = sample
        if ended:
            order = cache.drop(ended)
            rows, drawn = [rows[i] for i in order], drawn[order]
            whole = [prompt for prompt, found in done.items() if len(found) == samples]
            if whole:
                yield {prompt: [one for _, one in sorted(done.pop(prompt).items())] for prompt in whole}
        logits = []
        if rows:
            with weights.stepping(len(rows)):
                logits = [cache.step(drawn)]


@torch.inference_mode()
def stream(
    model: PreTrainedModel, prompt: TokenIds, uniforms: Tensor, sampling: Sampling, *, eos_ids: Sequence[int]
) -> Iterator[int]:
    """The tokens of one response as they are drawn, the ending one included: those of `respond` for the same numbers.

    Stop strings are the caller's, who has the text. Shape: uniforms (max_new_tokens,) in [0, 1).
    """
    read = prefill(model, [prompt], eos_ids[0])
    logits, ending = read.logits, torch.tensor(list(eos_ids), device=read.mask.device)
    row = _Row(Job(0, 0))
    for t in range(sampling.max_new_tokens):
        drawn = _draw(logits, [row], [prompt], uniforms[None, None].to(read.mask.device), sampling, ending)
        yield row.tokens[-1]
        if row.tokens[-1] in eos_ids or t + 1 == sampling.max_new_tokens:
            return
        logits = model(input_ids=drawn[:, None], past_key_values=read.cache, use_cache=True).logits[:, -1]


def _draw(
    logits: Tensor,
    rows: Sequence[_Row],
    prompts: Sequence[TokenIds],
    numbers: Tensor,
    sampling: Sampling,
    ending: Tensor,
) -> Tensor:
    """The next token of each row, which its row is given too. Shape: logits (B, V); returns (B,)."""
    lengths = [len(row.tokens) for row in rows]
    place = torch.tensor([[row.job.prompt, row.job.sample, t] for row, t in zip(rows, lengths, strict=True)]).T
    penalised = sampling.repetition_penalty != 1
    seen = [[*prompts[row.job.prompt], *row.tokens] for row in rows] if penalised else []
    wanted = adjusted(logits, sampling, seen=seen, lengths=lengths, ending=ending)
    uniforms = numbers[tuple(place.to(numbers.device))]
    drawn, logged = draw(logits, uniforms, sampling, wanted=None if wanted is logits else wanted)
    for row, token, value in zip(rows, drawn.tolist(), logged.tolist(), strict=True):
        row.tokens.append(token)
        row.log_probs.append(value)
    return drawn


def _reason(
    row: _Row, prompt: TokenIds, sampling: Sampling, eos_ids: Sequence[int], decode: Decode | None
) -> FinishReason | None:
    """Why a response ends with the token that was drawn last; None where it goes on."""
    if row.tokens[-1] in eos_ids:
        return "stop"
    if sampling.stop and decode is not None:
        text = decode(prompt, row.tokens)
        if before_stop(text, sampling.stop) != text:
            return "stop"
    return "length" if len(row.tokens) == sampling.max_new_tokens else None
