"""The colocated worker: one process per GPU (or on the CPU), started by torch.distributed.run.

It loads the policy once, then generates, scores, selects and updates in place until the iteration ends.
Rank 0 writes the run's files and reports progress as JSON lines on standard output. It never imports
Metaflow, and ends with the step that started it (see `alignment.lifeline`).

    python -m torch.distributed.run --nproc-per-node N -m alignment.worker --folder DIR --until STEP --url HOST:PORT …
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.config import Config, parse_config
from alignment.errors import AlignmentError
from alignment.lifeline import end_with_stdin
from alignment.run_folder import RunFolder

if TYPE_CHECKING:
    from alignment.rs_step import Session


def main() -> None:
    """Run RS steps up to `--until`, from wherever the last checkpoint stands."""
    options = _options()
    run = RunFolder(Path(options.folder))
    with reported_errors(), sole_writer(run):
        work(parse_config(run.config.read_text()), run, options)


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Ends with the owner; an AlignmentError goes to it as an event, and ends this process at once."""
    end_with_stdin()
    try:
        yield
    except AlignmentError as error:
        emit({"kind": "error", "type": type(error).__name__, "text": str(error)})
        os._exit(1)  # not sys.exit: peers may hang in a collective, and torch would wait for them


def sole_writer(run: RunFolder) -> contextlib.AbstractContextManager[None]:
    """Rank 0 holds the run's lock, so that no two sets of workers ever write one run."""
    return run.lock() if int(os.environ.get("RANK", "0")) == 0 else contextlib.nullcontext()


def work(config: Config, run: RunFolder, options: argparse.Namespace) -> None:
    """Build the session and run the iteration."""
    from alignment.engine import start_ranks
    from alignment.preparation import load_prompt_sets
    from alignment.rs_step import Session
    from alignment.scoring import RewardClient
    from alignment.task import ready_timeout_s
    from alignment.trainer import load_trainer
    from models.judge import load_judge

    ranks = start_ranks(threads=config.resources.threads, gpu=config.resources.gpu > 0)
    trainer = load_trainer(config, run, ranks)
    judge = load_judge(Path(options.judge))
    with RewardClient(options.url, config.reward.name, options.version, config.reward.timeout_s) as client:
        client.wait_ready(ready_timeout_s(config))
        report = emit if trainer.is_writer else _silent
        run_iteration(Session(trainer, load_prompt_sets(run.path), client, judge, report), options.until)


def run_iteration(session: "Session", until: int) -> None:
    """RS steps start + 1 … until with their validations and checkpoints; before the first, a validation of the base."""
    from alignment.rs_step import rs_step, validate
    from alignment.trainer import save_checkpoint

    trainer, loop = session.trainer, session.trainer.config.loop
    if trainer.is_writer:
        trainer.run.truncate_metrics(trainer.start or -1)  # step 0 is validated again
    if trainer.start == 0:
        _record(session, validate(session, 0))
    else:
        session.emit({"kind": "note", "text": f"continuing after RS step {trainer.start}"})
    for step in range(trainer.start + 1, until + 1):
        rs_step(session, step)
        validation = None
        if step % loop.val_check_interval == 0 or step == loop.max_steps:
            validation = validate(session, step)
            _record(session, validation)
        if step % loop.save_interval == 0 or step == until:
            save_checkpoint(trainer, step, validation=validation)


def emit(event: Mapping[str, Any]) -> None:
    """One event as a JSON line for the process that started the workers."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _silent(event: Mapping[str, Any]) -> None:
    del event


def _record(session: "Session", record: dict[str, Any]) -> None:
    if session.trainer.is_writer:
        session.trainer.run.append_metrics(record)
        session.emit(record)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="colocated worker; started by the flow")
    parser.add_argument("--folder", required=True, help="run folder")
    parser.add_argument("--until", type=int, required=True, help="last RS step of this iteration")
    parser.add_argument("--url", required=True, help="host:port of the reward server's gRPC")
    parser.add_argument("--version", required=True, help="version of the reward model")
    parser.add_argument("--judge", required=True, help="folder of the judge")
    return parser.parse_args()


if __name__ == "__main__":
    main()
