"""What a run will need on disk, said at its start: a disk that fills up on the third day is found too late."""

import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path

from alignment.config import Config
from alignment.policy_source import base_folder
from alignment.run_folder import RunFolder
from alignment.s3 import is_s3
from models.policy import resolved_dtype
from models.tensor_shapes import tensor_shapes

WEIGHT = {"float32": 4, "bfloat16": 2}
"""Bytes of a parameter in a checkpoint."""
MOMENTS, MASTER = 8, 4
"""Bytes of AdamW's two moments of a trained parameter, and of the fp32 copy that it has under ZeRO and in bf16."""
TEXT_BYTES_PER_TOKEN = 2
"""Of a rollout's prompt and response in Parquet, compressed: some 4 characters a token."""
BYTES_PER_TOKEN_ID = 4
"""Of a response in Parquet, at the most."""


def disk_needs(config: Config, run: RunFolder, total_steps: int) -> str:
    """One line: checkpoints and rollouts of the whole run beside the free space, a warning where they do not fit."""
    folder = Path(base_folder(config))
    if not folder.is_dir():
        return f"disk: the size of {config.policy.model} is not known before it is downloaded; {_free(run)} is free"
    one = checkpoint_bytes(config, tensor_shapes(folder))
    count = min(total_steps, config.loop.keep_last + config.loop.keep_best) + 1  # one more while it is written
    rollouts, tokens = config.rollouts, config.prompts.max_prompt_tokens + config.rollouts.max_new_tokens
    rows = total_steps * rollouts.num_rollout_samples * rollouts.num_rollouts_per_prompt
    needs = one * count + rows * (tokens * TEXT_BYTES_PER_TOKEN + rollouts.max_new_tokens * BYTES_PER_TOKEN_ID)
    said = (
        f"disk: up to {shown(needs)} under {run.path} ({count} checkpoints of {shown(one)}, the rest rollouts); "
        f"{_free(run)} is free"
    )
    place = "run.workspace" if is_s3(config.run.root) else "run.root"
    if needs > shutil.disk_usage(run.path).free:
        said += f". WARNING: that will not fit: free space, lower loop.keep_last or loop.keep_best, or move {place}"
    return said


def checkpoint_bytes(config: Config, shapes: Sequence[Sequence[int]]) -> int:
    """What a checkpoint of a model with tensors of these shapes takes, at most.

    peft keeps adapters in fp32. Which matrices get none (embeddings, the head) is not looked up: all count.
    """
    dtype = resolved_dtype(config.policy.dtype, gpu=config.resources.gpu > 0)
    total, training = sum(map(prod, shapes)), config.training
    weights, trained = total * WEIGHT[dtype], total
    if training.lora_rank:
        dtype, trained = "float32", training.lora_rank * sum(sum(shape) for shape in shapes if len(shape) == 2)
        weights += trained * WEIGHT[dtype]
    has_master = training.zero_stage > 0 or dtype == "bfloat16"
    return weights + trained * (MOMENTS + MASTER * has_master)


def count_parameters(folder: Path) -> int:
    """Parameters of a model folder."""
    return sum(map(prod, tensor_shapes(folder)))


def shown(size: float) -> str:
    """Bytes as people say them: `540 MB`, `1.6 GB`."""
    for unit in ("kB", "MB"):
        size /= 1000
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 10 else f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} GB"


def _free(run: RunFolder) -> str:
    return shown(shutil.disk_usage(run.path).free)
