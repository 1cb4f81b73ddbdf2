"""The disaggregated executor: one RS step as a Metaflow run of its own, found again by its tags.

    parent:<run id>  iteration:<RS step>

A step that failed is resumed: tasks that ended well are cloned, and only those that did not are repeated, among them
the ones that were running beside a lost one, which Metaflow ends with the run. The inner run ends with this process,
`kill -9` included: its standard input is a pipe that nothing is written to.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from alignment.config import Config
from alignment.errors import CheckpointError, StoppedError, WorkerError
from alignment.launch import SOURCE_ROOT, stop, worker_environment
from alignment.lifeline import INTERRUPTED_S
from alignment.preparation import load_prompt_sets
from alignment.run_events import listener
from alignment.run_folder import RunFolder
from alignment.run_metrics import end_progress
from alignment.task import time_left, tracker
from alignment.types import Checkpoint
from alignment.workspace import opened

FLOW = "RSIterationFlow"
FILE = "rs_iteration_flow.py"
INHERITED = ("--datastore", "--datastore-root", "--metadata", "--environment", "--event-logger", "--monitor")
"""Metaflow's options of the run that this task belongs to, which the inner run has in common with it."""
SPLITS = 100
"""Metaflow's own bound of the tasks of a foreach, which is raised where a step has more shards."""


@dataclass(frozen=True, slots=True)
class _Todo:
    """RS step `step` is to be done, or to be ended, of a run that has `done` of `total` behind it.

    `origin` is the id of an inner run of the step that did not end well, `told` the records from step `done` on.
    """

    done: int
    step: int
    total: int
    origin: str | None
    told: tuple[dict[str, Any], ...]


def iterate(config: Config, run_path: str) -> Checkpoint:
    """The next RS step, or what is left of one that was begun. Raises AlignmentError.

    Its phases open the run by themselves, on whatever node they are; this task looks at it before and after.
    """
    from models.checkpoints import newest_checkpoint

    begun = time.monotonic()
    with opened(config, run_path, writes=False) as run:
        todo = _todo(config, run)
    if todo.step > todo.done or todo.origin:
        _run_step(config, run, todo.step, todo.origin)
    with opened(config, run_path) as run, tracker(config, run) as wandb_run:
        listen = listener(run, wandb_run, done=todo.done, total=todo.total)
        for record in _told(run, todo.done):
            if record not in todo.told:
                listen(record)
        run.append_metrics({"kind": "task", "name": "iterate", "seconds": time.monotonic() - begun, "starting": 0.0})
        if todo.step == todo.total:
            end_progress(run)
        checkpoint = newest_checkpoint(run.checkpoints)
        if checkpoint is None or checkpoint.step != todo.step:
            raise CheckpointError(
                f"{run.checkpoints} holds no checkpoint of RS step {todo.step}, which has just been made"
            )
        return replace(checkpoint, uri=run.uri_of(Path(checkpoint.uri)))


def _todo(config: Config, run: RunFolder) -> _Todo:
    from models.checkpoints import newest_checkpoint

    newest, total = newest_checkpoint(run.checkpoints), config.total_steps(len(load_prompt_sets(run.path).train))
    done = newest.step if newest else 0
    origin = _unfinished(config, run, done, None) if done else None
    step = done if origin or done == total else done + 1
    if step > done:
        origin = _unfinished(config, run, step, newest.sha256 if newest else "")
    return _Todo(done, step, total, origin, tuple(_told(run, done)))


def command(config: Config, run: RunFolder, step: int, origin: str | None, options: Sequence[str]) -> list[str]:
    """What runs RS step `step`, or resumes its run `origin`; `options` are Metaflow's, which stand first."""
    file = next(path for path in (SOURCE_ROOT / "flows" / FILE, SOURCE_ROOT / FILE) if path.is_file())
    phases = config.phases
    words = [sys.executable, str(file), "--watch-stdin", "--no-pylint", *options]
    if origin is None:
        words += ["--config-value", "config", config.model_dump_json(), "run", "--run_path", run.uri]
    else:  # a resume has the config and the parameters of its origin
        words += ["resume", "--origin-run-id", origin]
    for tag in _tags(run, step):
        words += ["--tag", tag]
    for decorator in phases.run_with:
        words += ["--with", decorator]
    return [*words, "--max-num-splits", str(max(SPLITS, phases.shards)), "--max-workers", str(side_by_side(config))]


