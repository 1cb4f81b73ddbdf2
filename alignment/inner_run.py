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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from alignment.config import Config
from alignment.errors import CheckpointError, StoppedError, WorkerError
from alignment.launch import SOURCE_ROOT, stop, worker_environment
from alignment.lifeline import ELSEWHERE_S, INTERRUPTED_S, acting_after
from alignment.live_card import Show
from alignment.node_gpus import gpu_count
from alignment.preparation import total_steps
from alignment.rollback import end_of_loop, settle, standing_checkpoint
from alignment.run_events import listener
from alignment.run_folder import RunFolder
from alignment.run_metrics import RunProgress, after, end_progress, write_progress
from alignment.run_state import at_work
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

    `origin` is the id of an inner run of the step that did not end well.
    """

    done: int
    step: int
    total: int
    origin: str | None

    @property
    def is_left(self) -> bool:
        """Whether an inner run has to do something for the step."""
        return self.step > self.done or self.origin is not None


def iterate(config: Config, run_path: str, show: Show | None = None) -> tuple[Checkpoint, bool]:
    """The next RS step, or what is left of one that was begun; its checkpoint and whether steps are left.

    Its phases open the run by themselves, on whatever node they are; this task looks at it before and after. Where a
    step failed badly, the best checkpoint before it, and no step is left. `show` takes the run's live page, which
    changes as the step ends. Raises AlignmentError.
    """
    from models.checkpoints import newest_checkpoint

    begun = time.monotonic()
    with opened(config, run_path, writes=False) as run:
        todo = _todo(config, run)
        write_progress(run, _progress(run.read_metrics(), todo))
    if todo.is_left:
        try:
            with at_work(run, "iterate"):
                _run_step(config, run, todo.step, todo.origin)
        except StoppedError:
            end_progress(run)
            raise
    with opened(config, run_path) as run, at_work(run, "iterate"), tracker(config, run) as wandb_run:
        listen = listener(run, wandb_run, done=todo.done, total=todo.total, show=show)
        for record in untold(run.read_metrics()):
            just_done = todo.is_left and record["step"] == todo.step
            listen(record, time.monotonic() - begun if just_done else None)
        wandb_run.log_models()
        run.append_metrics({"kind": "task", "name": "iterate", "seconds": time.monotonic() - begun, "starting": 0.0})
        failed = settle(config.promotion, run)
        if failed is not None or todo.step == todo.total:
            end_progress(run)
        if failed is not None:
            print(end_of_loop(failed))
            standing = standing_checkpoint(run)
            return replace(standing, uri=run.uri_of(Path(standing.uri))), False
        checkpoint = newest_checkpoint(run.checkpoints)
        if checkpoint is None or checkpoint.step != todo.step:
            raise CheckpointError(
                f"{run.checkpoints} holds no checkpoint of RS step {todo.step}, which has just been made"
            )
        return replace(checkpoint, uri=run.uri_of(Path(checkpoint.uri))), todo.step < todo.total


def _todo(config: Config, run: RunFolder) -> _Todo:
    from models.checkpoints import newest_checkpoint

    newest, total = newest_checkpoint(run.checkpoints), total_steps(config, run.path)
    done = newest.step if newest else 0
    origin = _unfinished(config, run, done, None) if done else None
    step = done if origin or done == total or run.rollback() is not None else done + 1
    if step > done:
        origin = _unfinished(config, run, step, newest.sha256 if newest else "")
    return _Todo(done, step, total, origin)


def _progress(records: Sequence[Mapping[str, Any]], todo: _Todo) -> RunProgress:
    """Where the run stands as the step begins; the seconds of the last step are those of its whole task."""
    begun = RunProgress(todo.done, todo.total, time.time())
    steps = [r for r in records if r["kind"] == "step" and r["step"] <= todo.done]
    tasks = [r for r in records if _is_task(r)]
    return after(begun, steps[-1], begun.at, tasks[-1]["seconds"] if tasks else None) if steps else begun


def command(config: Config, run: RunFolder, step: int, origin: str | None, options: Sequence[str]) -> list[str]:
    """What runs RS step `step`, or resumes its run `origin`; `options` are Metaflow's, which stand first."""
    file = next(path for path in (SOURCE_ROOT / "flows" / FILE, SOURCE_ROOT / FILE) if path.is_file())
    phases = config.phases
    words = [sys.executable, str(file), "--watch-stdin", f"{interrupt_grace_s(config):g}", "--no-pylint", *options]
    if origin is None:
        words += ["--config-value", "config", config.model_dump_json(), "run", "--run_path", run.uri]
    else:  # a resume has the config and the parameters of its origin
        words += ["resume", "--origin-run-id", origin]
    for tag in _tags(run, step):
        words += ["--tag", tag]
    for decorator in (*phases.run_with, *(["kubernetes"] if config.kubernetes.image else [])):
        words += ["--with", decorator]
    return [*words, "--max-num-splits", str(max(SPLITS, phases.shards)), "--max-workers", str(side_by_side(config))]


