"""The sections of the config: each field with its default, its bounds, its unit and what it does.

`alignment.config` puts them together, loads presets and checks across sections.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator


def _exact_float(value: Any) -> Any:
    """YAML reads `1e-6` as a string; a number written that way is meant as a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _name_text(value: Any) -> Any:
    """YAML reads `2` as a number; a version, or a run's id, is a name that happens to be one."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _clock_text(value: Any) -> Any:
    """YAML reads `1:00:00:00` as a number in base 60, which is no duration."""
    if isinstance(value, int):
        raise ValueError("write it as quoted text, DD:HH:MM:SS, e.g. '00:03:45:00' for 3 h 45 min")
    return value


def _one_source(value: Any) -> Any:
    """A source by itself is a mixture of one."""
    return {value: 1.0} if isinstance(value, str) else value


Number = Annotated[float, BeforeValidator(_exact_float)]
Name = Annotated[str, BeforeValidator(_name_text)]
Clock = Annotated[str, BeforeValidator(_clock_text), Field(pattern=r"^\d+:[0-5]?\d:[0-5]?\d:[0-5]?\d$")]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(/[0-9]+)?$")]
Mixture = Annotated[dict[str, Annotated[Number, Field(gt=0)]], BeforeValidator(_one_source), Field(min_length=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are an error, and nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), serialize_by_alias=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def no_truth_values(cls, value: Any) -> Any:
        """YAML reads `yes`, `no`, `on` and `off` as truth values, which would pass for 1 and 0."""
        if isinstance(value, bool):
            raise ValueError("is a truth value to YAML: write a number, or text in quotes")
        return value


class RunSection(Section):
    root: str = "runs"
    """Folder that holds one folder per run, the exports and the cache of converted models."""


class ResumeSection(Section):
    from_: Name | None = Field(None, alias="from")
    """A run to go on from in a new run of another config: its id under run.root or its folder; null: the base."""


class PolicySection(Section):
    model: str = "smollm2-135m"
    """`smollm2-135m` (embedded), `tiny` (random weights, for tests), a model folder, or a hub name."""
    prompt_format: Literal["text", "chat"] = "text"
    """`text` continues the prompt verbatim; `chat` renders it with the tokenizer's chat template."""


class PromptsSection(Section):
    train: str = "imdb:prompts"
    """Source of training prompts: `imdb:prompts`, `toy:prompts`, a .jsonl or .jsonl.gz file, s3:// or hf://."""
    held_out: str = "imdb:held_out_prompts"
    """Source of validation and evaluation prompts; the two take disjoint parts of a seeded permutation."""
    max_prompt_tokens: int = Field(64, ge=1)
    """Longest prompt in the policy's tokens; longer ones are left out and listed in excluded_prompts.jsonl."""


class RolloutsSection(Section):
    num_rollout_samples: int = Field(8, ge=1)
    """Prompts per RS step."""
    num_rollouts_per_prompt: int = Field(8, ge=1)
    """Responses sampled per prompt."""
    max_new_tokens: int = Field(24, ge=1)
    """Longest response, in tokens, the ending token included."""
    temperature: Number = Field(1.0, gt=0)
    """Softmax temperature of training rollouts; evaluation always samples at 1."""
    top_k: int = Field(0, ge=0)
    """Sample among the k most probable tokens; 0 means all."""
    top_p: Number = Field(1.0, gt=0, le=1)
    """Sample among the smallest set of tokens with this probability; 1 means all."""
    references: Literal["ignore", "join"] = "ignore"
    """`join`: a prompt's reference answer, where it has one, is scored beside the samples and may be selected."""
    batch_rows: int = Field(128, ge=1)
    """Responses decoded side by side on one worker: bounds memory."""


