"""The config's sections of the trainings: the policy's update, the reward model's training, supervised fine-tuning."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from alignment.config_sections import Number, Section
from alignment.errors import ConfigError


def _one_source(value: Any) -> Any:
    """A source by itself is a mixture of one."""
    return {value: 1.0} if isinstance(value, str) else value


Mixture = Annotated[dict[str, Annotated[Number, Field(gt=0)]], BeforeValidator(_one_source), Field(min_length=1)]


class OptimizerSection(Section):
    """What every training has; a step is an RS step of the policy, an optimizer step elsewhere."""

    key: ClassVar[str]
    """The section's name in the config, for messages."""
    lr: Number = Field(2e-5, gt=0)
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate over the steps."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    min_lr: Number = Field(0.0, ge=0)
    """Learning rate at the end of a linear or cosine schedule: one step beyond the last, or at `constant_steps`."""
    constant_steps: int = Field(0, ge=0)
    """Last steps at `min_lr`, to which a linear or cosine schedule has come down before them."""
    weight_decay: Number = Field(0.01, ge=0)
    """AdamW's decoupled weight decay."""
    beta1: Number = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""
    beta2: Number = Field(0.98, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    gradient_clip: Number = Field(1.0, gt=0)
    """Largest global gradient norm."""
    global_batch_size: int = Field(8, ge=1)
    """Examples per optimizer step, over all workers: responses, demonstrations, preference pairs or rated answers."""
    micro_batch_size: int = Field(8, ge=1)
    """Examples per forward and backward pass on one worker."""
    gradient_checkpointing: bool = False
    """Keep each layer's input alone and compute the rest again for the backward pass: less memory, a third slower."""
    offload_optimizer: bool = False
    """Keep AdamW's state in host memory and step there, on GPUs under ZeRO 1 to 3: slower, 12 bytes a weight less."""

    def check_schedule(self, total_steps: int) -> None:
        """Raise ConfigError where warm-up and constant steps leave no step of a training at its rate."""
        if self.constant_steps and self.warmup_steps + self.constant_steps >= total_steps:
            raise ConfigError(
                f"{self.key}.warmup_steps ({self.warmup_steps}) + {self.key}.constant_steps ({self.constant_steps}) "
                f"must be < the {total_steps} steps of the training: lower one of them, or train for longer"
            )


class TrainingSection(OptimizerSection):
    key = "training"
    sft_mix: str | None = None
    """Demonstrations that RS steps train on too, in the formats of `sft.train`; null trains on selected responses."""
    num_sft_examples: int = Field(8, ge=1)
    """Demonstrations of `sft_mix` in each RS step."""
    kl_penalty: Number = Field(0.0, ge=0)
    """Weight of the KL to the base, per response token, in the update's loss; 0 spares the base's forward pass."""
    lora_rank: int = Field(0, ge=0)
    """Rank of LoRA adapters on all linear layers, merged in what is sampled and saved; 0 trains all weights."""
    lora_alpha: int = Field(16, ge=1)
    """LoRA's scale: adapters are multiplied by alpha / rank."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage; 3 shards the weights over the workers, each of which samples from a whole copy."""
    offload_during_rollouts: bool = False
    """Keep AdamW's state in host memory except for updates, on GPUs: up to 12 bytes a weight more for rollouts."""


class RewardTrainingSection(OptimizerSection):
    key = "reward_training"
    train: str | None = "imdb:pairs"
    """Preference pairs (rated answers for `regression`) to train on; null serves `reward.model` as it is."""
    num_train: int = Field(1024, ge=1)
    """Examples read from `train`, in its order."""
    validation_share: Number = Field(0.0, ge=0, lt=1)
    """Share of the prompts of `train` set aside to choose the checkpoint; without validation the last is exported."""
    validation: tuple[str, ...] = ()
    """Sets of preference pairs that are validated on too; the share, or else the first of these, chooses."""
    test_share: Number = Field(0.0, ge=0, lt=1)
    """Share of the prompts of `train` set aside to measure the result: its accuracy is then the reward model's."""
    held_out: str | None = "imdb:held_out_pairs"
    """Preference pairs that measure the result; without a test share, their accuracy is the reward model's."""
    num_held_out: int = Field(256, ge=1)
    """Pairs read from `validation`, `held_out` and `also_measure` each, in their order; as many of the judge's."""
    also_measure: tuple[str, ...] = ()
    """Further sets of preference pairs that are measured and reported, each by its name."""
    loss: Literal["bradley_terry", "margin", "scaled", "regression"] = "bradley_terry"
    """Loss: `margin` and `scaled` use the pairs' margins, `regression` the ratings (see models/reward_losses.py)."""
    attributes: tuple[str, ...] = ()
    """Names of the ratings that `regression` learns, one output each."""
    merge_weights: tuple[Number, ...] = ()
    """Weight of each attribute in the reward; empty weighs them equally, summing to 1."""
    epochs: int = Field(1, ge=1)
    """Passes over the training examples."""
    val_check_interval: int = Field(50, ge=1)
    """Optimizer steps between validations, each with a checkpoint that a later run can go on from."""
    stop_after: int | None = Field(None, ge=1)
    """Validations without a lower validation loss after which training ends early; null never."""
    lora_rank: int = Field(0, ge=0)
    """Rank of LoRA adapters on all linear layers, merged in the export; 0 trains all weights."""
    lora_alpha: int = Field(16, ge=1)
    """LoRA's scale: adapters are multiplied by alpha / rank."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage; 3 shards the weights over the workers, for a model that one GPU cannot hold."""
    lr: Number = Field(2e-4, gt=0)
    """Peak learning rate of the reward model."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate over the optimizer steps."""
    beta2: Number = Field(0.999, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    global_batch_size: int = Field(32, ge=1)
    """Examples per optimizer step, over all workers."""
    micro_batch_size: int = Field(32, ge=1)
    """Examples per forward and backward pass on one worker."""


class SftSection(OptimizerSection):
    key = "sft"
    train: Mixture = Field({"imdb:demonstrations": 1.0})
    """Demonstrations to learn from: one source, or several with weights, their shares of the examples read."""
    num_train: int | None = Field(None, ge=1)
    """Examples read from each source of `train`, in its order; null reads all."""
    validation: str | None = None
    """Demonstrations whose loss chooses the checkpoint."""
    validation_share: Number = Field(0.0, ge=0, lt=1)
    """Share of the prompts of `train` set aside to choose the checkpoint instead; without either it is the last."""
    num_validation: int = Field(256, ge=1)
    """Examples read from `validation`, in its order."""
    turns: Literal["all", "last"] = "all"
    """The assistant's turns that the loss counts in a conversation; NeMo's mask takes out more."""
    chat_template: str | None = None
    """Jinja template that takes the place of the tokenizer's own and stays with the result; null keeps its own."""
    max_tokens: int = Field(512, ge=2)
    """Longest example in tokens; longer examples are left out and listed."""
    packing: Literal["none", "rows"] = "none"
    """`rows` lays a micro-batch's examples end to end, apart from each other, instead of padding each; same loss."""
    epochs: int = Field(1, ge=1)
    """Passes over as many examples as the sources of `train` hold together."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps after which training ends, if before `epochs`; null for no bound."""
    val_check_interval: int = Field(50, ge=1)
    """Optimizer steps between validations, each with a checkpoint."""
    keep_best: int = Field(1, ge=1)
    """Best checkpoints by validation loss kept, besides the newest."""
    lora_rank: int = Field(0, ge=0)
    """Rank of LoRA adapters on all linear layers, merged in the result; 0 trains all weights."""
    lora_alpha: int = Field(16, ge=1)
    """LoRA's scale: adapters are multiplied by alpha / rank."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage; 3 shards the weights over the workers."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate over the optimizer steps."""
    global_batch_size: int = Field(32, ge=1)
    """Examples per optimizer step, over all workers."""