def interrupt_grace_s(config: Config) -> float:
    """Seconds that an inner run gets to end in order after an interrupt."""
    return ELSEWHERE_S if config.phases_elsewhere else INTERRUPTED_S


def side_by_side(config: Config) -> int:
    """Tasks at a time: all shards where they have nodes of their own, else what this node has cores and GPUs for."""
    if config.phases_elsewhere:
        return config.phases.shards
    own = config.in_phase("rollouts").resources
    by_cores = len(os.sched_getaffinity(0)) // own.cpu
    return max(1, min(by_cores, gpu_count() // own.gpu) if own.gpu else by_cores)


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
    words = command(config, run, step, origin, inherited(sys.argv))
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # Ctrl-C reaches this step, which then ends the inner run in order
    )
    assert process.stdout is not None

    def end_in_order() -> None:
        stopped.set()
        with suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]

    try:
        with acting_after(left, end_in_order):
            for line in process.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
            status = process.wait()
    finally:
        stop(process, interrupt_grace_s(config))
    if stopped.is_set():
        raise StoppedError(_over(step))
    if status:
        raise WorkerError(
            f"RS step {step} failed in a run of {FLOW} of its own, whose lines are above. "
            "`python flows/rs_flow.py resume` does what it did not finish"
        )


def _unfinished(config: Config, run: RunFolder, step: int, from_sha256: str | None) -> str | None:
    """Id of the newest inner run of an RS step that can be resumed; None where the step ended well or there is none.

    One that was ended before it knew its place is passed over: what there is to go on from is an older one's. A step
    that is still to be trained (`from_sha256`) must have been begun from that checkpoint, and have made none: else what
    it made is gone. One that lost more shards than are allowed begins anew, since their tasks ended well for Metaflow.
    """
    from metaflow import Flow, namespace  # type: ignore[attr-defined]
    from metaflow.exception import MetaflowNotFound

    namespace(None)
    try:
        runs = list(Flow(FLOW).runs(*_tags(run, step)))  # type: ignore[no-untyped-call]
    except MetaflowNotFound:
        return None
    for one in sorted(runs, key=lambda one: one.created_at, reverse=True):
        if one.finished:
            return None
        if _fits(one, step, from_sha256):
            lost = [task for task in _tasks(one, "rollouts") if task.finished and "lost" in task and task["lost"].data]
            return None if len(lost) > config.phases.max_lost_shards else str(one.id)
    return None


def _fits(inner: Any, step: int, from_sha256: str | None) -> bool:
    place = _artifact(inner, "start", "place")
    if place is None or place["step"] != step:
        return False
    trained = any(task.finished for name in ("update", "gang_update") for task in _tasks(inner, name))
    return from_sha256 is None or (place["from_sha256"] == from_sha256 and not trained)


def _artifact(inner: Any, step: str, name: str) -> Any:
    values = [task[name].data for task in _tasks(inner, step) if task.finished and name in task]
    return values[0] if values else None


def _tasks(inner: Any, step: str) -> list[Any]:
    return list(inner[step]) if step in inner else []


def _tags(run: RunFolder, step: int) -> tuple[str, str]:
    return f"parent:{run.path.name}", f"iteration:{step}"


def untold(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a run's records those that whoever follows it has not been told of: the task that tells writes its own last.

    Another run's, which came with `resume.from`, were told there.
    """
    last = max((i for i, record in enumerate(records) if _is_task(record)), default=-1)
    return [r for r in records[last + 1 :] if r["kind"] in ("step", "validation") and "run_id" not in r]


def _is_task(record: Mapping[str, Any]) -> bool:
    return (record["kind"], record.get("name")) == ("task", "iterate")


def _over(step: int) -> str:
    return (
        f"stopped in RS step {step}: loop.max_time_per_run is over. `python flows/rs_flow.py resume` goes on with what "
        "it has not finished"
    )
