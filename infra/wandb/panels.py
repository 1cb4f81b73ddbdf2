"""The charts of the dashboard, by the names of `alignment.tracked_metrics`; no W&B in here."""

from collections.abc import Sequence
from dataclasses import dataclass

from alignment.tracked_metrics import SAMPLES


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines of some numbers against the RS step.

    `families` are beginnings of names of which all are drawn. `is_media` is for tables and histograms.
    """

    title: str
    names: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    is_media: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """Charts that answer one question; `text` says how to read them."""

    title: str
    text: str
    charts: Sequence[Chart]


def _train(*names: str) -> tuple[str, ...]:
    return tuple(f"train_rollouts/{name}" for name in names)


SECTIONS = (
    Section(
        "Does it improve?",
        "The validation's prompts train nothing. The judge selects nothing: where the reward rises and the judge does "
        "not, the policy exploits the reward model.",
        (
            Chart("Validation: reward", ("val_rollouts/global_rewards",)),
            Chart("Validation: judge", ("val_rollouts/judge",)),
            Chart("Validation: shadows", families=("val_rollouts/shadow_means/",)),
            Chart("Rollouts: reward, all and selected", _train("global_rewards", "selected_rewards")),
            Chart("Rollouts: judge, all and selected", _train("judge_mean", "selected_judge_mean")),
            Chart("Rollouts: shadows", families=_train("shadow_means/", "selected_shadow_means/")),
        ),
    ),
    Section(
        "What does selection give?",
        "The lift is what the selected responses are above all. Best of n says what more rollouts a prompt would add.",
        (
            Chart("Selection lift", _train("selection_lift")),
            Chart("Expected best reward of n responses", families=_train("best_of_n/")),
            Chart("Rewards", _train("rewards", "selected_rewards_histogram"), is_media=True),
            Chart("Sampled responses and decisions", (SAMPLES,), is_media=True),
        ),
    ),
    Section(
        "What becomes of the responses?",
        "Falling entropy with rising duplicates is a policy that says one thing; rising lengths are often a reward "
        "model that likes them.",
        (
            Chart("Entropy, nats per token", _train("entropy")),
            Chart("Truncated and duplicate share", _train("truncated_fraction", "duplicate_fraction")),
            Chart(
                "Response tokens, all and selected",
                _train("global_response_lengths_mean", "selected_response_lengths_mean"),
            ),
            Chart("Response lengths", _train("response_lengths"), is_media=True),
        ),
    ),
    Section(
        "The update",
        "A gradient norm that grows before the loss does is the first sign of a learning rate that is too high.",
        (
            Chart("Loss, nats per token", ("train_optim/loss",)),
            Chart("KL to the base, nats per token", ("train_optim/kl",)),
            Chart("Gradient norm", ("train_optim/grad_norm",)),
            Chart("Learning rate", ("train_optim/lr",)),
            Chart("Tokens learned", ("train_optim/response_tokens",)),
        ),
    ),
    Section(
        "Where the time goes",
        "Scoring overlaps with the rollouts: its time is what remained to wait for.",
        (
            Chart(
                "Seconds by phase",
                ("timers/rollout_time", "timers/scoring_time", "timers/train_time", "timers/validation_time"),
            ),
            Chart("Tokens drawn per second", _train("tokens_per_second")),
            Chart("Tokens learned per second", ("train_optim/tokens_per_second",)),
            Chart("GPU memory, 10⁹ bytes", ("train_optim/gpu_memory_gb",)),
        ),
    ),
    Section(
        "The reward server",
        "Queue time that grows with full batches asks for another instance; small batches for more rollouts at a time.",
        (
            Chart("Conversations in a batch", ("scoring_server/mean_batch",)),
            Chart("Milliseconds queued and computed", ("scoring_server/queue_ms", "scoring_server/compute_ms")),
            Chart("Share of tokens that are no padding", ("scoring_server/real_over_padded",)),
            Chart("Failures and restarts", ("scoring_server/failures", "scoring_server/restarted")),
            Chart("Scores kept and asked for", ("scoring_cache/hits", "scoring_cache/misses")),
        ),
    ),
)
