"""One RS step and one validation, as a worker runs them: generate, score, select, update, record."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from alignment.config import Config
from alignment.ensemble import Ensemble
from alignment.errors import RewardError, TrainingError
from alignment.lifeline import Stop, StopRequested
from alignment.preparation import PromptSets
from alignment.records import step_record, validation_record
from alignment.reuse import reused_rollouts
from alignment.rollouts import Lowered, generate, in_prompt_order
from alignment.step_rules import decide, step_prompts, without_rollouts
from alignment.stored_scores import StoredScores, key, known, stored_scores
from alignment.trainer import Trainer, train_step
from alignment.triton_metrics import ServerWatch
from alignment.types import Prompt, Rollout, ScoredRollout
from models.judge import Judge
from models.sampling import Sampling

Emit = Callable[[Mapping[str, Any]], None]

ANOTHER = "another worker, or scoring, had to stop"

T = TypeVar("T")


class Interrupted(Exception):
    """A rank was asked to stop, or kept from scoring, while no weights were being changed."""


class Diverged(Exception):
    """The update's loss or gradient is not finite, which all ranks see alike: they are those of all ranks together."""

    def __init__(self, error: TrainingError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True)
class Session:
    """What a colocated worker holds besides the trainer: prompts, scorers, where events go and whether to stop.

    `watch` reads the reward server's statistics on the run's own reward model, for the writer alone. `lowered`
    goes from one call of `generate` to the next, so that each step does not run out of memory anew.
    """

    trainer: Trainer
    prompts: PromptSets
    ensemble: Ensemble
    judge: Judge
    watch: ServerWatch
    emit: Emit
    stop: Stop
    lowered: Lowered = field(default_factory=Lowered)


def rs_step(session: Session, step: int) -> None:
    """RS step `step` (from 1): writes its rollouts and metrics, and leaves the policy updated.

    Raises Interrupted on all ranks, before the update, where one of them has to stop, and Diverged.
    """
    trainer = session.trainer
    prompts = step_prompts(trainer.config, session.prompts.train, step)
    source = trainer.config.reuse.rollouts
    scored, seconds = (_reused if source else _drawn)(session, prompts, step)
    cached = cache_counts(session)
    decisions = decide(trainer.config, scored)
    if trainer.is_writer:  # before the update, so that a replay finds the scores
        trainer.run.write_rollouts(step, scored, decisions)
    selected = [r for r, d in zip(scored, decisions, strict=True) if d.selected]
    begun = time.monotonic()
    session.emit({"kind": "phase", "step": step, "phase": "update", "done": 0, "total": len(selected)})
    try:
        result = train_step(trainer, selected, step)
    except TrainingError as error:
        raise Diverged(error) from error
    seconds["update"] = time.monotonic() - begun
    held = trainer.peak_gpu_bytes()
    if trainer.is_writer:
        # Nobody has asked the server for anything since the step was scored.
        served = session.watch.end()
        record = step_record(
            step,
            scored,
            decisions,
            result,
            seconds,
            judge=session.judge,
            scoring_server=served,
            scoring_cache=cached,
            lost_prompts=without_rollouts(prompts, scored),
            reused_from=source,
            gpu_memory_bytes=held,
        )
        trainer.run.append_metrics(record)
        session.emit(record)


def _drawn(session: Session, prompts: Sequence[Prompt], step: int) -> tuple[list[ScoredRollout], dict[str, float]]:
    """The step's rollouts with their scores, and the seconds of both phases."""
    trainer = session.trainer
    if trainer.is_writer:
        session.watch.begin()
    mine, seconds = _agreed(session, lambda: _scored_share(session, prompts, step))
    return in_prompt_order(trainer.gather(mine), prompts), seconds


def _reused(session: Session, prompts: Sequence[Prompt], step: int) -> tuple[list[ScoredRollout], dict[str, float]]:
    """The same from another run, which every rank reads by itself; `rollouts` are the seconds of reading."""
    trainer, begun = session.trainer, time.monotonic()
    scored = _agreed(session, lambda: reused_rollouts(trainer.run, prompts, trainer.policy.reader, step))
    return scored, {"rollouts": time.monotonic() - begun, "scoring": 0.0}


def cache_counts(session: Session) -> dict[str, int] | None:
    """Of all ranks the conversations that `reuse.scores` answered since the last call, and those that it could not."""
    mine = session.ensemble.take_counts()
    if mine is None:
        return None
    counts = session.trainer.gather([mine])
    return {key: sum(one[key] for one in counts) for key in mine}


