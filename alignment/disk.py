"""What a run will need on disk, said at its start: a disk that fills up on the third day is found too late."""

import json
import shutil
import struct
from math import prod
from pathlib import Path

from alignment.config import Config
from alignment.embedded import policy_folder
from alignment.preparation import cache_folder
from alignment.run_folder import RunFolder

WEIGHTS, MOMENTS, MASTERS = 4, 8, 4
"""Bytes a parameter in a checkpoint: fp32 weights (half of that in bf16, on GPUs), two moments, ZeRO's fp32 copy."""
TEXT_BYTES_PER_TOKEN = 2
"""Of a rollout's prompt and response in Parquet, compressed: some 4 characters a token."""


def disk_needs(config: Config, run: RunFolder, total_steps: int) -> str:
    """One line: checkpoints and rollouts of the whole run beside the free space, a warning where they do not fit."""
    folder = Path(policy_folder(config.policy.model, cache_folder(config)))
    if not folder.is_dir():
        return f"disk: the size of {config.policy.model} is not known before it is downloaded; {_free(run)} is free"
    on_gpu = config.resources.gpu > 0
    each = WEIGHTS / 2 + MOMENTS + MASTERS if on_gpu else WEIGHTS + MOMENTS + MASTERS * (config.training.zero_stage > 0)
    one = count_parameters(folder) * each
    count = min(total_steps, config.loop.keep_last + config.loop.keep_best) + 1  # one more while it is written
    rollouts, tokens = config.rollouts, config.prompts.max_prompt_tokens + config.rollouts.max_new_tokens
    rows = total_steps * rollouts.num_rollout_samples * rollouts.num_rollouts_per_prompt
    needs = one * count + rows * tokens * TEXT_BYTES_PER_TOKEN
    said = (
        f"disk: up to {shown(needs)} under {run.path} ({count} checkpoints of {shown(one)}, the rest rollouts); "
        f"{_free(run)} is free"
    )
    if needs > shutil.disk_usage(run.path).free:
        said += ". WARNING: that will not fit: free space, lower loop.keep_last or loop.keep_best, or move run.root"
    return said


def count_parameters(folder: Path) -> int:
    """Parameters of a model folder, read from the headers of its safetensors files.

    Source: the safetensors format, 8 bytes of header length (little endian) and a JSON header.
    """
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def shown(size: float) -> str:
    """Bytes as people say them: `540 MB`, `1.6 GB`."""
    for unit in ("kB", "MB"):
        size /= 1000
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 10 else f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} GB"


def _free(run: RunFolder) -> str:
    return shown(shutil.disk_usage(run.path).free)
