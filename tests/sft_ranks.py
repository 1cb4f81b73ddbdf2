"""One optimizer step of supervised fine-tuning on the ranks that alignment.one_node starts, for test_sft_training.py.

SGD with rate 1 stands in for AdamW, so that the change of the weights is the gradient.
"""

import json
import sys

import torch
from safetensors.torch import save_file

from alignment.config_training import SftSection
from alignment.engine import start_ranks
from alignment.sft_data import SftData
from alignment.sft_training import build_trainer, train_step, validate
from alignment.types import TokenSequence
from models.adapters import trainable_tensors
from tiny import random_rows, tiny_llama

LENGTHS = [9, 4, 12, 2, 7]


def sequences() -> tuple[TokenSequence, ...]:
    """Of each the first two tokens, and every third, are not counted."""
    return tuple(
        TokenSequence(tuple(row), tuple(i == n - 1 or (i > 1 and i % 3 != 0) for i in range(n)))
        for row, n in zip(random_rows(LENGTHS), LENGTHS, strict=True)
    )


def run(words: list[str]) -> None:
    """Settings as JSON, and where to save."""
    section, out = SftSection(**json.loads(words[0])), words[1]
    ranks = start_ranks(threads=1, gpu=False)
    torch.optim.AdamW = lambda parameters, **_: torch.optim.SGD(parameters, lr=1.0)
    data = SftData((sequences(),), (1.0,), sequences())
    trainer = build_trainer(tiny_llama(), section, ranks, data, seed=0)
    (before,), record = validate(trainer, 0), train_step(trainer, 1)
    weights = trainable_tensors(trainer.engine.module.policy)
    if ranks.rank == 0:
        save_file(weights, f"{out}.safetensors")
        with open(f"{out}.json", "w") as file:
            json.dump({"validation": before, "step": record}, file)


if __name__ == "__main__":
    run(sys.argv[1:])
