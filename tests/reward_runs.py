"""Training a reward model as the flow does, with the worker in this process: as much of DeepSpeed, in less time.

The worker's process group, of this process alone, stays: DeepSpeed cannot join a second one.
"""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from alignment import reward_stage, reward_worker, task
from alignment.config import Config, parse_config
from alignment.lifeline import Stop
from alignment.run_folder import RunFolder
from infra.triton_setup import free_ports


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The environment of a rank without peers."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with patch.dict(os.environ, {**rank, "MASTER_PORT": str(free_ports(1)[0])}):
        yield


def in_this_process(run: Callable[[], None]) -> None:
    """What a script for ranks does, on one rank; what it changes in torch is put back."""
    threads = torch.get_num_threads()
    with alone(), patch.object(torch.optim, "AdamW", torch.optim.AdamW):
        run()
    torch.set_num_threads(threads)


class StopAfter(Stop):
    """Asks for a stop once its reason was looked at `steps` times, which a worker does once a step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._left = steps

    @property
    def reason(self) -> str:
        self._left -= 1
        return "the test says so" if self._left < 0 else ""


def work(config: Config, folder: Path, stop: Stop | None = None) -> list[dict[str, Any]]:
    """The worker's part of a training in `folder`; returns its events."""
    run, out = RunFolder(folder), io.StringIO()
    folder.mkdir(parents=True, exist_ok=True)
    run.config.write_text(config.model_dump_json())
    with alone(), contextlib.redirect_stdout(out):
        reward_worker.work(config, run, stop or Stop())
    return [json.loads(line) for line in out.getvalue().splitlines() if line.startswith('{"kind"')]


def exported(config: Config) -> dict[str, Any]:
    """Trained, measured and exported: the card, with the reference's fields and what the server reads."""
    ref = _prepared(config)
    folder = Path(ref.repository) / ref.name / ref.version
    card, settings = (json.loads((folder / f"{name}.json").read_text()) for name in ("card", "settings"))
    template = (folder / "template.jinja").read_text()
    return {**settings, **card, "repository": ref.repository, "template": template}


def _prepared(config: Config) -> Any:
    def in_this_process(module: str, arguments: Sequence[str], *, on_event: Any, **_: Any) -> None:
        assert module == reward_stage.WORKER
        folder = Path(arguments[1])
        for event in work(parse_config((folder / "config.json").read_text()), folder):
            on_event(event)

    with patch.object(task, "run_workers", in_this_process):
        return reward_stage.prepare_reward_model(config, lambda _: None, "a-run")
