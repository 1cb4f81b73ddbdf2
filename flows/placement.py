"""Where the tasks of a flow run, by its config: import it after `sources`.

A mutator rather than `--with`, so that a resume, an inner run and Argo Workflows place tasks as the run did whose
config they have.
"""

import os
import sys
from pathlib import Path

from metaflow import FlowMutator
from metaflow.user_configs.config_parameters import resolve_delayed_evaluator

from sources import COMMAND_STARTED, typed


class placed(FlowMutator):
    """Every step a pod, where the config names a `kubernetes.image`; else Metaflow's `--with` says where."""

    def pre_mutate(self, mutable_flow):
        section = typed(config_of(mutable_flow)).kubernetes
        if section.image is None:
            return
        for _, step in mutable_flow.steps:
            step.add_decorator("kubernetes", deco_kwargs=section.pod(_gpus(step)))
            if "argo-workflows" not in sys.argv:  # a workflow starts long after it was made
                step.add_decorator("environment", deco_kwargs={"vars": _handed_on()})


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
