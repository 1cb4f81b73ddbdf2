"""What a vLLM engine draws from a policy whose weights change between two uses, for tests/test_vllm.py.

    python tests/vllm_samples.py POLICY OUT.json

In a process of its own, since vLLM changes torch for all that share its process.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from alignment.rollouts import generate
from alignment.types import Prompt, Rollout
from models.batching import response_batch, response_logits
from models.policy import Policy, load_policy
from models.sampling import Sampling
from models.vllm_engine import VllmEngine, load_vllm

TEXTS = [
    "Movie review: this",
    "a",
    "The sky above the port was the colour of television, tuned to a dead channel.",  # fills blocks of the prefix cache
    "a",
]
PLAIN = Sampling(max_new_tokens=12)
GREEDY = {
    "plain": replace(PLAIN, temperature=0),
    "long": replace(PLAIN, temperature=0, min_new_tokens=8),
    "penalised": replace(PLAIN, temperature=0, min_new_tokens=8, repetition_penalty=1.5),
}
FIRST_TOKENS, RESTRICTED = 2000, Sampling(max_new_tokens=1, temperature=1.5, top_k=20, top_p=0.9)


def main(folder: str, out: str) -> None:
    policy = load_policy(folder, prompt_format="text")
    engine = load_vllm(folder, gpu=False, dtype="float32", max_tokens=128, batch_tokens=2048, tensor_parallel=1)
    found: dict[str, Any] = {"before": told(policy, engine, TEXTS)}
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    found["after"] = told(policy, engine, TEXTS)
    found["alone"] = told(policy, engine, TEXTS[2:])
    found["closed"] = first_alone(policy, engine)
    third = responses(policy, None, GREEDY["plain"])[0][2][2]
    curt = replace(policy, eos_ids=(*policy.eos_ids, third))  # so that greedy responses end, too
    found["greedy"] = {
        name: [responses(curt, None, sampling), responses(curt, engine, sampling)] for name, sampling in GREEDY.items()
    }
    text = responses(policy, None, GREEDY["plain"])[0][0]
    stop = replace(GREEDY["plain"], stop=(next(c for c in text[2:] if c.isascii() and c.isprintable()),))
    found["stopped"] = [stop.stop[0], responses(policy, None, stop), responses(policy, engine, stop)]
    found["first_tokens"] = first_tokens(policy, engine)
    with open(out, "w") as file:
        json.dump(found, file)


def told(policy: Policy, engine: VllmEngine, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Two samples of each text with vLLM's log-probabilities and the trainer's; a stream is named after its place
    among `TEXTS`."""
    prompts = [policy.reader.encode(text) for text in texts]
    streams = [[f"test/{len(TEXTS) - len(texts) + i}/{k}" for k in range(2)] for i in range(len(texts))]
    drawn = engine.responses(policy.model.named_parameters(), prompts, streams, PLAIN, policy.eos_ids)
    rows = []
    for i, samples in sorted(one for found in drawn for one in found.items()):
        for sample in samples:
            batch = response_batch([prompts[i]], [sample.token_ids], pad_id=0)
            with torch.no_grad():
                logs = response_logits(policy.model, batch)[0].log_softmax(-1)
            row = {"ids": sample.token_ids, "reason": sample.finish_reason, "log_probs": sample.log_probs}
            rows.append({**row, "expected": logs.gather(-1, batch.targets[0][:, None])[:, 0].tolist()})
    return rows


def first_alone(policy: Policy, engine: VllmEngine) -> list[int]:
    """The prompts that a generator gave first, before it is closed."""
    prompts = [policy.reader.encode(text) for text in TEXTS]
    streams = [["a"], ["b"], ["c"], [f"d/{k}" for k in range(100)]]  # of which 64 are decoded side by side
    long = replace(PLAIN, min_new_tokens=PLAIN.max_new_tokens)
    drawn = engine.responses(policy.model.named_parameters(), prompts, streams, long, policy.eos_ids)
    found = sorted(next(drawn))
    drawn.close()
    return found


def responses(policy: Policy, engine: VllmEngine | None, sampling: Sampling) -> list[tuple[Any, ...]]:
    """Text, reason and tokens of a response to each text, by either engine."""
    prompts = [Prompt(str(i), ({"role": "user", "content": text},)) for i, text in enumerate(TEXTS)]
    batches = generate(
        policy, prompts, samples_per_prompt=1, sampling=sampling, batch_tokens=2048, stream="test", engine=engine
    )
    rollouts: list[Rollout] = sorted((r for batch in batches for r in batch), key=lambda r: int(r.prompt_id))
    return [(r.response, r.finish_reason, r.response_ids) for r in rollouts]


def first_tokens(policy: Policy, engine: VllmEngine) -> dict[str, list[float]]:
    """How often each token came first in many samples, and its exact probability under the restrictions."""
    prompt = policy.reader.encode(TEXTS[0])
    streams = [[f"first/{k}" for k in range(FIRST_TOKENS)]]
    drawn = engine.responses(policy.model.named_parameters(), [prompt], streams, RESTRICTED, policy.eos_ids)
    tokens = torch.tensor([s.token_ids[0] for found in drawn for s in found[0]])
    with torch.no_grad():
        logits = policy.model(torch.tensor([prompt])).logits[0, -1]
    return {
        "counts": tokens.bincount(minlength=len(logits)).tolist(),
        "probabilities": restricted(logits / RESTRICTED.temperature).tolist(),
    }


def restricted(logits: torch.Tensor) -> torch.Tensor:
    """The distribution among the top_k tokens, cut where it holds top_p: one token after the other."""
    kept, total = torch.zeros_like(logits), 0.0
    best = logits.topk(RESTRICTED.top_k)
    for probability, token in zip(best.values.softmax(-1), best.indices, strict=True):
        if total < RESTRICTED.top_p:
            kept[token], total = probability, total + float(probability)
    return kept / kept.sum()


if __name__ == "__main__":
    main(*sys.argv[1:])
