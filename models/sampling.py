"""How a token is drawn: what a distribution is restricted to, and the inverse of its cumulative distribution.

The uniform number is the caller's, so a token is a function of its logits and its own number: neither the batch around
it nor the number of ranks has a say in its randomness.

Order and meaning of the restrictions are those of transformers' `generate`: repetition penalty, least length,
temperature, top_k, top_p, min_p. Left out on purpose: beam search, which rejection sampling has no use for.

Legend: B rows, V vocabulary, E ending tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.errors import TrainingError
from alignment.types import FinishReason

BLOCK = 128
"""Tokens whose weights are summed before any is looked at alone."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are drawn. Each field but the first leaves the distribution whole by default."""

    max_new_tokens: int
    min_new_tokens: int = 0
    """No ending token is drawn before so many others; a stop string ends a response of any length."""
    temperature: float = 1.0
    """0 is greedy: always the likeliest token."""
    top_k: int = 0
    """0 means all."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Tokens below this share of the likeliest one's probability are never drawn."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that prompt or response hold, and multiplies the negative ones."""
    stop: tuple[str, ...] = ()
    """A response ends with the token that completes one of these in its text."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One response: every token drawn, the ending one included, and why it ended.

    After a stop string the tokens hold that too, as they hold an ending token; the text is cut before it
    (`before_stop`). `log_probs` are natural logarithms of each token's probability under the policy itself, at
    temperature 1 with nothing restricted: what the trainer computes.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    log_probs: tuple[float, ...]


def adjusted(
    logits: Tensor, sampling: Sampling, *, seen: Sequence[Sequence[int]], lengths: Sequence[int], ending: Tensor
) -> Tensor:
    """Logits after the repetition penalty and without the ending tokens of responses that are too short.

    `seen` holds the tokens of each row's prompt and response, and is read for the penalty alone; `lengths` how many
    were drawn. Shape: logits (B, V), ending (E,). Returns `logits` itself where there is nothing to do.
    """
    penalty, device = sampling.repetition_penalty, logits.device
    if penalty != 1:
        width = max(map(len, seen))
        ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in seen], device=device)
        scores = logits.gather(-1, ids)
        logits = logits.scatter(-1, ids, torch.where(scores < 0, scores * penalty, scores / penalty))
    if min(lengths) < sampling.min_new_tokens:
        early = torch.tensor(lengths, device=device) < sampling.min_new_tokens
        barred = torch.zeros_like(logits[:1]).index_fill_(-1, ending, -torch.inf)
        logits = torch.where(early[:, None], logits + barred, logits)
    return logits


def draw(
    logits: Tensor, uniforms: Tensor, sampling: Sampling, *, wanted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF, and its log-probability under the policy itself.

    `wanted` are the logits to draw from where they are not the policy's (`adjusted`). Shape: logits and wanted (B, V),
    uniforms (B,) in [0, 1); returns (B,) and (B,). Raises TrainingError for NaN.
    """
    own, log_total = _weights(logits.float())
    if sampling.temperature == 0:
        tokens = (logits if wanted is None else wanted).argmax(-1)
    else:
        if wanted is not None or sampling.temperature != 1:
            del own  # before others take as much memory
            own, _ = _weights((logits if wanted is None else wanted).float() / sampling.temperature)
        tokens = _invert(_restrict(own, sampling), uniforms)
    return tokens, logits.gather(-1, tokens[:, None])[:, 0].float() - log_total


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first stop string in it; all of it where there is none."""
    found = [at for at in (text.find(one) for one in stop) if at >= 0]
    return text[: min(found)] if found else text


def _weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities up to a factor, with zeros up to whole blocks, and the logarithm of the sum of exp(logits).

    Shape: logits (B, V); returns (B, a multiple of BLOCK) and (B,). Few passes over V, and no temporary of its size:
    of 49,152 tokens and 128 rows, one is 25 MB.
    """
    rows, size = logits.shape
    weights = logits.new_empty(rows, -(-size // BLOCK) * BLOCK)
    weights[:, size:] = 0
    largest = logits.amax(-1, keepdim=True)
    torch.sub(logits, largest, out=weights[:, :size]).exp_()
    log_total = largest[:, 0] + weights.unflatten(-1, (-1, BLOCK)).sum(-1).sum(-1).log()
    if not bool(torch.isfinite(log_total).all()):
        raise TrainingError("the policy's probabilities are not finite: training diverged. Lower training.lr")
    return weights, log_total


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Where the cumulative sum of each row passes its uniform share: first the block, then the token in it."""
    blocks = weights.unflatten(-1, (-1, BLOCK))
    passed = blocks.sum(-1).double().cumsum(-1)
    target = _below(uniforms.double() * passed[:, -1], passed[:, -1])
    block = torch.searchsorted(passed, target[:, None], right=True)
    before = torch.where(block > 0, passed.gather(-1, (block - 1).clamp(min=0)), 0.0)[:, 0]
    inside = blocks[torch.arange(len(blocks), device=weights.device), block[:, 0]].double().cumsum(-1)
    token = torch.searchsorted(inside, _below(target - before, inside[:, -1])[:, None], right=True)
    return (block * BLOCK + token)[:, 0]


def _below(values: Tensor, limit: Tensor) -> Tensor:
    """Values strictly below the limit, so that rounding never lands past the last token that may be drawn."""
    return torch.minimum(values, torch.nextafter(limit, torch.zeros_like(limit))).clamp(min=0)


def _restrict(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Zero outside the k likeliest tokens, outside the smallest set of mass top_p, and below min_p of the likeliest.

    In place. Tokens as likely as the k-th are all kept. Not renormalised: top_p is a share of what top_k left.
    """
    if sampling.top_k and sampling.top_k < probabilities.shape[-1]:
        least = probabilities.topk(sampling.top_k, dim=-1).values[:, -1:]
        probabilities.masked_fill_(probabilities < least, 0)
    if sampling.top_p < 1:
        _keep_nucleus(probabilities, sampling.top_p)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities.masked_fill_(probabilities < least, 0)
    return probabilities


def _keep_nucleus(probabilities: Tensor, top_p: float) -> None:
    """Zero, in place, outside the smallest set of the likeliest tokens that holds `top_p` of the mass."""
    ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    least = top_p * ranked.sum(-1, keepdim=True)
    ranked.masked_fill_(ranked.cumsum(-1).sub_(ranked) >= least, 0)
    probabilities.scatter_(-1, ids, ranked)
