"""Which errors a repetition of the task may cure."""

import pytest

from alignment import errors
from alignment.curable import comes_again

CURABLE = {"RewardServerError", "StorageError", "StorageConflict", "WorkerError"}
ALL = {name for name, kind in vars(errors).items() if isinstance(kind, type)}


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_error_of_the_project_comes_again_but_those_of_servers_stores_and_workers(name: str) -> None:
    assert comes_again(name) == (name not in CURABLE)


@pytest.mark.parametrize("name", ["", "RuntimeError", "__doc__", "CatchError"])
def test_an_error_of_something_else_may_be_curable(name: str) -> None:
    assert not comes_again(name)
