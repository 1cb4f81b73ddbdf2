"""The colocated worker: one process per GPU (or on the CPU), started by torch.distributed.run.

It loads the policy once, then generates, scores, selects and updates in place until the iteration ends.
Rank 0 writes the run's files and reports progress as JSON lines on standard output. It never imports
Metaflow. When its owner ends, or it is asked to stop, it saves what the last finished RS step left and ends
(see `alignment.lifeline`).

    python -m torch.distributed.run --nproc-per-node N -m alignment.worker --folder DIR --until STEP --url HOST:PORT …
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.config import Config
from alignment.errors import AlignmentError
from alignment.lifeline import Stop, StopRequested
from alignment.run_folder import RunFolder
from alignment.types import RewardModelRef
from alignment.unchanged import read_run_config

if TYPE_CHECKING:
    from alignment.rs_step import Session

ANOTHER = "another worker had to stop"
"""Reason of a worker that stops because its peers do."""


def main() -> None:
    """Run RS steps up to `--until`, from wherever the last checkpoint stands, or until asked to stop."""
    options = _options()
    run = RunFolder(Path(options.folder))
    stoppable(run, options.ends_at, lambda config, stop: work(config, run, options, stop))


def stoppable(run: RunFolder, ends_at: float | None, work: Callable[[Config, Stop], None]) -> None:
    """`work` under the config of `run`, as its sole writer, to its end or until asked to stop; errors are reported."""
    with reported_errors():
        config = read_run_config(run)
        stop = Stop(grace_s=config.loop.stop_grace_s, ends_at=ends_at)
        stop.listen()
        # Workers that lost their owner may still be saving their last checkpoint.
        with sole_writer(run, wait_s=config.loop.stop_grace_s):
            work(config, stop)


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """An AlignmentError goes to the owner as an event, and ends this process at once."""
    try:
        yield
    except AlignmentError as error:
        emit({"kind": "error", "type": type(error).__name__, "text": str(error)})
        os._exit(1)  # not sys.exit: peers may hang in a collective, and torch would wait for them


def sole_writer(run: RunFolder, *, wait_s: float = 0.0) -> contextlib.AbstractContextManager[None]:
    """Rank 0 holds the run's lock, so that no two sets of workers ever write one run."""
    return run.lock(wait_s=wait_s) if int(os.environ.get("RANK", "0")) == 0 else contextlib.nullcontext()


def work(config: Config, run: RunFolder, options: argparse.Namespace, stop: Stop) -> None:
    """Build the session and run the iteration."""
    from alignment.engine import start_ranks
    from alignment.preparation import load_prompt_sets
    from alignment.rs_step import Session
    from alignment.task import check_scoring, ready_timeout_s, scoring_clients, scoring_models
    from alignment.trainer import load_trainer
    from alignment.triton_metrics import ServerWatch
    from models.judge import load_judge

    ranks = start_ranks(threads=config.resources.threads, gpu=config.resources.gpu > 0)
    trainer = load_trainer(config, run, ranks)
    judge = load_judge(Path(options.judge))
    report = emit if trainer.is_writer else _silent
    reward = RewardModelRef(**json.loads(options.reward_model))
    models = scoring_models(config, run, reward)

    def note(text: str) -> None:
        report({"kind": "note", "text": text})

    with (
        scoring_clients(config, options.url, models, check=stop.check) as ensemble,
        ServerWatch(options.url, reward.name, reward.version, options.metrics_url, note) as watch,
    ):
        with contextlib.suppress(StopRequested):
            if trainer.is_writer:
                for client, model in zip(ensemble.clients, models.all, strict=True):
                    check_scoring(config, client, model, note)
            else:
                ensemble.wait_ready(ready_timeout_s(config))
        if trainer.any(bool(stop.reason)):  # all ranks or none
            report({"kind": "stopped", "step": trainer.start, "reason": stop.reason or ANOTHER})
            return
        prompts = load_prompt_sets(run.path)
        run_iteration(Session(trainer, prompts, ensemble, judge, watch, report, stop), options.until)


def run_iteration(session: "Session", until: int) -> None:
    """RS steps start + 1 … until with their validations and checkpoints; none after one that failed badly.

    Asked to stop, or without a reward server, it saves what the last finished step left before it ends.
    """
    from alignment.rollback import settle_diverged
    from alignment.rs_step import Diverged, Interrupted, rs_step, validate
    from alignment.trainer import save_checkpoint

    trainer, config = session.trainer, session.trainer.config
    _go_on(session)
    trained = saved = trainer.start
    try:
        if config.validates(trained, trainer.total_steps) and not trainer.validated:
            _record(session, validate(session, trained))  # the base's, or one that was interrupted
        failed = _failed(session)
        while trained < until and not failed:
            step = trained + 1
            rs_step(session, step)
            trained = step
            failed = _failed(session)
            if config.validates(step, trainer.total_steps) and not failed:
                _record(session, validate(session, step))
                failed = _failed(session)
            if step % config.loop.save_interval == 0 or step == until or failed:
                begun = time.monotonic()
                save_checkpoint(trainer, step)
                saved = step
                session.emit({"kind": "checkpoint", "step": step, "seconds": time.monotonic() - begun})
    except Interrupted as interrupted:
        if trained > saved:
            save_checkpoint(trainer, trained)
        if isinstance(interrupted.__cause__, AlignmentError):
            raise interrupted.__cause__ from None
        session.emit({"kind": "stopped", "step": trained, "reason": str(interrupted)})
    except Diverged as diverged:
        if not saved:  # there is nothing to go back to
            raise diverged.error from None
        if trainer.is_writer:
            settle_diverged(trainer.run, trained + 1, diverged.error)


def _failed(session: "Session") -> bool:
    """Whether the newest RS step failed badly, so that the loop is over; the same on all ranks."""
    from alignment.rollback import settle

    trainer = session.trainer
    return trainer.any(trainer.is_writer and settle(trainer.config.promotion, trainer.run) is not None)


def _go_on(session: "Session") -> None:
    """Forget what was recorded after the checkpoint, say where the run goes on and that its work begins."""
    from alignment.provenance import forget_manifests
    from models.checkpoints import sweep

    trainer = session.trainer
    if trainer.is_writer:
        trainer.run.truncate_metrics(trainer.start)
        forget_manifests(trainer.run, trainer.start)
        sweep(trainer.run.checkpoints)
    if trainer.start:
        session.emit({"kind": "note", "text": f"continuing after RS step {trainer.start}"})
    if trainer.lost_moments:
        session.emit({"kind": "note", "text": trainer.lost_moments})
    session.emit({"kind": "ready"})


def emit(event: Mapping[str, Any]) -> None:
    """One event as a JSON line for the process that started the workers, as long as it listens."""
    with contextlib.suppress(BrokenPipeError):  # the owner has ended: the lifeline sees to that
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
    parser.add_argument("--metrics-url", help="where a local reward server tells its metrics")
    parser.add_argument("--reward-model", required=True, help="RewardModelRef of the version that scores, JSON")
    parser.add_argument("--judge", required=True, help="folder of the judge")
    parser.add_argument("--ends-at", type=float, help="Unix time at which to stop with a checkpoint")
    return parser.parse_args()


if __name__ == "__main__":
    main()
