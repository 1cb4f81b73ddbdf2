"""`@run_card`: a Metaflow card that its step draws by itself, while it runs.

The step calls `current.run_card.show(draw)` with a function that returns HTML. Metaflow's own @card starts a process
for each refresh, and two at the end of each task, which import the flow and take seconds of a core; this one writes the
page from a thread of the task. It lies where Metaflow's client and `card view` look for cards.
"""

import os
import uuid

from metaflow.decorators import StepDecorator
from metaflow.metaflow_current import current


class RunCardDecorator(StepDecorator):
    """`id` names the card among those of its step, in letters and digits."""

    name = "run_card"
    defaults = {"id": None}  # noqa: RUF012 Metaflow wants a plain attribute

    def step_init(self, flow, graph, step_name, decorators, environment, flow_datastore, logger):
        """Keep where cards go."""
        self._datastore, self._writer = flow_datastore, None

    def task_pre_step(
        self, step_name, task_datastore, metadata, run_id, task_id, flow, graph, retry_count, max_user_code_retries,
        ubf_context, inputs,
    ):  # fmt: skip
        """Give the step its card."""
        from alignment.card_writer import CardWriter

        place = f"{flow.name}/{run_id}/{step_name}/{task_id}"
        self._writer = CardWriter(_saver(self._datastore, place, self.attributes["id"]))
        current._update_env({"run_card": self._writer})

    def task_finished(self, step_name, flow, graph, is_task_ok, retry_count, max_user_code_retries):
        """Write the last page, also that of a step that failed."""
        if self._writer is not None:
            self._writer.close()


def _saver(flow_datastore, place, card_id):
    """What writes a page as the task's card; the store is opened when the first one comes."""
    name, opened = uuid.uuid4().hex, []

    def save(html):
        from metaflow.datastore import FlowDataStore
        from metaflow.metaflow_config import CARD_SUFFIX
        from metaflow.plugins.cards.card_datastore import CardDatastore

        if not opened:
            root = os.path.join(flow_datastore.datastore_root, CARD_SUFFIX)
            kind = type(flow_datastore._storage_impl)
            store = FlowDataStore(flow_datastore.flow_name, None, storage_impl=kind, ds_root=root)
            opened.append(CardDatastore(store, pathspec=place))
        opened[0].save_card(name, "run_card", html, card_id=card_id, overwrite=True)

    return save
