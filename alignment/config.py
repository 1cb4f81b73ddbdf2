"""The typed config tree: a pydantic model per section (`config_sections`, `config_training`), unknown keys refused.

Presets are YAML files in `configs/`; a preset states only what differs from the defaults here. Checks
across sections stand in `alignment.config_checks`. Stage functions take plain arguments: the config
stops at the worker and the flow steps.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from alignment.config_checks import check_config
from alignment.config_kubernetes import KubernetesSection
from alignment.config_phases import PhaseSection, PhasesSection
from alignment.config_promotion import PromotionSection
from alignment.config_sections import (
    EvaluationSection,
    JudgeSection,
    LoopSection,
    PolicySection,
    PromptsSection,
    ResourcesSection,
    ResumeSection,
    ReuseSection,
    RewardEnsembleSection,
    RewardSection,
    RolloutsSection,
    RunSection,
    Section,
    SelectionSection,
    TensorboardSection,
    ValidationSection,
    WandbSection,
    clock_seconds,
)
from alignment.config_slurm import SlurmSection
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
    reuse: ReuseSection = ReuseSection()
    reward: RewardSection = RewardSection()
    reward_ensemble: RewardEnsembleSection = RewardEnsembleSection()
    reward_training: RewardTrainingSection = RewardTrainingSection()
    sft: SftSection = SftSection()
    judge: JudgeSection = JudgeSection()
    training: TrainingSection = TrainingSection()
    loop: LoopSection = LoopSection()
    phases: PhasesSection = PhasesSection()
    validation: ValidationSection = ValidationSection()
    evaluation: EvaluationSection = EvaluationSection()
    promotion: PromotionSection = PromotionSection()
    resources: ResourcesSection = ResourcesSection()
    slurm: SlurmSection = SlurmSection()
    kubernetes: KubernetesSection = KubernetesSection()
    wandb: WandbSection = WandbSection()
    tensorboard: TensorboardSection = TensorboardSection()

    @property
    def num_workers(self) -> int:
        """Worker processes of a step: one per GPU, or `resources.cpu_workers`."""
        return self.resources.gpu or self.resources.cpu_workers

    @property
    def phases_elsewhere(self) -> bool:
        """Whether the phases of an RS step run on nodes of their own, not on that of the step that starts them."""
        return bool(self.phases.run_with) or self.slurm.enabled or self.kubernetes.image is not None

    def in_phase(self, name: str) -> Self:
        """This config as a task of that phase has it: its `resources` are the phase's where it names any."""
        own: PhaseSection = getattr(self.phases, name)
        return self.model_copy(update={"resources": own.over(self.resources)})

    @property
    def max_seconds_per_run(self) -> float | None:
        """`loop.max_time_per_run` in seconds."""
        own = self.loop.max_time_per_run
        return None if own is None else clock_seconds(own)

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
    def reward_repository(self) -> str:
        """The Triton model repository that exports go to: a folder, or a prefix in S3."""
        from alignment.workspace import child

        return (self.reward.repository or "").rstrip("/") or child(self.run.root, "triton_repo")

    @model_validator(mode="after")
    def check_across_sections(self) -> Self:
        """Checks that need two keys; see `alignment.config_checks`."""
        check_config(self)
        return self


def parse_config(text: str) -> Config:
    """A config from YAML or JSON text. Raises ConfigError with one line per bad key."""
    return validate_config(_read_yaml(text, "the config"))


def same_config(one: str, other: str) -> bool:
    """Whether two JSON texts are the same config, of which one may have been written before there were some keys."""
    if json.loads(one) == json.loads(other):
        return True
    try:
        return parse_config(one) == parse_config(other)
    except ConfigError:
        return False


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
        *sections, name = key.split(".")
        value = _read_yaml_value(raw, f"--set {override}")
        if isinstance(value, dict) and not sections:  # a section, which changes what it names
            value = {**_section(result, name, override), **value}
        inner = result
        for one in sections:
            own = dict(_section(inner, one, override))
            inner[one] = own
            inner = own
        inner[name] = value
    return result


def _section(values: dict[str, Any], name: str, override: str) -> dict[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"--set {override}: {name} is not a section")
    return section


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
        known = Config.model_fields
        for section in error["loc"][:-1]:
            known = known[str(section)].annotation.model_fields  # type: ignore[union-attr]
        names = ", ".join(field.alias or name for name, field in known.items())
        return f"{key} ({error['input']!r}): unknown key; known here: {names}"
    if error["type"] == "value_error":
        return f"{key} ({error['input']!r}): {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    if error["type"] == "string_pattern_mismatch" and error["loc"][-1] in ("max_time_per_run", "time"):
        return f"{key} ({error['input']!r}): must be DD:HH:MM:SS, e.g. 00:03:45:00 for 3 h 45 min"
    return f"{key} ({error['input']!r}): {error['msg'][0].lower()}{error['msg'][1:]}"