def side_by_side(config: Config) -> int:
    """Tasks at a time: all shards where they have nodes of their own, else as many as this node has cores for."""
    if config.phases.run_with:
        return config.phases.shards
    return max(1, len(os.sched_getaffinity(0)) // config.in_phase("rollouts").resources.cpu)


def inherited(words: Sequence[str]) -> list[str]:
    """Metaflow's options on the command line of a task that its inner run takes over."""
    pairs = pairwise(words)
    return [word for option, value in pairs if option in INHERITED for word in (option, value)]


def _run_step(config: Config, run: RunFolder, step: int, origin: str | None) -> None:
    """Run the step's inner run to its end, its lines passed on. Raises WorkerError, StoppedError."""
    left, stopped = time_left(config), threading.Event()
    if left is not None and left <= 0:
        raise StoppedError(_over(step))
    environment = {key: value for key, value in worker_environment().items() if key != "METAFLOW_FLOW_CONFIG_VALUE"}
    process = subprocess.Popen(
        command(config, run, step, origin, inherited(sys.argv)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # Ctrl-C reaches this step, which then ends the inner run in order
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        with _at(left, stopped, process):
            for line in process.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
            status = process.wait()
    finally:
        stop(process, INTERRUPTED_S)
    if stopped.is_set():
        raise StoppedError(_over(step))
    if status:
        raise WorkerError(
            f"RS step {step} failed in a run of {FLOW} of its own, whose lines are above. "
            "`python flows/rs_flow.py resume` does what it did not finish"
        )


@contextmanager
def _at(seconds: float | None, stopped: threading.Event, process: "subprocess.Popen[str]") -> Iterator[None]:
    """End the inner run in order where the body takes longer than `seconds`."""
    if seconds is None:
        yield
        return

    def end() -> None:
        stopped.set()
        with suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _unfinished(config: Config, run: RunFolder, step: int, from_sha256: str | None) -> str | None:
    """Id of the newest inner run of an RS step, where it can be resumed; None where it ended well or there is none.

    A step that is still to be trained must have been begun from the checkpoint `from_sha256`, and one that lost more
    shards than are allowed begins anew, since their tasks ended well for Metaflow.
    """
    from metaflow import Flow, namespace  # type: ignore[attr-defined]
    from metaflow.exception import MetaflowNotFound

    namespace(None)
    try:
        runs = list(Flow(FLOW).runs(*_tags(run, step)))  # type: ignore[no-untyped-call]
    except MetaflowNotFound:
        return None
    newest = max(runs, key=lambda one: one.created_at, default=None)
    if newest is None or newest.finished:
        return None
    if from_sha256 is not None:
        begun = _artifact(newest, "start", "place")
        if begun is None or begun["from_sha256"] != from_sha256:
            return None
    lost = [task for task in _tasks(newest, "rollouts") if task.finished and "lost" in task and task["lost"].data]
    return None if len(lost) > config.phases.max_lost_shards else str(newest.id)


def _artifact(inner: Any, step: str, name: str) -> Any:
    values = [task[name].data for task in _tasks(inner, step) if task.finished and name in task]
    return values[0] if values else None


def _tasks(inner: Any, step: str) -> list[Any]:
    return list(inner[step]) if step in inner else []


def _tags(run: RunFolder, step: int) -> tuple[str, str]:
    return f"parent:{run.path.name}", f"iteration:{step}"


def _told(run: RunFolder, since: int) -> list[dict[str, Any]]:
    """The records from RS step `since` on that whoever follows the run is told of."""
    return [r for r in run.read_metrics() if r["kind"] in ("step", "validation") and r["step"] >= since]


def _over(step: int) -> str:
    return (
        f"stopped in RS step {step}: loop.max_time_per_run is over. `python flows/rs_flow.py resume` goes on with what "
        "it has not finished"
    )
