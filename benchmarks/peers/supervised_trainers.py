"""transformers' Trainer and TRL's SFTTrainer on the same tokens, with the same AdamW, one optimizer step at a time.

What is not said here is their default: batches of 8 in a random order, padded to their longest. float32, as on a CPU
bfloat16 is emulated. Construction is not timed; TRL needs requirements-trl.txt.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.types import Rollout
from benchmarks.rounds import Way
from benchmarks.update_setup import TRAINING

DEFAULT_BATCH = 8


def hf_trainer(policy: Path, examples: Sequence[Rollout]) -> Way:
    """transformers' Trainer with the collator that pads labels too."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = Trainer(
        model=_model(policy),
        args=TrainingArguments(**_settings(examples)),
        train_dataset=_rows(examples),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    return _way(trainer)


def trl_trainer(policy: Path, examples: Sequence[Rollout]) -> Way:
    """TRL's SFTTrainer, to which tokenized rows with labels are given."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=_model(policy),
        args=SFTConfig(**_settings(examples)),
        train_dataset=_rows(examples),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    return _way(trainer)


def _model(policy: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)


def _rows(examples: Sequence[Rollout]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "input_ids": [*r.prompt_ids, *r.response_ids],
                "labels": [*(-100 for _ in r.prompt_ids), *r.response_ids],
            }
            for r in examples
        ]
    )


def _settings(examples: Sequence[Rollout]) -> dict[str, Any]:
    """One epoch that is one optimizer step. Only what makes the work the same differs from the defaults."""
    return {
        "output_dir": tempfile.gettempdir(),
        "num_train_epochs": 1,
        "gradient_accumulation_steps": -(-len(examples) // DEFAULT_BATCH),
        "learning_rate": TRAINING["lr"],
        "weight_decay": TRAINING["weight_decay"],
        "adam_beta1": TRAINING["beta1"],
        "adam_beta2": TRAINING["beta2"],
        "max_grad_norm": TRAINING["gradient_clip"],
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def _way(trainer: Any) -> Way:
    return lambda: [trainer.train().training_loss]
