"""Supervised fine-tuning as the flow does it, with the worker in this process: as much of DeepSpeed, in less time."""

import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from alignment import sft_stage, sft_worker, task
from alignment.config import Config, parse_config
from alignment.lifeline import Stop
from alignment.run_folder import RunFolder
from reward_runs import alone


def work(folder: Path, stop: Stop | None = None) -> list[dict[str, Any]]:
    """The worker's part of a run that was begun; returns its events without what the clock says."""
    run, out = RunFolder(folder), io.StringIO()
    with alone(), contextlib.redirect_stdout(out):
        sft_worker.work(parse_config(run.config.read_text()), run, stop or Stop())
    events = [json.loads(line) for line in out.getvalue().splitlines() if line.startswith('{"kind"')]
    return [{k: v for k, v in event.items() if k not in ("seconds", "tokens_per_second")} for event in events]


def begun(config: Config, run_id: str = "a-run") -> tuple[Path, list[dict[str, Any]]]:
    """A run's folder with its examples, and their summaries."""
    path, summaries = sft_stage.begin(config, run_id, None, lambda _: None)
    return Path(path), summaries


def trained(config: Config, run_id: str = "a-run") -> tuple[Path, dict[str, Any]]:
    """A whole run: its folder and its report."""
    folder, summaries = begun(config, run_id)

    def in_this_process(module: str, arguments: Any, *, on_event: Any, **_: Any) -> None:
        assert module == sft_stage.WORKER
        for event in work(Path(arguments[1])):
            on_event(event)

    with patch.object(task, "run_workers", in_this_process):
        sft_stage.train(config, RunFolder(folder), lambda _: None)
    return folder, sft_stage.finish(config, RunFolder(folder), summaries, time.time())
