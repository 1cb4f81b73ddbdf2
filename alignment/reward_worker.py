"""The worker that trains a reward model: one process per GPU (or on the CPU), started by `alignment.one_node`.

It works in a folder named by the recipe, <run.root>/reward_training/<recipe>/, so a training that was interrupted goes
on from its last checkpoint in whatever run asks for the same reward model next. What lies there: see alignment.fitting.

    python -m torch.distributed.run --nproc-per-node N -m alignment.reward_worker --folder DIR
"""

import argparse
from pathlib import Path
from typing import Any

from alignment.config import Config
from alignment.embedded import reward_model_folder
from alignment.lifeline import Stop
from alignment.preparation import cache_folder
from alignment.run_folder import RunFolder
from alignment.worker import stoppable


def main() -> None:
    """Train to the end, from wherever the last checkpoint stands, or until asked to stop."""
    parser = argparse.ArgumentParser(description="reward model worker; started by the flow")
    parser.add_argument("--folder", required=True, help="folder of this training")
    parser.add_argument("--ends-at", type=float, help="Unix time at which to stop with a checkpoint")
    options = parser.parse_args()
    folder = RunFolder(Path(options.folder))
    stoppable(folder, options.ends_at, lambda config, stop: work(config, folder, stop))


def work(config: Config, folder: RunFolder, stop: Stop) -> None:
    """Load model and data, go on from the last checkpoint, train."""
    from alignment.engine import start_ranks
    from alignment.fitting import Fitting, fit, read_weights, restore_moments
    from alignment.reward_data import read_reward_data
    from alignment.reward_training import build_trainer, encode_examples, train_step, validate
    from models.adapters import load_trainable
    from models.checkpoints import last_checkpoint

    section = config.reward_training
    ranks = start_ranks(threads=config.resources.threads, gpu=config.resources.gpu > 0)
    data = read_reward_data(config)
    model, tokenizer = trainable_model(config)
    checkpoint = last_checkpoint(folder.checkpoints)
    if checkpoint:
        load_trainable(model, read_weights(Path(checkpoint.uri)))
    limit = config.reward.max_tokens
    train = encode_examples(tokenizer, data.train, limit)
    validation = {name: encode_examples(tokenizer, part, limit) for name, part in data.validation.items()}
    trainer = build_trainer(model, section, ranks, train=train, validation=validation, seed=config.seed)
    if checkpoint:
        restore_moments(checkpoint, trainer.engine, ranks, section.zero_stage)
    fitting = Fitting(
        events="reward",
        engine=trainer.engine,
        model=trainer.engine.module.model,
        ranks=ranks,
        zero_stage=section.zero_stage,
        total_steps=trainer.total_steps,
        val_check_interval=section.val_check_interval,
        stop_after=section.stop_after,
        step=lambda step: train_step(trainer, step),
        validate=lambda step: validate(trainer, step),
    )
    fit(fitting, folder, config, stop, start=checkpoint.step if checkpoint else 0)


def trainable_model(config: Config) -> tuple[Any, Any]:
    """The base with its head, and with adapters where LoRA is asked for; and its tokenizer."""
    from models.adapters import add_lora
    from models.reward_model import load_reward_model

    section = config.reward_training
    source = reward_model_folder(config.reward.model, cache_folder(config))
    model, tokenizer = load_reward_model(str(source), seed=config.seed, num_outputs=max(1, len(section.attributes)))
    if section.lora_rank:
        model = add_lora(
            model,
            task="SEQ_CLS",
            rank=section.lora_rank,
            alpha=section.lora_alpha,
            seed=config.seed,
            section="reward_training",
        )
    return model, tokenizer


if __name__ == "__main__":
    main()
