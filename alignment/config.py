"""The typed config tree: one pydantic model per section, unknown keys refused, each field with its unit.

Presets are YAML files in `configs/`; a preset states only what differs from the defaults here. Checks
across sections stand in `Config.check_across_sections`. Stage functions take plain arguments: the config
stops at the worker and the flow steps.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from alignment.errors import ConfigError


def _exact_float(value: Any) -> Any:
    """YAML reads `1e-6` as a string; a number written that way is meant as a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _version_text(value: Any) -> Any:
    """YAML reads `2` as a number; a version is a name that happens to be one."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Number = Annotated[float, BeforeValidator(_exact_float)]
Version = Annotated[str, BeforeValidator(_version_text)]


class Section(BaseModel):
    """Base of all sections: unknown keys are an error, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class RunSection(Section):
    root: str = "runs"
    """Folder that holds one folder per run, the exports and the cache of converted models."""


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
    """Encoder or sequence-classification model: `all-minilm-l6-v2` (embedded), `tiny`, a folder, or a hub name."""
    template: str = "{% for m in messages %}{{ m.content }}{% endfor %}"
    """Jinja template that turns `messages` into the text the reward model reads; travels in the export."""
    train_pairs: str | None = "imdb:pairs"
    """Preference pairs to train the scalar head on; null serves `model` as it is."""
    held_out_pairs: str | None = "imdb:held_out_pairs"
    """Preference pairs that measure accuracy; null leaves accuracy unmeasured."""
    num_train_pairs: int = Field(1024, ge=1)
    """Pairs read from `train_pairs`, in its order."""
    num_held_out_pairs: int = Field(256, ge=1)
    """Pairs read from `held_out_pairs`, in its order; as many of the judge's."""
    max_tokens: int = Field(64, ge=1)
    """Longest conversation in the reward model's tokens; longer ones lose the start of the prompt."""
    lr: Number = Field(2e-4, gt=0)
    """Peak learning rate of the reward model (linear decay to 0)."""
    batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step of the reward model."""
    epochs: int = Field(1, ge=1)
    """Passes over the training pairs."""
    name: str = Field("reward_model", pattern=r"^[A-Za-z0-9_-]+$")
    """Name of the model in the Triton repository."""
    repository: str | None = None
    """Triton model repository that exports go to; null means <run.root>/triton_repo."""
    url: str | None = None
    """host:port of an external Triton's gRPC; null starts one on loopback for as long as a task scores."""
    version: Version = Field("", pattern=r"^\d*$")
    """Version to score with; empty takes the exported one (or the server's newest with `url`)."""
    grpc_port: int = Field(0, ge=0, le=65535)
    """Loopback port of the local server's gRPC; 0 picks a free one."""
    timeout_s: Number = Field(60.0, gt=0)
    """Seconds a scoring request may take, retries apart."""
    token_budget: int = Field(1024, ge=1)
    """Padded tokens per forward pass inside the server."""


class JudgeSection(Section):
    train_pairs: str = "rotten_tomatoes:pairs"
    """Preference pairs that train the judge; no text of the reward model's."""
    held_out_pairs: str = "imdb:held_out_pairs"
    """Preference pairs that measure the judge's accuracy."""
    num_train_pairs: int = Field(4096, ge=1)
    """Pairs read from `train_pairs`, in its order."""


class TrainingSection(Section):
    lr: Number = Field(2e-5, gt=0)
    """Peak learning rate of the policy."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate over the run's RS steps."""
    warmup_steps: int = Field(0, ge=0)
    """RS steps of linear warm-up."""
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
    """Selected responses per optimizer step, over all workers."""
    micro_batch_size: int = Field(8, ge=1)
    """Responses per forward and backward pass on one worker."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed ZeRO stage."""


class LoopSection(Section):
    max_steps: int = Field(10, ge=1)
    """RS steps of the run."""
    steps_per_iteration: int = Field(5, ge=1)
    """RS steps per iteration: one Metaflow task, one start of the workers."""
    val_check_interval: int = Field(5, ge=1)
    """RS steps between validations; step 0 and the last step are always validated."""
    save_interval: int = Field(5, ge=1)
    """RS steps between checkpoints; the end of an iteration always saves one."""
    keep_last: int = Field(1, ge=1)
    """Newest checkpoints kept, besides the best by validation reward."""


class ValidationSection(Section):
    num_prompts: int = Field(32, ge=1)
    """Held-out prompts that choose the checkpoint."""


class EvaluationSection(Section):
    num_prompts: int = Field(96, ge=2)
    """Held-out prompts that judge the result; disjoint from validation's."""
    best_of_n: int = Field(8, ge=1)
    """n of the best-of-n baseline; n + 1 base responses are sampled per prompt."""


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