class SelectionSection(Section):
    strategy: Literal["top_per_prompt", "top_k_overall", "random_per_prompt", "random_k_overall"] = "top_per_prompt"
    """How responses are chosen for training; the random ones are controls."""
    top_n_rollouts: int = Field(1, ge=1)
    """Responses kept per prompt (`*_per_prompt` strategies)."""
    top_k: int | None = Field(None, ge=1)
    """Responses kept per RS step (`*_overall` strategies)."""
    min_reward: Number | None = None
    """Responses below this reward are never kept; null for no bound."""
    truncated: Literal["allow", "prefer_finished", "refuse"] = "allow"
    """Responses cut at max_new_tokens: allow, keep only where no finished one exists, or refuse."""


class RewardSection(Section):
    model: str = "all-minilm-l6-v2"
    """Encoder, causal LM or sequence classifier: `all-minilm-l6-v2` (embedded), `tiny`, a folder, or a hub name."""
    template: str = "{% for m in messages %}{{ m.content }}{% endfor %}"
    """Jinja template that turns `messages` into the text the reward model reads; travels in the export."""
    max_tokens: int = Field(64, ge=1)
    """Longest conversation in the reward model's tokens."""
    over_long: Literal["cut", "refuse"] = "cut"
    """A longer conversation loses the start of its prompt and then of the response, or is an error; each is counted."""
    output: Literal["raw", "standardized"] = "raw"
    """`standardized`: minus the mean of the held-out rewards, over their deviation, both as measured for the export."""
    name: str = Field("reward_model", pattern=r"^[A-Za-z0-9_-]+$")
    """Name of the model in the Triton repository."""
    repository: str | None = None
    """Triton model repository that exports go to; null means <run.root>/triton_repo."""
    url: str | None = None
    """host:port of an external Triton's gRPC; null starts one on loopback for as long as a task scores."""
    version: Name = Field("", pattern=r"^\d*$")
    """Version to score with, as it was exported; empty takes this recipe's (or the server's newest with `url`)."""
    grpc_port: int = Field(0, ge=0, le=65535)
    """Loopback port of the local server's gRPC; 0 picks a free one."""
    timeout_s: Number = Field(60.0, gt=0)
    """Seconds a scoring request may take, retries apart."""
    patience_s: Number = Field(300.0, ge=0)
    """Seconds that a reward server may be gone or overloaded before scoring gives up and the run stops."""
    token_budget: int = Field(1024, ge=1)
    """Padded tokens per forward pass inside the server."""
    instances: int = Field(1, ge=1)
    """Copies of the model on each GPU of the server, or on its CPU; written when a name is first exported."""
    device_map: Literal["auto"] | None = None
    """`auto` lays one copy over all GPUs of the server, for a model that one GPU cannot hold."""
    dtype: Literal["float32", "weights"] = "float32"
    """What a GPU serves it in: float32, or the type of the stored weights. A CPU computes in float32."""
    runtime: Literal["torch", "onnxruntime"] = "torch"
    """What computes the forward pass; `onnxruntime` takes requirements-onnx.txt, an encoder, and float32."""


class RewardEnsembleSection(Section):
    members: dict[ModelName, Number] = {}
    """Models whose scores make the reward together, `name` or `name/version`, each with its weight; reward.name is one.
    They lie in reward.repository or behind reward.url; without a version the newest. Empty: reward.name alone."""
    combine: Literal["weighted_sum", "vote"] = "weighted_sum"
    """`weighted_sum` of the scores, which must have one scale (reward.output=standardized gives it); `vote`: the
    weighted share of the prompt's other responses that a response beats. alignment/ensemble.py defines both."""
    shadows: tuple[ModelName, ...] = ()
    """Models that score the same rollouts, are reported, raise the judge's alarm and never select."""


class OptimizerSection(Section):
    """What every training has; a step is an RS step of the policy, an optimizer step elsewhere."""

    lr: Number = Field(2e-5, gt=0)
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate over the steps."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    min_lr: Number = Field(0.0, ge=0)
    """Learning rate at the end of a linear or cosine schedule."""
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


