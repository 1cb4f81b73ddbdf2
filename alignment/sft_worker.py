"""The worker of supervised fine-tuning: one process per GPU (or on the CPU), started by `alignment.one_node`.

It works in the run's folder, on the examples that were written there; what else lies there: see alignment.fitting.

    python -m torch.distributed.run --nproc-per-node N -m alignment.sft_worker --folder DIR
"""

import argparse
from pathlib import Path
from typing import Any

from alignment.config import Config
from alignment.lifeline import Stop
from alignment.policy_source import base_folder
from alignment.run_folder import RunFolder
from alignment.worker import stoppable


def main() -> None:
    """Train to the end, from wherever the last checkpoint stands, or until asked to stop."""
    parser = argparse.ArgumentParser(description="worker of supervised fine-tuning; started by the flow")
    parser.add_argument("--folder", required=True, help="run folder")
    parser.add_argument("--ends-at", type=float, help="Unix time at which to stop with a checkpoint")
    options = parser.parse_args()
    folder = RunFolder(Path(options.folder))
    stoppable(folder, options.ends_at, lambda config, stop: work(config, folder, stop))


def work(config: Config, folder: RunFolder, stop: Stop) -> None:
    """Load policy and examples, go on from the last checkpoint, train."""
    from alignment.engine import start_ranks
    from alignment.fitting import Fitting, fit, read_weights, restore_moments
    from alignment.sft_data import read_examples
    from alignment.sft_training import build_trainer, train_step, validate
    from models.adapters import load_trainable
    from models.checkpoints import last_checkpoint
    from models.packing import check_packing

    own = config.sft
    ranks = start_ranks(threads=config.resources.threads, gpu=config.resources.gpu > 0)
    model, _ = trainable_policy(config)
    checkpoint = last_checkpoint(folder.checkpoints)
    if checkpoint:
        load_trainable(model, read_weights(Path(checkpoint.uri)))
    trainer = build_trainer(model, own, ranks, read_examples(config, folder.path), seed=config.seed)
    if checkpoint:
        restore_moments(checkpoint, trainer.engine, ranks, own.zero_stage)
    policy = trainer.engine.module.policy
    if own.packing == "rows":
        check_packing(policy)
    fitting = Fitting(
        events="sft",
        engine=trainer.engine,
        model=policy,
        ranks=ranks,
        zero_stage=own.zero_stage,
        total_steps=trainer.total_steps,
        val_check_interval=own.val_check_interval,
        keep_best=own.keep_best,
        validates_base=trainer.data.validation is not None,
        step=lambda step: train_step(trainer, step),
        validate=lambda step: validate(trainer, step),
    )
    fit(fitting, folder, config, stop, start=checkpoint.step if checkpoint else 0)


def trainable_policy(config: Config) -> tuple[Any, Any]:
    """The base, with adapters where LoRA is asked for; and its tokenizer, with the chat template that it gets."""
    from models.adapters import add_lora
    from models.policy import load_policy

    own = config.sft
    policy = load_policy(
        base_folder(config),
        prompt_format=config.policy.prompt_format,
        device="cuda" if config.resources.gpu else "cpu",
        dtype=config.policy.dtype,
        chat_template=own.chat_template,
    )
    model: Any = policy.model
    if own.lora_rank:
        model = add_lora(
            model, task="CAUSAL_LM", rank=own.lora_rank, alpha=own.lora_alpha, seed=config.seed, section="sft"
        )
    return model, policy.reader.tokenizer


if __name__ == "__main__":
    main()
