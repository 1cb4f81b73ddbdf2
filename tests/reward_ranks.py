"""One optimizer step of a reward model on the ranks that alignment.one_node starts, for tests/test_reward_training.py.

SGD with rate 1 stands in for AdamW, so that the change of the weights is the gradient.
"""

import json
import sys

import torch
from safetensors.torch import save_file

from alignment.config_training import RewardTrainingSection
from alignment.engine import start_ranks
from alignment.reward_training import Encoded, build_trainer, train_step, validate
from models.adapters import trainable_tensors
from reward_fixtures import tiny_reward_model
from tiny import random_rows

LENGTHS = [3, 9, 5, 12, 7]
"""Of the chosen texts in tokens; the rejected ones are one longer."""


def pairs() -> tuple[Encoded, ...]:
    chosen, rejected = random_rows(LENGTHS), random_rows([n + 1 for n in LENGTHS], seed=1)
    return tuple(Encoded((tuple(c), tuple(r)), None, ()) for c, r in zip(chosen, rejected, strict=True))


def model():
    """The tiny reward model without dropout, which would differ from rank to rank."""
    tiny, _ = tiny_reward_model()
    for module in tiny.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return tiny


def run(words: list[str]) -> None:
    """Settings as JSON, and where to save."""
    section, out = RewardTrainingSection(**json.loads(words[0])), words[1]
    ranks = start_ranks(threads=1, gpu=False)
    torch.optim.AdamW = lambda parameters, **_: torch.optim.SGD(parameters, lr=1.0)
    trainer = build_trainer(model(), section, ranks, train=pairs(), validation={"pairs": pairs()}, seed=0)
    (before,), record = validate(trainer, 0), train_step(trainer, 1)
    weights = trainable_tensors(trainer.engine.module.model)
    if ranks.rank == 0:
        save_file(weights, f"{out}.safetensors")
        with open(f"{out}.json", "w") as file:
            json.dump({"validation": before, "step": record}, file)


if __name__ == "__main__":
    run(sys.argv[1:])
