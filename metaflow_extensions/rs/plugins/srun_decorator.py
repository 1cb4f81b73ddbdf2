"""`@srun`: a step's task as a Slurm job, or as a job step where the flow runs in an allocation.

The nodes must see the sources, Metaflow's datastore (a shared folder or S3) and the working folder. Cores, GPUs and
memory are the step's `@resources`. Logs come live; a job that is lost, preempted or out of time is a task that failed,
which `@retry` repeats. `alignment.slurm_command` makes the command, `alignment.slurm_task` ends the task in order.
"""

import os
import sys
from pathlib import Path

from metaflow.decorators import StepDecorator
from metaflow.exception import METAFLOW_EXIT_DISALLOW_RETRY, MetaflowException
from metaflow.metadata_provider import MetaDatum


class SrunDecorator(StepDecorator):
    """The attributes are those of the config's section `slurm`, and `grace_s`, seconds that workers have to save."""

    name = "srun"
    defaults = {  # noqa: RUF012 Metaflow wants a plain attribute
        **dict.fromkeys(("partition", "account", "qos", "constraint", "time", "container", "image")),
        "nodes": 1,
        "mounts": [],
        "extra_args": [],
        "grace_s": 60.0,
    }

    def step_init(self, flow, graph, step_name, decorators, environment, flow_datastore, logger):
        """Look at what else the step asks for."""
        clashes = [one.name for one in decorators if one.name in ("batch", "kubernetes", "slurm")]
        if clashes:
            raise MetaflowException(f"step {step_name} has @srun and @{clashes[0]}: a task runs in one place; drop one")
        asked = next((one.attributes for one in decorators if one.name == "resources"), {})
        self._asked = {name: int(float(asked.get(name) or least)) for name, least in RESOURCES.items()}
        self._caught = any(one.name == "catch" for one in decorators)
        self._error = None

    def runtime_step_cli(self, cli_args, retry_count, max_user_code_retries, ubf_context):
        """Put Slurm's command in front of the task's."""
        from alignment.launch import SOURCE_ROOT
        from alignment.slurm_command import SlurmTask, command

        root = str(cli_args.top_level_options["datastore-root"])
        shared = Path.cwd() / ".metaflow" if "://" in root else Path(root)
        own = {name: value for name, value in self.attributes.items() if value is not None}
        of = cli_args.task
        task = SlurmTask(
            **{**own, **self._asked, "nodes": int(own["nodes"]), "grace_s": float(own["grace_s"])},
            name=f"{of.flow_name}-{of.run_id}-{of.step}-{of.task_id}-{retry_count}",
            sources=[str(SOURCE_ROOT), str(shared), str(Path.cwd())],
        )
        attend = [str(SOURCE_ROOT / "infra" / "slurm" / "attend.py"), str(task.grace_s), str(shared)]
        cli_args.entrypoint = [sys.executable, *attend, *command(task, cli_args.entrypoint, os.environ)]

    def task_pre_step(
        self, step_name, task_datastore, metadata, run_id, task_id, flow, graph, retry_count, max_user_code_retries,
        ubf_context, inputs,
    ):  # fmt: skip
        """End in order from now on, and record where the task runs."""
        from alignment.slurm_task import end_in_order, recorded

        end_in_order(float(self.attributes["grace_s"]))
        tags = [f"attempt_id:{retry_count}"]
        found = recorded(os.environ).items()
        data = [MetaDatum(field=name, value=value, type=name, tags=tags) for name, value in found]
        metadata.register_metadata(run_id, step_name, task_id, data)

    def task_exception(self, exception, step_name, flow, graph, retry_count, max_user_code_retries):
        """Remember an error that a repetition would only meet again."""
        from alignment.curable import comes_again

        if comes_again(str(getattr(exception, "headline", ""))):  # sources.plain_errors puts the error's name there
            self._error = exception

    def task_finished(self, step_name, flow, graph, is_task_ok, retry_count, max_retries):
        """Say that it ended well, or end without a repetition after such an error, unless @catch does without it."""
        if is_task_ok and DONE in os.environ:
            Path(os.environ[DONE]).touch()
        if self._error is not None and not is_task_ok and not self._caught:
            print(f"{self._error.headline}: {self._error}", file=sys.stderr, flush=True)
            raise SystemExit(METAFLOW_EXIT_DISALLOW_RETRY)


DONE = "RS_TASK_DONE"
"""Environment variable that `infra/slurm/attend.py` sets: the file by which a task says that it ended well."""
RESOURCES = {"cpu": 1, "gpu": 0, "memory": 4096}
"""What a step asks for that has no @resources."""
