"""Where the tasks of a flow run, by its config: here, as pods of Kubernetes, as jobs of Slurm.

Imported after `sources`. Mutators rather than `--with`, so that a resume, an inner run and Argo Workflows place tasks
as the run did whose config they have.
"""

import os
import sys
from pathlib import Path

from metaflow import FlowMutator, StepMutator
from metaflow.user_configs.config_parameters import resolve_delayed_evaluator

from sources import COMMAND_STARTED, typed


class placed(FlowMutator):
    """Every step a pod, where the config names a `kubernetes.image`; else Metaflow's `--with` says where.

    It is repeated as kubernetes.retries says, unless the step has a rule of its own or the error would only come again.
    """

    def pre_mutate(self, mutable_flow):
        section = typed(config_of(mutable_flow)).kubernetes
        if section.image is None:
            return
        for _, step in mutable_flow.steps:
            step.add_decorator("kubernetes", deco_kwargs=section.pod(_gpus(step)))
            step.add_decorator("retry", deco_kwargs={"times": section.retries, "minutes_between_retries": 0})
            step.add_decorator("if_curable")
            if "argo-workflows" not in sys.argv:  # a workflow starts long after it was made
                step.add_decorator("environment", deco_kwargs={"vars": _handed_on()})


class on_cluster(StepMutator):
    """A job of Slurm where slurm.enabled says so, repeated as slurm.retries says unless the step has a rule of its own.

    Steps without this lay out a folder, name shards, select or say how it went: seconds of one core, where the
    flow runs.
    """

    def mutate(self, mutable_step):
        _as_job(mutable_step, nodes=1)


class iterating_on_cluster(StepMutator):
    """The same on slurm.nodes nodes for the step that loops, if it does the work itself.

    In the disaggregated executor it watches its phases, which have jobs of their own.
    """

    def mutate(self, mutable_step):
        config = typed(config_of(mutable_step.flow))
        if config.loop.executor == "colocated":
            _as_job(mutable_step, nodes=config.slurm.nodes)


def _as_job(mutable_step, *, nodes: int) -> None:
    config = typed(config_of(mutable_step.flow))  # so that one from before there was such a section has it
    own = config.slurm.model_dump(mode="json", exclude={"enabled", "retries"})
    if config.slurm.enabled:
        mutable_step.add_decorator("srun", deco_kwargs={**own, "nodes": nodes, "grace_s": config.loop.stop_grace_s})
        mutable_step.add_decorator("retry", deco_kwargs={"times": config.slurm.retries})


def config_of(mutable_flow):
    """The config that this command works with: in a resume `mutable_flow.config` is still the default preset."""
    return dict(mutable_flow.configs)["config"]


def _gpus(step) -> int:
    """The GPUs that a step's @resources asks for."""
    asked = [kwargs["gpu"] for _, _, _, kwargs in step.get_decorator_specs("resources")]
    return int(resolve_delayed_evaluator(asked[0]) or 0) if asked else 0


def _handed_on() -> dict[str, str]:
    """What pods get of this process's environment: when the command began, for loop.max_time_per_run."""
    # Metaflow drops its own variable of that name where a step has an environment.
    return {COMMAND_STARTED: os.environ[COMMAND_STARTED], "METAFLOW_FLOW_FILENAME": Path(sys.argv[0]).name}
