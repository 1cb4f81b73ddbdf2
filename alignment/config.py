"""The typed config tree: a pydantic model per section (`config_sections`, `config_training`), unknown keys refused.

Presets are YAML files in `configs/`; a preset states only what differs from the defaults here. Checks
across sections stand in `alignment.config_checks`. Stage functions take plain arguments: the config
stops at the worker and the flow steps.
"""

from collections import Counter
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
from alignment.foreign_json import parse_object

LONGEST = 100_000
"""Characters of a config; one with all its fields has some ten thousand."""
DEEPEST = 8
"""Sections in one another that an override may name; the config has three."""


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
    return validate_config(read_mapping(text, "the config"))


def same_config(one: bytes, other: bytes) -> bool:
    """Whether two JSON texts are the same config, of which one may have been written before there were some keys.

    What cannot be read is the same as nothing.
    """
    try:
        if parse_object(one) == parse_object(other):
            return True
        return parse_config(one.decode()) == parse_config(other.decode())
    except (ValueError, ConfigError):
        return False


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A preset with `section.field=value` overrides folded in. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read the config {path}: {reason}; presets are in configs/") from error
    return validate_config(apply_overrides(read_mapping(text, str(path)), overrides))


def validate_config(values: dict[str, Any]) -> Config:
    """A plain dict as the typed tree. Raises ConfigError with one line per bad key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(" ".join(_line(e).splitlines()) for e in error.errors())) from None


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `section.field=value` set; the value is read as YAML."""
    result = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for override in overrides:
        key, equals, raw = override.partition("=")
        said = f"--set {' '.join(override.split())}"
        if not equals or not key:
            raise ConfigError(f"{said}: expected section.field=value, e.g. --set training.lr=1e-5")
        *sections, name = key.split(".")
        if len(sections) > DEEPEST:
            raise ConfigError(f"{said}: names {len(sections)} sections in one another; the config has three")
        value = _read_yaml_value(raw, said)
        if isinstance(value, dict) and not sections:  # a section, which changes what it names
            value = {**_section(result, name, said), **value}
        inner = result
        for one in sections:
            own = dict(_section(inner, one, said))
            inner[one] = own
            inner = own
        inner[name] = value
    return result


def _section(values: dict[str, Any], name: str, said: str) -> dict[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{said}: {name} is not a section")
    return section


def read_mapping(text: str, source: str) -> dict[str, Any]:
    """The mapping that a YAML text is; `source` is what errors call it. Raises ConfigError."""
    values = _read_yaml_value(text, source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        found = f"{type(values).__name__}: {str(values)[:60]!r}"
        raise ConfigError(f"{source}: expected a mapping of sections, got {found}")
    return values


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings name a key once: the second of two sections would silently replace the first.

    Aliases are not read: a few lines of them stand for a value that fills the memory as soon as it is written out.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"*{event.anchor}: write the value out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "expected keys with values", node.start_mark)
        keys = Counter(self.construct_object(key, deep=True) for key, _ in node.value)
        twice = [key for key, count in keys.items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml_value(text: str, source: str) -> Any:
    if len(text) > LONGEST:
        raise ConfigError(f"{source}: has more than {LONGEST} characters: is it a config?")
    try:
        return yaml.load(text, _UniqueKeys)
    # PyYAML passes on what int(), float() and date() say of a text that looks like one, or is tagged as one.
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not valid YAML: it nests too deeply") from None


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
