"""What the disaggregated executor does under a config; see config_effects.py."""

import contextlib
import functools
import itertools
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import config_effects as see
from alignment import colocated, disaggregated, inner_run, stages
from alignment.config import Config
from alignment.errors import WorkerError
from alignment.run_folder import RunFolder
from flow_runs import ROOT


def asked(phase: str, decorator: str, attribute: str) -> Any:
    """What a decorator of a phase's Metaflow step says, from the command line on."""
    return lambda config: decorators(config.model_dump_json())[phase, decorator][attribute]


@functools.cache
def decorators(config: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The attributes of each step's decorators, as Metaflow resolves them."""
    command = [sys.executable, str(ROOT / "flows" / "rs_iteration_flow.py"), "--config-value", "config", config]
    done = subprocess.run([*command, "output-raw", "--json"], capture_output=True, text=True, check=True)
    steps = json.loads(done.stdout)["graph"]
    return {(name, one["name"]): one["attributes"] for name, step in steps.items() for one in step["decorators"]}


def executor(config: Config) -> str:
    """The module that does an iteration."""
    seen = []

    def stand_in(name: str) -> Any:
        def iterate_stand_in(*_: Any) -> None:
            seen.append(name)
            raise see.Seen

        return iterate_stand_in

    run, reference = see.new_run(config), {"name": "", "version": "", "digest": "", "repository": "", "accuracy": None}
    with (
        patch.object(colocated, "iterate", stand_in("colocated")),
        patch.object(inner_run, "iterate", stand_in("inner_run")),
        contextlib.suppress(see.Seen),
    ):
        stages.run_iteration(config, str(run.path), reference, {"name": "", "uri": "", "accuracy": 1.0})
    return seen[0]


def shard_sizes(config: Config) -> list[int]:
    """The prompts of each shard of the first RS step."""
    return [len(shard) for shard in disaggregated._shards(config, *_run_and_step(config))]


def without_a_shard(config: Config) -> int | str:
    """The prompts that the first RS step goes on without when its second shard is lost, or the error."""
    try:
        return len(disaggregated._lost(config, *_run_and_step(config), [([], 0.0), None, ([], 0.0), ([], 0.0)]))
    except WorkerError as error:
        return str(error)


def update_nodes(config: Config) -> int:
    """The nodes that the update gets: one where `selection` goes on with it, else those that `gang` asks for."""
    from metaflow.user_configs.config_parameters import ConfigValue

    from rs_iteration_flow import RSIterationFlow

    seen: dict[str, Any] = {}
    flow = SimpleNamespace(
        config=ConfigValue(config.model_dump(mode="json")), place={}, scored={"scored": []},
        update="update", gang="gang", gang_update="gang_update",
        next=lambda step, **others: seen.update(others),
    )  # fmt: skip
    with patch.object(disaggregated, "select_and_store", lambda *_: []), patch("sources.task", contextlib.nullcontext):
        RSIterationFlow.selection(flow)
    if flow.nodes == "several":
        RSIterationFlow.gang(flow)
    return seen.get("num_parallel", 1)


def inner_command(option: str) -> Any:
    """The values of an option of the command that an iteration runs."""

    def look(config: Config) -> list[str]:
        words = inner_run.command(config, see.new_run(config), 1, None, [])
        return [value for word, value in itertools.pairwise(words) if word == option]

    return look


def _run_and_step(config: Config) -> tuple[RunFolder, int]:
    return see.new_run(config), 1