class RewardTrainingSection(OptimizerSection):
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
    train: Mixture = {"imdb:demonstrations": 1.0}
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
    """Longest example in tokens, and length of a packed row; longer examples are left out and listed."""
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


class JudgeSection(Section):
    train_pairs: str = "rotten_tomatoes:pairs"
    """Preference pairs that train the judge; no text of the reward model's."""
    held_out_pairs: str = "imdb:held_out_pairs"
    """Preference pairs that measure the judge's accuracy."""
    num_train_pairs: int = Field(4096, ge=1)
    """Pairs read from `train_pairs`, in its order."""


class TrainingSection(OptimizerSection):
    sft_mix: str | None = None
    """Demonstrations that RS steps train on too, in the formats of `sft.train`; null trains on selected responses."""
    num_sft_examples: int = Field(8, ge=1)
    """Demonstrations of `sft_mix` in each RS step."""
    kl_penalty: Number = Field(0.0, ge=0)
    """Weight of the KL to the base, per response token, in the update's loss; 0 spares the base's forward pass."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed ZeRO stage."""


class LoopSection(Section):
    max_steps: int = Field(10, ge=1)
    """RS steps of the run."""
    max_epochs: int | None = Field(None, ge=1)
    """Passes over the training prompts after which the run ends, if before max_steps; null for no bound."""
    max_time_per_run: Clock | None = None
    """Time of one `run` or `resume` command, DD:HH:MM:SS: then it stops with a checkpoint; null for no bound."""
    stop_grace_s: Number = Field(60.0, gt=0)
    """Seconds that workers may take to save a checkpoint after Ctrl-C, SIGTERM or the end of their owner."""
    steps_per_iteration: int = Field(5, ge=1)
    """RS steps per iteration: one Metaflow task, one start of the workers."""
    val_check_interval: int = Field(5, ge=1)
    """RS steps between validations; step 0 and the last step are always validated."""
    save_interval: int = Field(5, ge=1)
    """RS steps between checkpoints; the end of an iteration always saves one."""
    keep_last: int = Field(1, ge=1)
    """Newest checkpoints kept."""
    keep_best: int = Field(1, ge=1)
    """Best checkpoints by validation reward kept, besides the newest."""


class ValidationSection(Section):
    num_prompts: int = Field(32, ge=1)
    """Held-out prompts that choose the checkpoint."""


class EvaluationSection(Section):
    num_prompts: int = Field(96, ge=2)
    """Held-out prompts that judge the result; disjoint from validation's."""
    best_of_n: int = Field(8, ge=1)
    """n of the best-of-n baseline; n + 1 base responses are sampled per prompt."""
    prompts: str | None = None
    """Source of evaluation prompts alone, a test split; null takes them from `prompts.held_out`."""
    model: Name = "latest"
    """What evaluate_flow.py evaluates: a run (id or folder), a checkpoint, or what `policy.model` may name."""
    base: Name | None = None
    """What it is compared to, named in the same ways; null means `policy.model`."""
    lm_eval_tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness for both, by name or .yaml file; takes requirements-lm-eval.txt."""
    lm_eval_limit: int | None = Field(None, ge=1)
    """Examples read of each of those tasks; null reads all."""


class ResourcesSection(Section):
    gpu: int = Field(0, ge=0)
    """GPUs of a step that trains or generates, and its number of workers; 0 runs on the CPU."""
    cpu: int = Field(2, ge=1)
    """CPU cores of a step."""
    memory: int = Field(16000, ge=1)
    """Memory of a step in MB."""
    cpu_workers: int = Field(1, ge=1)
    """Workers when `gpu` is 0 (gloo)."""
    threads: int = Field(2, ge=1)
    """Torch threads per worker: fixed, since results are bit-identical for a fixed number only."""


class WandbSection(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online where an API key is found, else offline."""
    project: str = "rejection-sampling"
    """W&B project."""
