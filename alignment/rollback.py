"""The end of a loop before its last step: an RS step that failed badly is rolled back to the best checkpoint before it.

Three rules, looked at after each RS step and each validation:

finite      the update's loss or gradient is not finite, and there is a checkpoint to go back to; without one the run
            ends with a TrainingError, as it does where the policy's probabilities are not finite while it samples;
kl          the KL to the base of the texts that the step trained on is above `promotion.max_kl_per_token`;
validation  the mean reward has fallen below that of the best validation before, the base's among them, by more than
            `promotion.max_validation_fall` standard deviations of the first validation's rewards: the 95 % interval of
            the mean fall, a paired bootstrap over prompts, lies above the bound.

The best of several validations is best by chance too, and a fall from it a little too large: by far less than the bound
should be. With fewer than LEAST_PROMPTS prompts, or scores for none, there is no interval and no fall. Steps that came
with `resume.from` are that run's past and fail no more.

What failed is one record in metrics.jsonl, of the kind "rollback", and a function of the records before it: a writer
killed before it wrote it down does so when the run is resumed. From then on the run does no further RS step, whoever
resumes it. The failed step's own checkpoint, where it left one, is kept to be looked at, and is nobody's best.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignment.config_promotion import PromotionSection
from alignment.errors import CheckpointError, TrainingError
from alignment.run_folder import RunFolder
from alignment.statistics import LEAST_PROMPTS, paired_bootstrap, spread
from alignment.types import Checkpoint

Record = Mapping[str, Any]


def settle(config: PromotionSection, run: RunFolder) -> dict[str, Any] | None:
    """Why the run's loop is over, written down where that has not been done yet; None where it may go on."""
    records = run.read_metrics()
    found = next((r for r in records if r.get("kind") == "rollback"), None)
    if found is None:
        found = first_failure(config, records)
        if found is not None:
            run.append_metrics(found)
    return found


def settle_diverged(run: RunFolder, step: int, error: TrainingError) -> None:
    """Write down, once, that RS step `step` left numbers that are not finite."""
    if run.rollback() is None:
        run.append_metrics(_record(step, "finite", None, None, f"RS step {step} failed: {error}"))


def standing_checkpoint(run: RunFolder) -> Checkpoint:
    """What the run has come to, verified: its best checkpoint by validation, of those before a step that failed badly.

    Where such a step left the only checkpoint, it is that one. Raises CheckpointError where there is none.
    """
    from models.checkpoints import best_checkpoint

    found = best_checkpoint(run.checkpoints, run.validations(), run.failed_step())
    if found is None:
        raise CheckpointError(f"{run.checkpoints} holds no finished checkpoint: resume the run")
    return found


def end_of_loop(failed: Record) -> str:
    """A line on a run whose loop is over."""
    return (
        f"the loop ends here, and the best checkpoint before RS step {failed['step']} is evaluated: {failed['reason']}"
    )


def first_failure(config: PromotionSection, metrics: Sequence[Record]) -> dict[str, Any] | None:
    """The rollback record that these records of metrics.jsonl call for; None where no step failed badly."""
    validations: list[Record] = []
    for record in metrics:
        found = None
        if record.get("kind") == "step":
            found = _by_kl(config.max_kl_per_token, record)
        elif record.get("kind") == "validation" and _scored(record):
            found = _by_validation(config.max_validation_fall, validations, record)
            validations.append(record)
        if found is not None and "run_id" not in record:
            return found
    return None


def _by_kl(bound: float | None, record: Record) -> dict[str, Any] | None:
    kl = record.get("kl")
    if bound is None or kl is None or kl <= bound:
        return None
    return _record(
        record["step"],
        "kl",
        kl,
        bound,
        f"the texts that RS step {record['step']} trained on have a KL to the base of {kl:.3g} nats per token, above "
        f"promotion.max_kl_per_token ({bound:g})",
    )


def _by_validation(bound: float | None, earlier: Sequence[Record], now: Record) -> dict[str, Any] | None:
    """The fall from the best of the validations before, in standard deviations of the first one's rewards."""
    comparable = [r for r in earlier if len(r["rewards"]) == len(now["rewards"])]
    if bound is None or not comparable or len(now["rewards"]) < LEAST_PROMPTS:
        return None
    best = max(comparable, key=lambda r: float(np.mean(r["rewards"])))  # the first of equals
    fall = np.subtract(best["rewards"], now["rewards"])
    falls = fall / spread(comparable[0]["rewards"], np.concatenate([best["rewards"], now["rewards"]]))
    value = float(falls.mean())
    if value <= bound:
        return None
    low, high = paired_bootstrap(falls)
    if low <= bound:
        return None
    return _record(
        now["step"],
        "validation",
        value,
        bound,
        f"the mean reward of the validation after RS step {now['step']} lies {value:.2f} standard deviations (95% "
        f"{low:.2f} to {high:.2f}) below that after RS step {best['step']}, more than promotion.max_validation_fall "
        f"({bound:g})",
        [low, high],
    )


def _scored(record: Record) -> bool:
    """Whether a validation has a finite score for each prompt: null stands for another number in metrics.jsonl."""
    rewards = record.get("rewards") or ()
    return len(rewards) > 0 and all(isinstance(reward, int | float) for reward in rewards)


def _record(
    step: int, rule: str, value: float | None, bound: float | None, reason: str, ci95: list[float] | None = None
) -> dict[str, Any]:
    return {
        "kind": "rollback",
        "step": step,
        "rule": rule,
        "value": value,
        "ci95": ci95,
        "bound": bound,
        "reason": reason,
    }
