"""The sections of the config: each field with its default, its bounds, its unit and what it does.

The trainings have theirs in `alignment.config_training`; `alignment.config` puts all together, loads presets and
checks across sections.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator


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


Number = Annotated[float, BeforeValidator(_exact_float)]
Name = Annotated[str, BeforeValidator(_name_text)]
Clock = Annotated[str, BeforeValidator(_clock_text), Field(pattern=r"^\d{1,4}:[0-5]?\d:[0-5]?\d:[0-5]?\d$")]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(/[0-9]+)?$")]


def clock_seconds(clock: str) -> float:
    """DD:HH:MM:SS in seconds."""
    days, hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


class Section(BaseModel):
    """Base of all sections: unknown keys are an error, and nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), serialize_by_alias=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def no_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes`, `no`, `on` and `off` as truth values, which would pass for 1 and 0 where none is meant."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("is a truth value to YAML: write a number, or text in quotes")
        return value


class RunSection(Section):
    root: str = "runs"
    """Folder, or s3://bucket/prefix, that holds one folder per run, the exports and the registry."""
    workspace: str | None = None
    """Where tasks of a run under s3:// work: <workspace>/<bucket>/<prefix>/<run id>, on each node's own disk; null:
    a folder in $RS_CACHE, or in ~/.cache/rejection-sampling. A local run.root is its own workspace."""
    cache_limit_gb: Number = Field(50.0, gt=0)
    """Gigabytes of models downloaded from s3:// that a node keeps; beyond it the least recently used one goes."""


class ResumeSection(Section):
    from_: Name | None = Field(None, alias="from")
    """A run to go on from in a new run of another config: its id under run.root, its folder or s3:// URI; null: the
    base."""


class ReuseSection(Section):
    rollouts: Name | None = None
    """A run whose rollouts and scores are selected anew and trained on, RS step by RS step, without generating or
    scoring: its id under run.root, its folder or s3:// URI; null: this run draws its own."""
    scores: bool = False
    """Whether scores are kept in <run.root>/scores, and a conversation that a version of a reward model has scored in
    any run of this root is not sent to it again; under s3:// each node keeps its own."""


class PolicySection(Section):
    model: str = "smollm2-135m"
    """`smollm2-135m` (embedded), `tiny` (random weights, for tests), a model folder (s3:// too), registry:NAME@ALIAS or
    registry:NAME:VERSION, or a hub name."""
    prompt_format: Literal["text", "chat"] = "text"
    """`text` continues the prompt verbatim; `chat` renders it with the tokenizer's chat template."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights; auto is bfloat16 on a GPU, float32 elsewhere. Small steps vanish in bfloat16's rounding."""


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
    min_new_tokens: int = Field(0, ge=0)
    """Tokens before which no ending token is drawn; a stop string ends a response of any length."""
    temperature: Number = Field(1.0, ge=0)
    """Softmax temperature of training rollouts, 0 for the likeliest token, else >= 0.01; evaluation samples at 1."""
    top_k: int = Field(0, ge=0)
    """Sample among the k most probable tokens; 0 means all."""
    top_p: Number = Field(1.0, gt=0, le=1)
    """Sample among the smallest set of tokens with this probability; 1 means all."""
    min_p: Number = Field(0.0, ge=0, le=1)
    """Sample among the tokens with this share of the likeliest one's probability; 0 means all."""
    repetition_penalty: Number = Field(1.0, gt=0)
    """Divides the positive logits of tokens that prompt or response hold, multiplies the negative ones; 1 is none."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts, or special tokens, ending a response. It is cut before them; its tokens hold them, like an ending one."""
    references: Literal["ignore", "join"] = "ignore"
    """`join`: a prompt's reference answer, where it has one, is scored beside the samples and may be selected."""
    batch_tokens: int = Field(16384, ge=1)
    """Tokens whose keys and values one worker keeps while it generates, a prompt's once and max_new_tokens for each of
    its responses: bounds memory, and how many are decoded side by side. docs/performance.md says what a token takes."""
    engine: Literal["in_process", "vllm"] = "in_process"
    """What samples training and validation rollouts: transformers, or vLLM, which has an install step of its own."""
    vllm_tensor_parallel: int = Field(1, ge=1)
    """Workers that hold one copy of vLLM's weights together, and sample together; with 1 each has its own."""


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
    """Triton model repository that exports go to, a folder or s3://bucket/prefix; null means <run.root>/triton_repo."""
    url: str | None = None
    """host:port of an external Triton's gRPC, or env:NAME of an environment variable that holds it, for a server that
    moves; null starts one on loopback for as long as a task scores."""
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


class JudgeSection(Section):
    train_pairs: str = "rotten_tomatoes:pairs"
    """Preference pairs that train the judge; no text of the reward model's."""
    held_out_pairs: str = "imdb:held_out_pairs"
    """Preference pairs that measure the judge's accuracy."""
    num_train_pairs: int = Field(4096, ge=1)
    """Pairs read from `train_pairs`, in its order."""


class LoopSection(Section):
    executor: Literal["colocated", "disaggregated"] = "colocated"
    """What does an iteration: workers on the task's own node, or a Metaflow run with a task of its own for each phase
    of the RS step (flows/rs_iteration_flow.py), on nodes of its own where `phases.run_with` says how."""
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
    sample_prompts: int = Field(4, ge=0)
    """Prompts of which a table shows every response after each validation; with 0 no text leaves the run's folder."""


class TensorboardSection(Section):
    enabled: bool = False
    """Whether the run's numbers and histograms are also written for TensorBoard, into <run>/tensorboard."""
