"""Which failed attempts of a pod are repeated, by what they left in Metaflow's datastore."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from metaflow.datastore import FlowDataStore
from metaflow.exception import METAFLOW_EXIT_DISALLOW_RETRY, MetaflowExceptionWrapper
from metaflow.plugins import STEP_DECORATORS
from metaflow.plugins.datastores.local_storage import LocalStorage

import sources
from alignment.errors import ConfigError, StoppedError, WorkerError

TASK = SimpleNamespace(run_id="7", step="iterate", task_id="3")
COMMAND = ["python", "flow.py"]


def second_attempt(store: FlowDataStore, *others: str) -> list[str]:
    """What is started in the place of the task's second attempt."""
    kind = next(one for one in STEP_DECORATORS if one.name == "if_curable")
    decorator, words = kind(), SimpleNamespace(task=TASK, entrypoint=COMMAND)
    decorator.step_init(None, None, "iterate", [SimpleNamespace(name=name) for name in others], None, store, None)
    decorator.runtime_step_cli(words, 1, 2, None)
    return words.entrypoint


def failed(folder: Path, error: Exception | None) -> FlowDataStore:
    """A store whose task has failed once: by an error of its code, or with None without a word."""
    store = FlowDataStore("F", None, storage_impl=LocalStorage, ds_root=str(folder))
    attempt = store.get_task_datastore("7", "iterate", "3", attempt=0, mode="w")
    attempt.init_task()
    if error:
        with pytest.raises(Exception) as caught, sources.plain_errors():
            raise error
        attempt.save_artifacts([("_exception", MetaflowExceptionWrapper(caught.value))])
        attempt.done()
    return store


@pytest.mark.parametrize("error", [ConfigError("x"), StoppedError("x")], ids=lambda error: type(error).__name__)
def test_an_error_that_would_only_come_again_is_not_repeated(tmp_path, error):
    store = failed(tmp_path, error)
    assert second_attempt(store) == [sys.executable, "-c", f"raise SystemExit({METAFLOW_EXIT_DISALLOW_RETRY})"]
    assert second_attempt(store, "catch") == COMMAND


@pytest.mark.parametrize("error", [None, WorkerError("x"), RuntimeError("x")], ids=lambda error: type(error).__name__)
def test_a_lost_attempt_and_an_error_that_another_node_may_not_have_are_repeated(tmp_path, error):
    assert second_attempt(failed(tmp_path, error)) == COMMAND
