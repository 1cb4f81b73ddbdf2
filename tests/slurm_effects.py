"""What a step asks of Slurm under a config; see config_effects.py."""

from types import SimpleNamespace
from typing import Any

from metaflow.user_configs.config_parameters import ConfigValue

from alignment.config import Config
from alignment.slurm_command import SlurmTask, command
from placement import iterating_on_cluster


def attached(config: Config) -> dict[str, dict[str, Any]]:
    """The decorators of the step that loops, and their attributes."""
    seen: dict[str, dict[str, Any]] = {}
    step = SimpleNamespace(
        flow=SimpleNamespace(configs=[("config", ConfigValue(config.model_dump(mode="json")))]),
        add_decorator=lambda name, deco_kwargs: seen.update({name: deco_kwargs}),
    )
    iterating_on_cluster.mutate(None, step)
    return seen


def decorators(config: Config) -> list[str]:
    """Their names."""
    return sorted(attached(config))


def retries(config: Config) -> int:
    """Times that the step is repeated."""
    return attached(config)["retry"]["times"]


def words(config: Config) -> list[str]:
    """The step's command on the cluster."""
    return command(
        SlurmTask("a-task", cpu=1, gpu=0, memory=500, **attached(config)["srun"]), ["python3", "flow.py"], {}
    )


def option(name: str) -> Any:
    """The values that an option of the command has: the job's, the step's."""
    return lambda config: [word.partition("=")[2] for word in words(config) if word.startswith(f"{name}=")]


def in_front_of_python(config: Config) -> list[str]:
    """What stands between srun's options and the task's own command."""
    own = words(config)
    return own[own.index("--export=ALL") + 1 : own.index("python")]