def training_sampling(config: Config) -> Sampling:
    """How training and validation rollouts are drawn."""
    return Sampling(**{field.name: getattr(config.rollouts, field.name) for field in fields(Sampling)})


def _agreed(session: Session, work: Callable[[], T]) -> T:
    """The result of `work` on this rank. Raises Interrupted on all ranks where one has to stop.

    Ranks meet in collectives, so none may leave alone; nor begin alone, since the work may hold collectives too.
    """
    if session.trainer.any(bool(session.stop.reason)):
        raise Interrupted(session.stop.reason or ANOTHER)
    failure: Exception | None = None
    try:
        result = work()
    except (RewardError, StopRequested) as error:
        failure = error
    reason = session.stop.reason
    if session.trainer.any(failure is not None or bool(reason)):
        raise Interrupted(reason or ANOTHER) from failure
    return result


def _scored_share(
    session: Session, prompts: Sequence[Prompt], step: int
) -> tuple[list[ScoredRollout], dict[str, float]]:
    """This rank's scored rollouts. Scoring runs while the next batch generates; its seconds are those that were
    spent waiting after the last batch."""
    trainer = session.trainer
    config, stored = trainer.config, stored_scores(trainer.run, session.ensemble, step)
    begun = time.monotonic()
    pending, done, tokens = [], 0, 0
    mine = trainer.share(prompts)
    for batch in generate(
        trainer.policy,
        mine,
        samples_per_prompt=config.rollouts.num_rollouts_per_prompt,
        sampling=training_sampling(config),
        batch_tokens=config.rollouts.batch_tokens,
        stream=f"{config.seed}/step-{step}",
        with_references=config.rollouts.references == "join",
        on_note=lambda text: session.emit({"kind": "note", "text": text}),
        lowered=session.lowered,
        engine=trainer.sampler,
    ):
        session.stop.check()
        pending.append(_score(session, batch, stored))
        drawn = [r for r in batch if not r.is_reference]
        done, tokens = done + len(drawn), tokens + sum(r.num_tokens for r in drawn)
        total = len(mine) * config.rollouts.num_rollouts_per_prompt
        session.emit(
            {"kind": "phase", "step": step, "phase": "rollouts", "done": done, "total": total, "tokens": tokens}
        )
    generated = time.monotonic()
    scored = [r for collect in pending for r in collect()]
    return scored, {"rollouts": generated - begun, "scoring": time.monotonic() - generated}


def _score(session: Session, batch: Sequence[Rollout], stored: StoredScores) -> Any:
    """Begin to score a batch; the result is a function that waits for it.

    A score that an interrupted attempt at this step has stored is used again: the decisions of a replay
    must be those of the first attempt.
    """
    found = [key(r) in stored for r in batch]
    future = session.ensemble.score_in_background([r for r, k in zip(batch, found, strict=True) if not k])

    def collect() -> list[ScoredRollout]:
        new = iter(_result(session, future))
        scored = [known(session.ensemble, r, stored) if k else next(new) for r, k in zip(batch, found, strict=True)]
        return session.ensemble.compared(scored)  # a batch holds all responses of its prompts

    return collect


def _result(session: Session, future: Future[list[ScoredRollout]]) -> list[ScoredRollout]:
    """What a background task returns; a request that hangs must not keep a worker from stopping."""
    while not wait([future], timeout=0.2).done:
        session.stop.check()
    return future.result()


def validate(session: Session, step: int) -> dict[str, Any]:
    """One response to each validation prompt, scored by reward model and judge; the same numbers at every step.

    Raises Interrupted on all ranks where one of them has to stop.
    """
    begun = time.monotonic()
    trainer, prompts = session.trainer, session.prompts.validation
    session.emit({"kind": "phase", "step": step, "phase": "validation", "done": 0, "total": len(prompts)})
    mine = _agreed(session, lambda: _validation_share(session))
    scored = in_prompt_order(trainer.gather(mine), prompts)
    seconds = time.monotonic() - begun
    return validation_record(step, scored, session.judge, seconds, scoring_cache=cache_counts(session))


def _validation_share(session: Session) -> list[ScoredRollout]:
    config = session.trainer.config
    pending = []
    for batch in generate(
        session.trainer.policy,
        session.trainer.share(session.prompts.validation),
        samples_per_prompt=1,
        sampling=training_sampling(config),
        batch_tokens=config.rollouts.batch_tokens,
        stream=f"{config.seed}/validation",
        on_note=lambda text: session.emit({"kind": "note", "text": text}),
        lowered=session.lowered,
        engine=session.trainer.sampler,
    ):
        session.stop.check()
        pending.append(session.ensemble.score_in_background(batch))
    return [r for future in pending for r in _result(session, future)]
