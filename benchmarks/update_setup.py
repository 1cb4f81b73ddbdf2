"""What the benchmarks of the update share: policy, ragged real examples, ours as a way, the rate of products."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from alignment.config_training import TrainingSection
from alignment.embedded import policy_folder
from alignment.errors import DataError
from alignment.types import Rollout
from benchmarks.rounds import Note, Way

TRAINING = {"lr": 1e-30, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.98, "gradient_clip": 1.0}
"""AdamW and the clipping of all ways; at this rate no weight moves."""
MAX_TOKENS = 1024
"""Longest example: TRL's default."""
ROUNDS = 5
"""Of the matrix products; the fastest counts."""


def start(cache: Path, threads: int, note: Note) -> Path:
    """The folder of the default policy; torch on `threads` threads, and a process group of this process alone."""
    start_alone(threads, gpu=False)
    return Path(policy_folder("smollm2-135m", cache, note))


def start_alone(threads: int, *, gpu: bool) -> None:
    """A process group of this process alone."""
    from alignment.engine import start_ranks

    with alone():
        start_ranks(threads=threads, gpu=gpu)


@contextmanager
def alone() -> Iterator[None]:
    """The environment of a rank without peers, as long as DeepSpeed reads it: accelerate would take it for its own."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with patch.dict(os.environ, rank):
        yield


def rollouts(policy: Path, count: int, dialogues: Path | None) -> list[Rollout]:
    """The first `count` dialogues of HH pairs with their preferred answers; without a file, IMDB demonstrations.

    None is chosen by its length but those above `MAX_TOKENS`, which are left out. Raises DataError.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    made: list[Rollout] = []
    for prompt, answer in _texts(policy.parent, dialogues):
        sides = [tuple(tokenizer(text)["input_ids"]) for text in (prompt, answer)]
        if len(sides[0]) + len(sides[1]) < MAX_TOKENS:
            made.append(_rollout(len(made), sides[0], (*sides[1], tokenizer.eos_token_id)))
        if len(made) == count:
            return made
    raise DataError(f"--examples ({count}) is more than the {len(made)} that the source holds")


def uniform_rollouts(count: int, length: int, *, vocabulary: int = 40_000) -> list[Rollout]:
    """Rollouts of random tokens, all of which but the first are the response."""
    import torch

    ids = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [_rollout(i, tuple(row[:1]), tuple(row[1:])) for i, row in enumerate(ids)]


def updating(
    policy: Path,
    examples: Sequence[Rollout],
    micro_batch_size: int,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    **settings: Any,
) -> Way:
    """One optimizer step of an RS update on all examples, as a way that gives its loss per response token.

    `settings` are further ones of the config's section `training`.
    """
    from transformers import AutoModelForCausalLM

    from alignment.engine import Ranks
    from alignment.update import update

    sizes = {"global_batch_size": len(examples), "micro_batch_size": micro_batch_size}
    training = TrainingSection.model_validate({**sizes, **TRAINING, **settings})
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype).eval().to(device)
    engine = engine_for(model, training)

    def step() -> list[float]:
        result = update(engine, examples, training, Ranks(0, 1), lr=training.lr, stream="bench")
        assert result.loss is not None
        return [result.loss]

    return step


def engine_for(model: Any, training: TrainingSection) -> Any:
    """The engine of an RS update on this process alone."""
    from alignment.engine import build_engine
    from models.packing import packing_leak
    from models.sequence_loss import SequenceLoss

    loss = SequenceLoss(model, packed=packing_leak(model) == 0)
    with alone():
        return build_engine(loss, training, zero_stage=training.zero_stage, world_size=1)


def operations(policy: Path, examples: Sequence[Rollout]) -> int:
    """6 per parameter and token: the body's for every token, the head's for those that are learned.

    An embedding of its own is looked up and costs nothing; one that is the head too counts as the head.
    """
    from transformers import AutoConfig

    from alignment.disk import count_parameters

    config = AutoConfig.from_pretrained(policy)
    head = config.vocab_size * config.hidden_size
    learned = sum(r.num_tokens for r in examples)
    tokens = learned + sum(len(r.prompt_ids) for r in examples)
    body = count_parameters(policy) - head * (1 if config.tie_word_embeddings else 2)
    return 6 * (body * tokens + head * learned)


def matrix_rate(policy: Path, rows: int, *, device: str = "cpu", dtype: str = "float32") -> float:
    """Operations per second of the matrix products of one forward pass over `rows` tokens, head included."""
    import torch
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(policy)
    keys = c.hidden_size * c.num_key_value_heads // c.num_attention_heads
    block = [(c.hidden_size, n) for n in (c.hidden_size, keys, keys, c.hidden_size, *2 * (c.intermediate_size,))]
    shapes = c.num_hidden_layers * [*block, (c.intermediate_size, c.hidden_size)] + [(c.hidden_size, c.vocab_size)]
    of: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype)}
    weights = {shape: torch.randn(shape[::-1], **of) for shape in set(shapes)}
    inputs = {width: torch.randn(rows, width, **of) for width, _ in weights}
    fastest = float("inf")
    with torch.no_grad():
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            for shape in shapes:
                made = torch.nn.functional.linear(inputs[shape[0]], weights[shape])
            made[0, 0].item()  # waits for a card that has them all in its queue
            fastest = min(fastest, time.perf_counter() - begun)
    return sum(2 * rows * a * b for a, b in shapes) / fastest


def _rollout(index: int, prompt: tuple[int, ...], response: tuple[int, ...]) -> Rollout:
    own = {"prompt_id": str(index), "rollout_index": 0, "response": ""}
    return Rollout(**own, finish_reason="stop", prompt_ids=prompt, response_ids=response)


def _texts(cache: Path, dialogues: Path | None) -> Iterator[tuple[str, str]]:
    """Prompts and answers."""
    if dialogues is None:
        from alignment.demonstrations import read_demonstrations

        demonstrations, _ = read_demonstrations("imdb:demonstrations", cache, turns="last")
        yield from ((d.messages[0]["content"], d.messages[-1]["content"]) for d in demonstrations)
        return
    from alignment.preferences import read_pairs

    pairs, _ = read_pairs(str(dialogues), dialogues.parent)
    names = {"user": "Human", "assistant": "Assistant"}
    for pair in pairs:
        turns = "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in pair.prompt)
        yield f"{turns}\n\nAssistant:", f" {pair.chosen}"
