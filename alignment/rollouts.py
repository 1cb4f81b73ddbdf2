"""Rollouts: n sampled responses to each prompt, some prompts at a time, so that scoring can overlap.

Each sample draws from its own stream of uniform numbers, a function of (seed, purpose, prompt, index):
the same whatever the batch, the rank or the order, and with no generator state to save.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from alignment.errors import ConfigError, DataError
from alignment.types import Prompt, Rollout

AnyRollout = TypeVar("AnyRollout", bound=Rollout)

if TYPE_CHECKING:
    from models.policy import Policy
    from models.sampling import Sample, Sampling
    from models.vllm_engine import VllmEngine


def uniforms(stream: str, count: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """`count` uniform numbers in [0, 1) that depend on the stream's name alone (Philox 4x64)."""
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:16], "big")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


@dataclass(slots=True)
class Lowered:
    """Tokens that memory was found to hold, whatever `rollouts.batch_tokens` is: what later rollouts begin with."""

    tokens: int = sys.maxsize


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def generate(
    policy: "Policy",
    prompts: Sequence[Prompt],
    *,
    samples_per_prompt: int,
    sampling: "Sampling",
    batch_tokens: int,
    stream: str,
    with_references: bool = False,
    on_note: Callable[[str], None] = _to_stderr,
    lowered: Lowered | None = None,
    engine: "VllmEngine | None" = None,
) -> Iterator[list[Rollout]]:
    """Rollouts of some prompts at a time, as they are done: all of a prompt's in one list, with indices from 0.

    By the policy's own model, or by `engine` with the model's weights, which has its own bound of tokens.

    `stream` names the randomness, e.g. "<seed>/step-7". `batch_tokens` bounds the tokens that are kept at once, of
    prompts and of the longest responses that may come; memory that does not hold them is told to `on_note`, and
    what is not done begins anew with half of them, a bound that `lowered` hands from one call to the next.
    `with_references` a prompt's reference answer follows its rollouts, cut at `max_new_tokens` like a sample.
    Raises ConfigError, DataError, ModelError, TrainingError.
    """
    from models.sampling import before_stop

    texts = [policy.reader.text(prompt) for prompt in prompts]
    encoded = [policy.reader.encode(text) for text in texts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise DataError(f"prompt {prompt.prompt_id} has no tokens for the policy to go on from: leave it out")
    special, stop = _special_first(policy, sampling.stop)
    sampling, eos_ids = replace(sampling, stop=stop), tuple(dict.fromkeys((*policy.eos_ids, *special)))
    streams = [[f"{stream}/{prompt.prompt_id}/{k}" for k in range(samples_per_prompt)] for prompt in prompts]
    if engine is None:
        responses = _responses(policy, encoded, streams, sampling, eos_ids, batch_tokens, lowered or Lowered(), on_note)
    else:
        from models.vllm_engine import named_weights

        responses = engine.responses(named_weights(policy.model), encoded, streams, sampling, eos_ids)
    for found in responses:
        yield [
            Rollout(
                prompt_id=prompts[i].prompt_id,
                rollout_index=k,
                response=before_stop(policy.reader.decode(encoded[i], one.token_ids), sampling.stop),
                finish_reason=one.finish_reason,
                prompt=texts[i],
                messages=prompts[i].messages,
                prompt_ids=tuple(encoded[i]),
                response_ids=one.token_ids,
                log_probs=one.log_probs,
            )
            for i, samples in found.items()
            for k, one in enumerate(samples)
        ] + [
            _reference(policy, prompts[i], texts[i], encoded[i], samples_per_prompt, sampling.max_new_tokens)
            for i in found
            if with_references and prompts[i].reference is not None
        ]


def _responses(
    policy: "Policy",
    prompts: Sequence[Sequence[int]],
    streams: Sequence[Sequence[str]],
    sampling: "Sampling",
    eos_ids: Sequence[int],
    asked: int,
    lowered: Lowered,
    on_note: Callable[[str], None],
) -> Iterator[dict[int, list["Sample"]]]:
    """All samples of some prompts at a time, by the prompt's index; with ever fewer side by side as memory demands."""
    import torch

    from models.decoding import respond
    from models.memory import is_out_of_memory, release_memory

    numbers = torch.from_numpy(np.array([[uniforms(one, sampling.max_new_tokens) for one in row] for row in streams]))
    left = list(range(len(prompts)))
    while left:
        needed = max(len(prompts[i]) for i in left) + sampling.max_new_tokens
        batch_tokens = min(asked, max(needed, lowered.tokens))
        done: set[int] = set()
        try:
            for found in respond(
                policy.model,
                [prompts[i] for i in left],
                numbers[left],
                sampling,
                eos_ids=eos_ids,
                batch_tokens=batch_tokens,
                decode=policy.reader.decode,
            ):
                done |= {left[i] for i in found}
                yield {left[i]: samples for i, samples in found.items()}
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if batch_tokens <= needed:
                raise ConfigError(
                    f"one response takes more memory than there is, {needed} tokens with its prompt: lower "
                    "rollouts.max_new_tokens or prompts.max_prompt_tokens, or use a smaller policy.model"
                ) from error
        left = [i for i in left if i not in done]
        if left:
            release_memory()
            held = min(batch_tokens, sum(len(prompts[i]) + len(streams[i]) * sampling.max_new_tokens for i in left))
            lowered.tokens = max(needed, held // 2)
            on_note(
                f"out of memory while generating: {len(left)} prompts begin anew with {lowered.tokens} tokens side by "
                "side; set rollouts.batch_tokens to that"
            )


def _special_first(policy: "Policy", stop: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """Stop strings that are a special token, by its id, and the others: a text has no special tokens to be found in."""
    added = policy.reader.tokenizer.added_tokens_decoder
    special = {str(token): i for i, token in added.items() if token.special}
    for one in stop:
        within = [token for token in special if token in one]
        if within and one not in special:
            raise ConfigError(
                f"rollouts.stop ({one!r}) would never be found: {within[0]} is a special token of the policy, which no "
                "response's text holds. Name the token by itself, or leave it out"
            )
    return [special[one] for one in stop if one in special], tuple(one for one in stop if one not in special)


def _reference(
    policy: "Policy", prompt: Prompt, text: str, prompt_ids: Sequence[int], rollout_index: int, max_new_tokens: int
) -> Rollout:
    """A prompt's reference answer as a rollout: it ends with the ending token where there is room for that."""
    whole = [*policy.reader.encode_more(prompt.reference or ""), policy.eos_ids[0]]
    ids = whole[:max_new_tokens]
    return Rollout(
        prompt_id=prompt.prompt_id,
        rollout_index=rollout_index,
        response=policy.reader.decode(prompt_ids, ids),
        finish_reason="stop" if len(ids) == len(whole) else "length",
        prompt=text,
        messages=prompt.messages,
        prompt_ids=tuple(prompt_ids),
        response_ids=tuple(ids),
        is_reference=True,
    )


def in_prompt_order(rollouts: Sequence[AnyRollout], prompts: Sequence[Prompt]) -> list[AnyRollout]:
    """Rollouts sorted by their prompt's place in `prompts`, then by index: the order of all files and decisions."""
    place = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
    return sorted(rollouts, key=lambda r: (place[r.prompt_id], r.rollout_index))
