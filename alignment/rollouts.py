"""Rollouts: n sampled responses to each prompt, batch by batch, so that scoring can overlap.

Each sample draws from its own stream of uniform numbers, a function of (seed, purpose, prompt, index):
the same whatever the batch, the rank or the order, and with no generator state to save.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from alignment.types import Prompt, Rollout

AnyRollout = TypeVar("AnyRollout", bound=Rollout)

if TYPE_CHECKING:
    from models.policy import Policy
    from models.sampling import Sampling


def uniforms(stream: str, count: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """`count` uniform numbers in [0, 1) that depend on the stream's name alone (Philox 4x64)."""
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:16], "big")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def generate(
    policy: "Policy",
    prompts: Sequence[Prompt],
    *,
    samples_per_prompt: int,
    sampling: "Sampling",
    batch_rows: int,
    stream: str,
    with_references: bool = False,
) -> Iterator[list[Rollout]]:
    """Rollouts of a batch of prompts at a time, prompts of similar length together.

    `stream` names the randomness, e.g. "<seed>/step-7". Every prompt yields `samples_per_prompt` rollouts
    with indices from 0, in one batch; at most `batch_rows` responses are decoded side by side. `with_references`
    a prompt's reference answer follows them, cut at `max_new_tokens` like a sample.
    """
    import torch

    from models.decoding import batches, sample
    from models.sampling import before_stop

    texts = [policy.reader.text(prompt) for prompt in prompts]
    encoded = [policy.reader.encode(text) for text in texts]
    for chosen in batches(encoded, samples_per_prompt, batch_rows):
        numbers = np.stack(
            [
                [
                    uniforms(f"{stream}/{prompts[i].prompt_id}/{k}", sampling.max_new_tokens)
                    for k in range(samples_per_prompt)
                ]
                for i in chosen
            ]
        )
        drawn = sample(
            policy.model,
            [encoded[i] for i in chosen],
            torch.from_numpy(numbers),
            sampling,
            eos_ids=policy.eos_ids,
            decode=policy.reader.decode,
        )
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
            for i, samples in zip(chosen, drawn, strict=True)
            for k, one in enumerate(samples)
        ] + [
            _reference(policy, prompts[i], texts[i], encoded[i], samples_per_prompt, sampling.max_new_tokens)
            for i in chosen
            if with_references and prompts[i].reference is not None
        ]


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
