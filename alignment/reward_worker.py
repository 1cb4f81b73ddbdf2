"""The worker that trains a reward model: one process per GPU (or on the CPU), started by `alignment.one_node`.

It works in a folder named by the recipe, so a training that was interrupted goes on from its last checkpoint in
whatever run asks for the same reward model next:

    <run.root>/reward_training/<recipe>/
      config.json             the resolved config
      metrics.jsonl           one line per optimizer step and per validation
      checkpoints/step-*/     trainable weights and AdamW's moments, sealed like the policy's

    python -m torch.distributed.run --nproc-per-node N -m alignment.reward_worker --folder DIR
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.atomic_files import disk_errors
from alignment.config import Config, parse_config
from alignment.embedded import reward_model_folder
from alignment.lifeline import Stop
from alignment.preparation import cache_folder
from alignment.run_folder import RunFolder
from alignment.worker import ANOTHER, emit, reported_errors, sole_writer

if TYPE_CHECKING:
    from alignment.reward_training import RewardTrainer

WEIGHTS = "trained.safetensors"


def main() -> None:
    """Train to the end, from wherever the last checkpoint stands, or until asked to stop."""
    parser = argparse.ArgumentParser(description="reward model worker; started by the flow")
    parser.add_argument("--folder", required=True, help="folder of this training")
    parser.add_argument("--ends-at", type=float, help="Unix time at which to stop with a checkpoint")
    options = parser.parse_args()
    folder = RunFolder(Path(options.folder))
    with reported_errors():
        config = parse_config(folder.config.read_text())
        stop = Stop(grace_s=config.loop.stop_grace_s, ends_at=options.ends_at)
        stop.listen()
        with sole_writer(folder, wait_s=config.loop.stop_grace_s):
            work(config, folder, stop)


def work(config: Config, folder: RunFolder, stop: Stop) -> None:
    """Load model and data, go on from the last checkpoint, train."""
    from alignment.engine import restore_optimizer, start_ranks
    from alignment.reward_data import read_reward_data
    from alignment.reward_training import build_trainer, encode_examples
    from models.adapters import load_trainable
    from models.checkpoints import last_checkpoint, read_manifest, read_optimizer_state

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
        manifest = read_manifest(Path(checkpoint.uri))
        if (manifest["ranks"], manifest["zero_stage"]) == (ranks.world_size, section.zero_stage):
            restore_optimizer(trainer.engine, read_optimizer_state(Path(checkpoint.uri), ranks.rank))
        elif ranks.rank == 0:
            text = (
                f"{checkpoint.uri} was written by {manifest['ranks']} workers under ZeRO {manifest['zero_stage']} and "
                f"now there are {ranks.world_size} under ZeRO {section.zero_stage}: AdamW's moments start anew"
            )
            emit({"kind": "note", "text": text})
    _train(trainer, folder, config, stop, start=checkpoint.step if checkpoint else 0)


def trainable_model(config: Config) -> tuple[Any, Any]:
    """The base with its head, and with adapters where LoRA is asked for; and its tokenizer."""
    from models.adapters import add_lora
    from models.reward_model import load_reward_model

    section = config.reward_training
    source = reward_model_folder(config.reward.model, cache_folder(config))
    model, tokenizer = load_reward_model(str(source), seed=config.seed, num_outputs=max(1, len(section.attributes)))
    if section.lora_rank:
        model = add_lora(model, rank=section.lora_rank, alpha=section.lora_alpha, seed=config.seed)
    return model, tokenizer


def read_weights(checkpoint: Path) -> dict[str, Any]:
    """The trainable weights of a verified checkpoint."""
    from safetensors.torch import load_file

    return load_file(checkpoint / WEIGHTS)


def _train(trainer: "RewardTrainer", folder: RunFolder, config: Config, stop: Stop, *, start: int) -> None:
    """Optimizer steps start + 1 … to the end, with validations and checkpoints; saves before it stops."""
    from alignment.engine import any_rank
    from alignment.reward_training import should_stop_early, train_step, validate
    from models.checkpoints import sweep

    section, is_writer = trainer.section, trainer.ranks.rank == 0

    def record(values: Mapping[str, Any]) -> None:
        if is_writer:
            folder.append_metrics(dict(values))
            emit({**values, "kind": f"reward_{values['kind']}", "steps": trainer.total_steps})

    if is_writer:
        folder.truncate_metrics(start)
        sweep(folder.checkpoints)
    losses = [loss for step, loss in validation_losses(folder).items() if step <= start]
    for step in range(start + 1, trainer.total_steps + 1):
        if should_stop_early(losses, section.stop_after):
            break
        record(train_step(trainer, step))
        pause = step % section.val_check_interval == 0 or step == trainer.total_steps
        results = validate(trainer, step) if pause else []
        losses += [result["loss"] for result in results[:1]]
        for result in results:
            record(result)
        asked = any_rank(bool(stop.reason), trainer.ranks, trainer.engine.device)
        if pause or asked:
            _save(trainer, folder, config, step)
        if asked:
            if is_writer:
                emit({"kind": "stopped", "step": step, "reason": stop.reason or ANOTHER})
            return


def validation_losses(folder: RunFolder) -> dict[int, float]:
    """Loss by optimizer step on the first validation set, which chooses the checkpoint."""
    records = [r for r in folder.read_metrics() if r["kind"] == "validation"]
    return {r["step"]: r["loss"] for r in records if r["set"] == records[0]["set"]}


def _save(trainer: "RewardTrainer", folder: RunFolder, config: Config, step: int) -> None:
    """Write and seal the checkpoint of an optimizer step over all ranks; keep the newest and the best."""
    import torch
    from safetensors.torch import save_file

    from alignment.engine import optimizer_tensors
    from models.adapters import trainable_tensors
    from models.checkpoints import prune, removed_if_failed, seal, staging_folder, write_optimizer_state

    ranks, staging = trainer.ranks, staging_folder(folder.checkpoints, step)
    with removed_if_failed(staging):
        weights = trainable_tensors(trainer.engine.module.model)
        write_optimizer_state(staging, ranks.rank, optimizer_tensors(trainer.engine))
        if ranks.world_size > 1:
            torch.distributed.barrier()
        if ranks.rank == 0:
            with disk_errors(staging / WEIGHTS):
                save_file(weights, staging / WEIGHTS)
            details: dict[str, Any] = {"ranks": ranks.world_size, "zero_stage": trainer.section.zero_stage}
            details |= {"run_id": folder.path.name, "parent": {}}
            seal(folder.checkpoints, step, config=config.model_dump(mode="json"), details=details)
            rewards = {step: -loss for step, loss in validation_losses(folder).items()}
            prune(folder.checkpoints, keep_last=1, keep_best=1, validations=rewards)
    if ranks.world_size > 1:
        torch.distributed.barrier()


if __name__ == "__main__":
    main()
