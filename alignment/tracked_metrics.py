"""The numbers that are drawn of a run, by the names of W&B and TensorBoard, and where its records hold them.

All stand against `rs/step`. The names follow NeMo-Aligner's families (`train_rollouts/`, `train_optim/`,
`val_rollouts/`, `timers/`), so that charts of both lie side by side; `scoring_server/` is Triton's own statistics and
`scoring_cache/` what kept scores answered. docs/dashboards.md shows the table below; a test compares the two.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STEP = "rs/step"
FAMILIES = ("train_rollouts", "train_optim", "val_rollouts", "timers", "scoring_server", "scoring_cache")

Points = dict[str, float]


@dataclass(frozen=True, slots=True)
class Metric:
    """A number by its name; `path` leads to it in a record of kind `record`, dotted. A name that ends in `*` stands
    for all that lie at `path`, one name each: models, or n of best-of-n. `path` is empty for what is computed here."""

    name: str
    record: str
    path: str
    meaning: str


def _step(name: str, path: str, meaning: str) -> Metric:
    return Metric(name, "step", path, meaning)


def _validation(name: str, path: str, meaning: str) -> Metric:
    return Metric(name, "validation", path, meaning)


METRICS = (
    _step("train_rollouts/global_rewards", "reward_mean", "mean reward of all rollouts"),
    _step("train_rollouts/selected_rewards", "selected_reward_mean", "mean reward of the selected rollouts"),
    _step("train_rollouts/selection_lift", "", "selected_rewards less global_rewards"),
    _step(
        "train_rollouts/best_of_n/*",
        "best_of_n",
        "expected best reward of n of a prompt's responses",
    ),
    _step("train_rollouts/judge_mean", "judge_mean", "mean score by the judge, which selects nothing, of all rollouts"),
    _step("train_rollouts/selected_judge_mean", "selected_judge_mean", "the same of the selected rollouts"),
    _step("train_rollouts/member_means/*", "member_means", "mean score by each member of a reward of several models"),
    _step("train_rollouts/selected_member_means/*", "selected_member_means", "the same of the selected rollouts"),
    _step("train_rollouts/shadow_means/*", "shadow_means", "mean reward by each shadow model, which selects nothing"),
    _step("train_rollouts/selected_shadow_means/*", "selected_shadow_means", "the same of the selected rollouts"),
    _step("train_rollouts/entropy", "entropy", "nats per response token, by the mean −log p of the tokens drawn"),
    _step("train_rollouts/global_prompt_lengths", "prompt_length_mean", "tokens of a prompt, mean"),
    _step("train_rollouts/global_response_lengths_mean", "response_length_mean", "tokens of a response, mean"),
    _step(
        "train_rollouts/selected_response_lengths_mean",
        "selected_response_length_mean",
        "the same of the selected rollouts",
    ),
    _step("train_rollouts/truncated_fraction", "truncated_fraction", "share of responses cut at max_new_tokens"),
    _step("train_rollouts/duplicate_fraction", "duplicate_fraction", "share of responses that repeat another one"),
    _step("train_rollouts/num_rollouts", "num_rollouts", "responses drawn"),
    _step("train_rollouts/num_selected", "num_selected", "responses selected"),
    _step("train_rollouts/tokens_per_second", "tokens_per_second", "response tokens drawn per second of the rollouts"),
    _step("train_optim/loss", "loss", "nats per response token, a KL penalty included"),
    _step("train_optim/kl", "kl", "KL to the base on the texts trained on, nats per response token; with a KL penalty"),
    _step("train_optim/grad_norm", "grad_norm", "largest gradient norm of the step, before clipping"),
    _step("train_optim/lr", "lr", "learning rate"),
    _step("train_optim/optimizer_steps", "optimizer_steps", "optimizer steps of the RS step"),
    _step("train_optim/response_tokens", "response_tokens", "tokens learned"),
    _step("train_optim/tokens_per_second", "", "tokens learned per second of the update"),
    _step("train_optim/gpu_memory_gb", "", "most that a worker's GPU held in the step, 10⁹ bytes; on GPUs"),
    _step("timers/rollout_time", "seconds.rollouts", "seconds of the rollouts"),
    _step("timers/scoring_time", "seconds.scoring", "seconds of waiting for scores after the last rollout"),
    _step("timers/train_time", "seconds.update", "seconds of the update"),
    _step("scoring_server/mean_batch", "scoring_server.mean_batch", "conversations in a batch of Triton, mean"),
    _step("scoring_server/queue_ms", "scoring_server.queue_ms", "milliseconds that a request waited in Triton, mean"),
    _step("scoring_server/compute_ms", "scoring_server.compute_ms", "milliseconds that it was computed, mean"),
    _step("scoring_server/failures", "scoring_server.failures", "requests that failed"),
    _step(
        "scoring_server/real_over_padded",
        "scoring_server.real_over_padded",
        "share of computed tokens, no padding",
    ),
    _step("scoring_server/restarted", "scoring_server.restarted", "1 where the server was started again in the step"),
    _step("scoring_cache/hits", "scoring_cache.hits", "conversations whose scores were kept"),
    _step("scoring_cache/misses", "scoring_cache.misses", "conversations that the server had to score"),
    _validation("val_rollouts/global_rewards", "reward_mean", "mean reward of the validation's responses"),
    _validation("val_rollouts/judge", "judge_mean", "mean score by the judge of the same"),
    _validation("val_rollouts/member_means/*", "member_means", "mean score by each member of the same"),
    _validation("val_rollouts/shadow_means/*", "shadow_means", "mean reward by each shadow model of the same"),
    _validation("timers/validation_time", "seconds", "seconds of the validation"),
)
HISTOGRAMS = {
    "train_rollouts/rewards": "rewards of all rollouts of the step",
    "train_rollouts/selected_rewards_histogram": "rewards of the selected ones",
    "train_rollouts/response_lengths": "tokens of all responses of the step",
}
SAMPLES = "train_rollouts/samples"
"""The table of sampled responses."""


def points(record: Mapping[str, Any]) -> Points:
    """What a record of kind "step" or "validation" gives to be drawn; what it lacks, or holds as None, is left out."""
    found: dict[str, Any] = {}
    for metric in METRICS:
        if metric.record != record["kind"] or not metric.path:
            continue
        value = _at(record, metric.path)
        if metric.name.endswith("/*"):
            several = _powers(value or []) if metric.path == "best_of_n" else value or {}
            found |= {f"{metric.name.removesuffix('*')}{key}": one for key, one in several.items()}
        else:
            found[metric.name] = value
    if record["kind"] == "step":
        found |= _computed(record)
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def is_known(name: str) -> bool:
    """Whether `name` is one that a run may log."""
    if name in {metric.name for metric in METRICS} | set(HISTOGRAMS) | {SAMPLES, STEP}:
        return True
    several = (metric.name.removesuffix("*") for metric in METRICS if metric.name.endswith("/*"))
    return any(name.startswith(family) for family in several)


def _computed(record: Mapping[str, Any]) -> dict[str, float | None]:
    everyone, chosen, held = (record.get(key) for key in ("reward_mean", "selected_reward_mean", "gpu_memory_bytes"))
    tokens, seconds = record.get("response_tokens"), _at(record, "seconds.update")
    return {
        "train_rollouts/selection_lift": None if chosen is None or everyone is None else chosen - everyone,
        "train_optim/tokens_per_second": tokens / seconds if tokens and seconds else None,
        "train_optim/gpu_memory_gb": None if held is None else held / 1e9,
    }


def _at(record: Mapping[str, Any], path: str) -> Any:
    value: Any = record
    for key in path.split("."):
        value = None if value is None else value.get(key)
    return value


def _powers(curve: list[float]) -> dict[int, float]:
    """The expected best of 1, 2, 4, … and of all: a chart holds few lines."""
    sizes = [n for n in (2**k for k in range(len(curve).bit_length())) if n < len(curve)]
    return {n: curve[n - 1] for n in (*sizes, *([len(curve)] if curve else []))}
