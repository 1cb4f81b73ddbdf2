"""RS updates on the ranks that alignment.one_node starts; saves weights and result for tests/test_update.py.

One update after the other, their words parted by `--next`. With `--plain-gradient` the weights that are saved are the
gradient, and with `--sgd` beside it they are those of SGD with rate 1; with `--rows N` the first N rollouts alone are
trained on. With a `kl_penalty` the base is another model, or under LoRA
the one without its adapters. With `--tied` the output head is the embedding; with `--padded` no sequences are packed;
with `--copy` the weights are those of a plain copy that follows. With `--dropout N` the attention drops, after N
numbers were drawn from torch's generator.
"""

import atexit
import json
import os
import sys
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save_file

from alignment import engine as engines
from alignment.config_training import TrainingSection
from alignment.types import Rollout
from alignment.update import update
from models.adapters import add_lora, copy_weights, trainable_tensors
from models.sequence_loss import SequenceLoss
from tiny import random_rows, tiny_llama

BASE_SEED = 5
PROMPT_LENGTHS, RESPONSE_LENGTHS = [3, 9, 5, 1, 7], [4, 12, 1, 6, 2]


def rollouts(count: int = len(PROMPT_LENGTHS)) -> list[Rollout]:
    prompts, responses = random_rows(PROMPT_LENGTHS), random_rows(RESPONSE_LENGTHS, seed=1)
    return [
        Rollout(
            prompt_id=str(i), rollout_index=0, response="", finish_reason="length",
            prompt_ids=tuple(p), response_ids=tuple(r),
        )
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
    ][:count]  # fmt: skip


class GradientAsWeights(torch.optim.Optimizer):
    """Stands in for AdamW: a step puts gradients in the weights' place, where no rounding of a difference hides them.

    As AdamW's, a step with rate 0 changes nothing: DeepSpeed takes one on zeros as it starts.
    """

    def __init__(self, parameters: Any, **_: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["lr"] and parameter.grad is not None:
                    parameter.copy_(parameter.grad)


def fail_if_compiled() -> None:
    """Whatever torch.compile, or a library by it, would have traced."""
    traced = sys.modules.get("torch._dynamo.utils")
    if traced is not None and traced.counters["frames"]:
        raise RuntimeError(f"torch.compile was used: {dict(traced.counters['frames'])} frames")


def fail_if_ranks_are_joined() -> None:
    """A process group that is still there when the interpreter ends may abort the process."""
    if torch.distributed.is_initialized():
        os._exit(3)


def main() -> None:
    atexit.register(fail_if_ranks_are_joined)  # before `start_ranks`: so it runs after what that one registers
    for words in " ".join(sys.argv[1:]).split(" --next "):
        run(words.split())
    fail_if_compiled()


def run(words: list[str]) -> None:
    """Settings as JSON, where to save, steps, options."""
    settings, out, steps, plain = json.loads(words[0]), words[1], int(words[2]), "--plain-gradient" in words
    training = TrainingSection(**settings)
    ranks = engines.start_ranks(threads=1, gpu=False)
    if plain:
        sgd = "--sgd" in words
        torch.optim.AdamW = (lambda parameters, **_: torch.optim.SGD(parameters, lr=1.0)) if sgd else GradientAsWeights
    model = tiny_llama(tied="--tied" in words)
    if "--dropout" in words:
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        torch.rand(int(words[-1]))  # what a process may have drawn before
    base = tiny_llama(BASE_SEED) if training.kl_penalty and not training.lora_rank else None
    if training.lora_rank:
        model = with_adapters(model, training)
    loss = SequenceLoss(model, packed="--padded" not in words, base=base, kl_penalty=training.kl_penalty)
    engine = engines.build_engine(loss, training, zero_stage=training.zero_stage, world_size=ranks.world_size)
    count = int(words[words.index("--rows") + 1]) if "--rows" in words else len(PROMPT_LENGTHS)
    for _ in range(steps):
        result = update(engine, rollouts(count), training, ranks, lr=1.0 if plain else training.lr, stream="test")
    weights = trainable_tensors(model)
    if "--copy" in words:
        copy = tiny_llama(BASE_SEED)
        copy_weights(model, copy)
        weights = copy.state_dict()
    if ranks.rank == 0:
        save_file(weights, f"{out}.safetensors")
        with open(f"{out}.json", "w") as file:
            json.dump(asdict(result), file)


def with_adapters(model: Any, training: TrainingSection) -> Any:
    """Adapters whose two factors are both other than zero, so that the policy is not its base."""
    adapted = add_lora(
        model, task="CAUSAL_LM", rank=training.lora_rank, alpha=training.lora_alpha, seed=0, section="training"
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return adapted


def plain_gradient(rows, kl_penalty=0.0, model=None, base=None, dtype=torch.float64):
    """Gradient, loss and KL per response token: each row alone, no padding. `base` gives logits of ids."""
    model, base = (model or tiny_llama()).to(dtype), base or tiny_llama(BASE_SEED).to(dtype)
    tokens = sum(len(r.response_ids) for r in rows)
    loss, kl = torch.zeros(2, dtype=dtype)
    for r in rows:
        ids, responses = torch.tensor([r.prompt_ids + r.response_ids]), slice(len(r.prompt_ids) - 1, -1)
        logits = model(ids).logits[0, responses]
        loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(r.response_ids), reduction="sum") / tokens
        p, q = (torch.distributions.Categorical(logits=x) for x in (logits, base(ids).logits[0, responses].detach()))
        kl = kl + torch.distributions.kl_divergence(p, q).sum() / tokens
    (loss + kl_penalty * kl).backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return gradient, (loss + kl_penalty * kl).item(), kl.item()


if __name__ == "__main__":
    main()
