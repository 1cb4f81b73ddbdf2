"""Peer: NeMo-Aligner's rollouts of an RS step.

One sample of each prompt at a time, in micro-batches of 16 prompts; a micro-batch's rewards are asked for, in rows
padded to the run's maximum, and awaited before the next one generates. Written with transformers' `generate`, from the
same policy's weights.
"""

from collections.abc import Sequence
from typing import Any

from alignment.config import Config
from alignment.types import Prompt, Rollout, ScoredRollout, with_reward
from benchmarks.peers.constant_padding import ConstantPaddingClient
from models.policy import Policy

PROMPTS = 16
"""Prompts of a micro-batch: NeMo-Aligner's generation_rollout_mbs."""


def scored_rollouts(
    policy: Policy, prompts: Sequence[Prompt], config: Config, client: ConstantPaddingClient, rows: Any
) -> list[ScoredRollout]:
    """All rollouts of the prompts with their rewards; `rows` turns conversations into the reward model's tokens."""
    scored: list[ScoredRollout] = []
    for index in range(config.rollouts.num_rollouts_per_prompt):
        for start in range(0, len(prompts), PROMPTS):
            rollouts = _sampled(policy, prompts[start : start + PROMPTS], index, config.rollouts.max_new_tokens)
            rewards = client.score(rows([r.conversation for r in rollouts]))
            scored += [
                with_reward(r, reward, model="padded", version="1") for r, reward in zip(rollouts, rewards, strict=True)
            ]
    return scored


def _sampled(policy: Policy, prompts: Sequence[Prompt], index: int, max_new_tokens: int) -> list[Rollout]:
    """One response to each prompt, sampled at temperature 1."""
    import torch

    from models.batching import left_pad

    texts = [policy.reader.text(prompt) for prompt in prompts]
    encoded = [policy.reader.encode(text) for text in texts]
    ids, mask = left_pad(encoded, policy.eos_ids[0])
    with torch.inference_mode():
        drawn: Any = policy.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(policy.eos_ids),
            pad_token_id=policy.eos_ids[0],
        )
    return [
        _rollout(policy, prompt, text, tokens, index, response.tolist())
        for prompt, text, tokens, response in zip(prompts, texts, encoded, drawn[:, ids.shape[1] :], strict=True)
    ]


def _rollout(
    policy: Policy, prompt: Prompt, text: str, prompt_ids: Sequence[int], index: int, response: Sequence[int]
) -> Rollout:
    end = next((i + 1 for i, token in enumerate(response) if token in policy.eos_ids), len(response))
    ids = tuple(response[:end])
    return Rollout(
        prompt_id=prompt.prompt_id,
        rollout_index=index,
        response=policy.reader.decode(prompt_ids, ids),
        finish_reason="stop" if ids and ids[-1] in policy.eos_ids else "length",
        prompt=text,
        messages=prompt.messages,
        prompt_ids=tuple(prompt_ids),
        response_ids=ids,
    )
