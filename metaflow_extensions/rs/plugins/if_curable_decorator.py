"""`@if_curable`: beside @retry, no repetition after an error that would only come again.

For places whose exit status the scheduler does not see, a pod of @kubernetes: what the last attempt failed by stands
among its artifacts. An attempt that left nothing, evicted say, is repeated.
"""

import sys

from metaflow.datastore.exceptions import DataException
from metaflow.decorators import StepDecorator
from metaflow.exception import METAFLOW_EXIT_DISALLOW_RETRY


class IfCurableDecorator(StepDecorator):
    """It has no attributes."""

    name = "if_curable"
    defaults = {}  # noqa: RUF012 Metaflow wants a plain attribute

    def step_init(self, flow, graph, step_name, decorators, environment, flow_datastore, logger):
        """Keep what tells of the last attempt."""
        self._datastore = flow_datastore
        self._caught = any(one.name == "catch" for one in decorators)

    def runtime_step_cli(self, cli_args, retry_count, max_user_code_retries, ubf_context):
        """In the place of an attempt that would be in vain, an end that Metaflow takes for the last one."""
        if retry_count and not self._caught and self._in_vain(cli_args.task, retry_count - 1):
            cli_args.entrypoint = [sys.executable, "-c", f"raise SystemExit({METAFLOW_EXIT_DISALLOW_RETRY})"]

    def _in_vain(self, task, attempt):
        from alignment.curable import comes_again

        try:
            left = self._datastore.get_task_datastore(task.run_id, task.step, task.task_id, attempt=attempt)
        except DataException:  # it did not come to its end
            return False
        error = left.get("_exception")
        return error is not None and comes_again(error.type.rpartition(".")[2])  # sources.plain_errors names it so
