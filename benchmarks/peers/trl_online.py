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
ROWS = 64
"""Completions per forward and backward pass."""


def train(
    policy: Policy, texts: Sequence[str], reward: Callable[[Sequence[str]], list[float]], config: Config, method: Method
) -> None:
    """Train the policy in place on the prompts' texts, in their order. `reward` scores prompt and completion together.

    Needs requirements-trl.txt.
    """
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    arguments, trainer = (GRPOConfig, GRPOTrainer) if method == "grpo" else (RLOOConfig, RLOOTrainer)
    rollouts, training = config.rollouts, config.training
    completions = rollouts.num_rollout_samples * rollouts.num_rollouts_per_prompt

    def score(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        return reward([p + c for p, c in zip(prompts, completions, strict=True)])

    tokenizer = policy.reader.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        trainer(
            model=policy.model,
            reward_funcs=score,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            args=arguments(
                output_dir=folder,
                max_steps=config.loop.max_steps,
                learning_rate=training.lr,
                lr_scheduler_type="constant",
                warmup_steps=training.warmup_steps,
                weight_decay=training.weight_decay,
                adam_beta2=training.beta2,
                beta=training.kl_penalty,
                num_generations=rollouts.num_rollouts_per_prompt,
                max_completion_length=rollouts.max_new_tokens,
                temperature=rollouts.temperature,
                per_device_train_batch_size=min(ROWS, completions),
                gradient_accumulation_steps=max(1, completions // ROWS),
                shuffle_dataset=False,
                seed=config.seed,
                bf16=False,
                use_cpu=not torch.cuda.is_available(),
                gradient_checkpointing=False,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        ).train()
    policy.model.eval()
