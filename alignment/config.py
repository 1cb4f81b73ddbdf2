"""The typed config tree: a pydantic model per section (`config_sections`, `config_training`), unknown keys refused.

Presets are YAML files in `configs/`; a preset states only what differs from the defaults here. Checks
across sections stand in `Config.check_across_sections`. Stage functions take plain arguments: the config
stops at the worker and the flow steps.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from alignment.config_sections import (
    EvaluationSection,
    JudgeSection,
    LoopSection,
    PolicySection,
    PromptsSection,
    ResourcesSection,
    ResumeSection,
    RewardEnsembleSection,
    RewardSection,
    RolloutsSection,
    RunSection,
    Section,
    SelectionSection,
    ValidationSection,
    WandbSection,
)
from alignment.config_training import RewardTrainingSection, SftSection, TrainingSection
from alignment.errors import ConfigError


class Config(Section):
    """A whole run. `seed` fixes prompts order, sampling, data splits and initial heads."""

    seed: int = Field(0, ge=0)
    """Seed of everything random in the run."""
    run: RunSection = RunSection()
    resume: ResumeSection = ResumeSection()
    policy: PolicySection = PolicySection()
    prompts: PromptsSection = PromptsSection()
    rollouts: RolloutsSection = RolloutsSection()
    selection: SelectionSection = SelectionSection()
    reward: RewardSection = RewardSection()
    reward_ensemble: RewardEnsembleSection = RewardEnsembleSection()
    reward_training: RewardTrainingSection = RewardTrainingSection()
    sft: SftSection = SftSection()
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
    def max_seconds_per_run(self) -> float | None:
        """`loop.max_time_per_run` in seconds."""
        if self.loop.max_time_per_run is None:
            return None
        days, hours, minutes, seconds = (int(part) for part in self.loop.max_time_per_run.split(":"))
        return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds

    def total_steps(self, num_prompts: int) -> int:
        """RS steps of the whole run over `num_prompts` training prompts."""
        if self.loop.max_epochs is None:
            return self.loop.max_steps
        return min(self.loop.max_steps, self.loop.max_epochs * (num_prompts // self.rollouts.num_rollout_samples))

    def validates(self, step: int, total_steps: int) -> bool:
        """Whether a validation follows RS step `step`; 0 is the base."""
        return step % self.loop.val_check_interval == 0 or step == total_steps

    @property
    def merge_weights(self) -> tuple[float, ...]:
        """Weight of each of the reward model's outputs in the reward."""
        own = self.reward_training
        return own.merge_weights or tuple(1 / len(own.attributes) for _ in own.attributes) or (1.0,)

    @property
    def member_weights(self) -> tuple[float, ...]:
        """Weight of each model whose score makes the reward: that of reward.name, then the others' in their order."""
        given, own = self.reward_ensemble.members, self.reward.name
        return (given.get(own, 1.0), *(weight for name, weight in given.items() if name != own))

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
        if roll.min_new_tokens > roll.max_new_tokens:
            raise ValueError(
                f"rollouts.min_new_tokens ({roll.min_new_tokens}) must be <= rollouts.max_new_tokens "
                f"({roll.max_new_tokens}): lower the first or raise the second"
            )
        if 0 < roll.temperature < 0.01:
            raise ValueError(
                f"rollouts.temperature ({roll.temperature}) must be 0 or >= 0.01: logits over less are no longer "
                "finite; 0 takes the likeliest token"
            )
        longest = self.prompts.max_prompt_tokens + roll.max_new_tokens
        if roll.batch_tokens < longest:
            raise ValueError(
                f"rollouts.batch_tokens ({roll.batch_tokens}) must be >= prompts.max_prompt_tokens + "
                f"rollouts.max_new_tokens ({longest}): a prompt and a response of it must fit"
            )
        for name, section in (("training", train), ("reward_training", self.reward_training), ("sft", self.sft)):
            if section.min_lr > section.lr:
                raise ValueError(f"{name}.min_lr ({section.min_lr}) must be <= {name}.lr ({section.lr})")
            if section.constant_steps and section.lr_schedule == "constant":
                raise ValueError(
                    f"{name}.constant_steps ({section.constant_steps}) end a linear or cosine schedule, and "
                    f"{name}.lr_schedule is constant: set {name}.constant_steps=0"
                )
            if section.offload_optimizer and not (self.resources.gpu and section.zero_stage):
                raise ValueError(
                    f"{name}.offload_optimizer needs GPUs, whose memory it spares, and DeepSpeed's ZeRO: set "
                    f"resources.gpu >= 1 (now {self.resources.gpu}) and {name}.zero_stage >= 1 "
                    f"(now {section.zero_stage})"
                )
        self._check_engine()
        self._check_reward_training()
        self._check_reward_ensemble()
        self._check_sft()
        if self.reward.url is not None and not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^/:\s]+):\d+", self.reward.url):
            raise ValueError(f"reward.url ({self.reward.url}) must be host:port of Triton's gRPC endpoint")
        return self

    def _check_engine(self) -> None:
        own = self.rollouts
        if own.engine == "in_process" and own.vllm_tensor_parallel > 1:
            raise ValueError(
                f"rollouts.vllm_tensor_parallel ({own.vllm_tensor_parallel}) is read by rollouts.engine=vllm only: "
                "set that, or leave it 1"
            )
        if own.vllm_tensor_parallel > 1 and (not self.resources.gpu or self.resources.gpu % own.vllm_tensor_parallel):
            raise ValueError(
                f"rollouts.vllm_tensor_parallel ({own.vllm_tensor_parallel}) must divide resources.gpu "
                f"({self.resources.gpu}), a worker each: change one of them, or leave the first 1"
            )
        if own.engine == "vllm" and own.temperature and not 0.01 <= own.temperature <= 2:
            raise ValueError(
                f"rollouts.temperature ({own.temperature}) must be 0 or from 0.01 to 2 for rollouts.engine=vllm, which "
                "knows no others: change it, or set rollouts.engine=in_process"
            )
        if own.engine == "vllm" and own.stop and own.min_new_tokens:
            raise ValueError(
                f"rollouts.stop and rollouts.min_new_tokens ({own.min_new_tokens}) do not go together with "
                "rollouts.engine=vllm, which looks for no stop string before the least length: unset one of them, or "
                "set rollouts.engine=in_process"
            )

    def _check_reward_ensemble(self) -> None:
        own, name = self.reward_ensemble, self.reward.name
        if own.members and (name not in own.members or len(own.members) < 2):
            raise ValueError(
                f"reward_ensemble.members ({', '.join(own.members)}) must hold reward.name ({name}), without a "
                "version, and at least one more: add them, or leave it empty"
            )
        if own.combine == "vote" and not own.members:
            raise ValueError("reward_ensemble.combine (vote) needs models that vote: set reward_ensemble.members")
        for member, weight in own.members.items():
            if weight == 0 or (weight < 0 and own.combine == "vote"):
                raise ValueError(
                    f"the weight of {member} in reward_ensemble.members ({weight:g}) must be "
                    f"{'above 0 in a vote' if own.combine == 'vote' else 'other than 0'}: change it, or name the model "
                    "in reward_ensemble.shadows"
                )
        models = [name, *(m for m in own.members if m != name), *own.shadows]
        twice = [m for i, m in enumerate(models) if m in models[:i]]
        if twice:
            raise ValueError(
                f"reward_ensemble.shadows names {twice[0]}, which scores already: take it out, or name another version"
            )

    def _check_sft(self) -> None:
        own = self.sft
        if own.validation and own.validation_share:
            raise ValueError(
                f"sft.validation ({own.validation}) and sft.validation_share ({own.validation_share}) both choose the "
                "checkpoint: set one of them"
            )
        if own.chat_template is not None and self.policy.prompt_format == "text":
            raise ValueError(
                "sft.chat_template is given, and policy.prompt_format is text, which reads none: set "
                "policy.prompt_format=chat"
            )

    def _check_reward_training(self) -> None:
        own = self.reward_training
        if own.validation_share + own.test_share >= 1:
            raise ValueError(
                f"reward_training.validation_share ({own.validation_share}) + reward_training.test_share "
                f"({own.test_share}) must be < 1: the rest is what is trained on"
            )
        if own.stop_after is not None and not (own.validation_share or own.validation):
            raise ValueError(
                f"reward_training.stop_after ({own.stop_after}) needs a validation set: set "
                "reward_training.validation_share above 0, or reward_training.validation"
            )
        if own.loss == "regression" and own.validation:
            raise ValueError(
                f"reward_training.validation ({', '.join(own.validation)}) names pairs, and reward_training.loss "
                "(regression) is validated on ratings: set reward_training.validation_share instead"
            )
        if self.reward.output == "standardized" and not (own.held_out or own.test_share):
            raise ValueError(
                "reward.output (standardized) needs rewards that were measured: set reward_training.held_out or "
                "reward_training.test_share"
            )
        if (own.loss == "regression") != bool(own.attributes):
            raise ValueError(
                f"reward_training.attributes ({', '.join(own.attributes) or 'none'}) name the ratings that regression "
                f"learns, and reward_training.loss is {own.loss}: set both or neither"
            )
        if own.merge_weights and len(own.merge_weights) != len(own.attributes):
            raise ValueError(
                f"reward_training.merge_weights has {len(own.merge_weights)} numbers for "
                f"{len(own.attributes)} reward_training.attributes: give one each"
            )


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
        value = _read_yaml_value(raw, f"--set {override}")
        if dot:
            value = {name: value}
        if isinstance(value, dict):
            before = result.get(section) or {}
            if not isinstance(before, dict):
                raise ConfigError(f"--set {override}: {section} is not a section")
            value = {**before, **value}
        result[section] = value
    return result


def _read_yaml(text: str, source: str) -> dict[str, Any]:
    values = _read_yaml_value(text, source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping of sections, got {type(values).__name__}: {str(values)[:60]}")
    return values


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings name a key once: the second of two sections would silently replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml_value(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def _line(error: Any) -> str:
    """One pydantic error as `key (value): what is wrong, remedy`."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section = Config.model_fields.get(str(error["loc"][0]))
        known = Config.model_fields if len(error["loc"]) == 1 or section is None else section.annotation.model_fields  # type: ignore[union-attr]
        names = ", ".join(field.alias or name for name, field in known.items())
        return f"{key} ({error['input']!r}): unknown key; known here: {names}"
    if error["type"] == "value_error":
        return f"{key} ({error['input']!r}): {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    if error["type"] == "string_pattern_mismatch" and error["loc"][-1] == "max_time_per_run":
        return f"{key} ({error['input']!r}): must be DD:HH:MM:SS, e.g. 00:03:45:00 for 3 h 45 min"
    return f"{key} ({error['input']!r}): {error['msg'][0].lower()}{error['msg'][1:]}"