class Config(Section):
    """A whole run. `seed` fixes prompts order, sampling, data splits and initial heads."""

    seed: int = Field(0, ge=0)
    """Seed of everything random in the run."""
    run: RunSection = RunSection()
    policy: PolicySection = PolicySection()
    prompts: PromptsSection = PromptsSection()
    rollouts: RolloutsSection = RolloutsSection()
    selection: SelectionSection = SelectionSection()
    reward: RewardSection = RewardSection()
    judge: JudgeSection = JudgeSection()
    training: TrainingSection = TrainingSection()
    loop: LoopSection = LoopSection()
    validation: ValidationSection = ValidationSection()
    evaluation: EvaluationSection = EvaluationSection()
    resources: ResourcesSection = ResourcesSection()
    wandb: WandbSection = WandbSection()

    @property
    def num_workers(self) -> int:
        """Worker processes of a step: one per GPU, or `resources.cpu_workers`."""
        return self.resources.gpu or self.resources.cpu_workers

    @property
    def reward_repository(self) -> Path:
        """The Triton model repository that exports go to."""
        return Path(self.reward.repository or Path(self.run.root) / "triton_repo")

    @model_validator(mode="after")
    def check_across_sections(self) -> Self:
        """Checks that need two keys; each message names both and the remedy."""
        sel, roll, train = self.selection, self.rollouts, self.training
        if sel.strategy.endswith("per_prompt") and sel.top_n_rollouts > roll.num_rollouts_per_prompt:
            raise ValueError(
                f"selection.top_n_rollouts ({sel.top_n_rollouts}) must be <= "
                f"rollouts.num_rollouts_per_prompt ({roll.num_rollouts_per_prompt}): "
                "lower the first or raise the second"
            )
        if sel.strategy.endswith("overall") and sel.top_k is None:
            raise ValueError(f"selection.strategy ({sel.strategy}) needs selection.top_k: set it to a number >= 1")
        if sel.strategy.endswith("per_prompt") and sel.top_k is not None:
            raise ValueError(
                f"selection.top_k ({sel.top_k}) is read by the *_overall strategies only: "
                f"unset it, or use selection.top_n_rollouts with {sel.strategy}"
            )
        if roll.batch_rows < roll.num_rollouts_per_prompt:
            raise ValueError(
                f"rollouts.batch_rows ({roll.batch_rows}) must be >= rollouts.num_rollouts_per_prompt "
                f"({roll.num_rollouts_per_prompt}): the responses of a prompt are decoded side by side"
            )
        if train.min_lr > train.lr:
            raise ValueError(f"training.min_lr ({train.min_lr}) must be <= training.lr ({train.lr})")
        if self.reward.url is not None and not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^/:\s]+):\d+", self.reward.url):
            raise ValueError(f"reward.url ({self.reward.url}) must be host:port of Triton's gRPC endpoint")
        return self


def parse_config(text: str) -> Config:
    """A config from YAML or JSON text. Raises ConfigError with one line per bad key."""
    return validate_config(_read_yaml(text, "the config"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A preset with `section.field=value` overrides folded in. Raises ConfigError."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read the config {path}: {reason}; presets are in configs/") from error
    return validate_config(apply_overrides(_read_yaml(text, str(path)), overrides))


def validate_config(values: dict[str, Any]) -> Config:
    """A plain dict as the typed tree. Raises ConfigError with one line per bad key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_line(e) for e in error.errors())) from None


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `section.field=value` set; the value is read as YAML."""
    result = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for override in overrides:
        key, equals, raw = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override}: expected section.field=value, e.g. --set training.lr=1e-5")
        section, dot, name = key.partition(".")
        if dot and not isinstance(result.setdefault(section, {}), dict):
            raise ConfigError(f"--set {override}: {section} is not a section")
        target = result[section] if dot else result
        target[name if dot else section] = _read_yaml_value(raw, f"--set {override}")
    return result


def _read_yaml(text: str, source: str) -> dict[str, Any]:
    values = _read_yaml_value(text, source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping of sections, got {type(values).__name__}: {str(values)[:60]}")
    return values


def _read_yaml_value(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def _line(error: Any) -> str:
    """One pydantic error as `key (value): what is wrong, remedy`."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section = Config.model_fields.get(str(error["loc"][0]))
        known = Config.model_fields if len(error["loc"]) == 1 or section is None else section.annotation.model_fields  # type: ignore[union-attr]
        return f"{key} ({error['input']!r}): unknown key; known here: {', '.join(known)}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{key} ({error['input']!r}): {error['msg'][0].lower()}{error['msg'][1:]}"
