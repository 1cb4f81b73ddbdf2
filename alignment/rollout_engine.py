"""The engine that a config names for training and validation rollouts: vLLM, or none besides the policy's own model.

Evaluation samples by the model itself whatever the engine: it is there already, for the KL.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from alignment.config import Config

if TYPE_CHECKING:
    from models.vllm_engine import VllmEngine


def check_engine(config: Config) -> None:
    """Raise ConfigError where the engine is not installed, before anything is trained."""
    if config.rollouts.engine == "vllm":
        from models.vllm_engine import check_installed

        check_installed()


def load_engine(config: Config, source: str | Path) -> "VllmEngine | None":
    """vLLM for the policy in `source`, where the config names it. Raises ConfigError, ModelError."""
    own = config.rollouts
    if own.engine == "in_process":
        return None
    from models.policy import resolved_dtype
    from models.vllm_engine import load_vllm

    gpu = config.resources.gpu > 0
    return load_vllm(
        source,
        gpu=gpu,
        dtype=resolved_dtype(config.policy.dtype, gpu=gpu),
        max_tokens=config.prompts.max_prompt_tokens + own.max_new_tokens,
        batch_tokens=own.batch_tokens,
        tensor_parallel=own.vllm_tensor_parallel,
    )
