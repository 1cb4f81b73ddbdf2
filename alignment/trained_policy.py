"""What of the policy is trained: the model that is sampled itself, or another one that it follows.

Adapters are another, since rollouts run faster without them and a checkpoint is to be served as it is; so are weights
that ZeRO-3 shards, which generation would gather again for every token. Then a worker holds a whole plain copy
besides. Adding adapters to the weights and taking them out again would spare it, and change the weights a little each
time.

    step-000010/adapters/trained.safetensors    what LoRA trains; the checkpoint's weights have it merged
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.atomic_files import disk_errors
from alignment.config import Config
from alignment.engine import build_engine, keep_layer_inputs_only
from alignment.policy_source import base_folder
from alignment.types import Checkpoint
from models.adapters import add_lora, copy_weights, load_trainable, trainable_tensors
from models.packing import packing_leak
from models.policy import Policy, load_policy
from models.sequence_loss import SequenceLoss

ADAPTERS = Path("adapters") / "trained.safetensors"


def load(config: Config, source: Path | str) -> Policy:
    """A policy from a folder, on this worker's device."""
    device = "cuda" if config.resources.gpu else "cpu"
    return load_policy(source, prompt_format=config.policy.prompt_format, device=device, dtype=config.policy.dtype)


def check_recomputing(config: Config) -> None:
    """Raise ConfigError where training.gradient_checkpointing asks the policy's architecture for what it has not."""
    if config.training.gradient_checkpointing:
        architecture = AutoConfig.from_pretrained(base_folder(config), trust_remote_code=False)
        with torch.device("meta"):  # without weights
            model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=False)
            keep_layer_inputs_only(model, config.training.key)


def policy_engine(
    config: Config, policy: Policy, base_source: Path | str, checkpoint: Checkpoint | None, world_size: int
) -> Any:
    """The engine that trains `policy`, or what it follows, from `checkpoint` or the base. Raises CheckpointError."""
    training = config.training
    trained = trained_model(config, policy, base_source, checkpoint)
    # Adapters need no other base than the model that they were added to.
    has_base = training.kl_penalty > 0 and not training.lora_rank
    base = load(config, base_source).model if has_base else None
    packed = packing_leak(policy.model) == 0
    loss = SequenceLoss(trained, packed=packed, base=base, kl_penalty=training.kl_penalty)
    return build_engine(loss, training, zero_stage=training.zero_stage, world_size=world_size)


def follow(policy: Policy, engine: Any) -> None:
    """Give `policy` what the engine has trained, where that is another model than its own; all ranks must call it."""
    if engine.module.policy is not policy.model:
        copy_weights(engine.module.policy, policy.model)


def trained_model(config: Config, policy: Policy, base_source: Path | str, checkpoint: Checkpoint | None) -> Any:
    """The model to train, as `checkpoint` left it: that of `policy`, or one of its own. Raises CheckpointError."""
    training = config.training
    if training.lora_rank:
        base = load(config, base_source).model
        model = add_lora(
            base,
            task="CAUSAL_LM",
            rank=training.lora_rank,
            alpha=training.lora_alpha,
            seed=config.seed,
            section="training",
        )
        if checkpoint:
            load_trainable(model, load_file(Path(checkpoint.uri) / ADAPTERS))
        return model
    if training.zero_stage == 3:
        return load(config, checkpoint.uri if checkpoint else base_source).model
    return policy.model


def write_adapters(model: Any, staging: Path, *, is_writer: bool) -> None:
    """What LoRA trains, into a checkpoint that is being put together; all ranks must call it. Raises DiskError."""
    tensors = trainable_tensors(model)
    path = staging / ADAPTERS
    if is_writer:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path)
