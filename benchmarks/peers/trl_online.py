"""TRL's online trainers, GRPO and RLOO, on the same prompts in the same order, with the same reward.

Each step samples `num_rollouts_per_prompt` completions to each of `num_rollout_samples` prompts, as an RS step does,
and makes one optimizer step on all of them. What the config does not say is TRL's default.
"""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Literal

from alignment.config import Config
from models.policy import Policy

Method = Literal["grpo", "rloo"]
Reward = Callable[[Sequence[str], Sequence[str]], list[float]]
"""Rewards of completions, from prompts and completions."""
ROWS = 64
"""Completions per forward and backward pass, at most."""


def train(policy: Policy, texts: Sequence[str], reward: Reward, config: Config, method: Method) -> None:
    """Train the policy in place on the prompts' texts, in their order; texts / prompts a step is the number of steps.

    In float32, as TRL keeps no masters: steps of this size would be lost in bfloat16. Needs requirements-trl.txt.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    arguments, trainer = (GRPOConfig, GRPOTrainer) if method == "grpo" else (RLOOConfig, RLOOTrainer)

    def score(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        return reward(prompts, completions)

    tokenizer, stored = policy.reader.tokenizer, policy.model.dtype
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    steps = len(texts) // config.rollouts.num_rollout_samples
    with tempfile.TemporaryDirectory() as folder:
        trainer(
            model=policy.model.float(),
            reward_funcs=score,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            args=arguments(output_dir=folder, **settings(config, steps)),
        ).train()
    policy.model.to(stored).eval()  # type: ignore[arg-type]


def settings(config: Config, steps: int) -> dict[str, Any]:
    """The trainer's arguments for `steps` steps of the config."""
    rollouts, training = config.rollouts, config.training
    completions = rollouts.num_rollout_samples * rollouts.num_rollouts_per_prompt
    # Passes of one size that hold the step's completions exactly: TRL samples as many as they hold.
    rows = max(size for size in range(1, ROWS + 1) if completions % size == 0)
    return {
        "max_steps": steps,
        "learning_rate": training.lr,
        "lr_scheduler_type": "constant_with_warmup",  # "constant" reads no warmup_steps
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "adam_beta1": training.beta1,
        "adam_beta2": training.beta2,
        "max_grad_norm": training.gradient_clip,
        "beta": training.kl_penalty,
        "num_generations": rollouts.num_rollouts_per_prompt,
        "max_completion_length": rollouts.max_new_tokens,
        "temperature": rollouts.temperature,
        "top_k": rollouts.top_k,
        "top_p": rollouts.top_p,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": completions // rows,
        "shuffle_dataset": False,
        "seed": config.seed,
        "bf16": False,
        "use_cpu": not config.resources.gpu,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
