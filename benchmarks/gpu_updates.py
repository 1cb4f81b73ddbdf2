"""Updates on a GPU: beside plain loops in torch and the card's rate, what spares memory, and the state that moves."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignment.config_training import TrainingSection
from alignment.hosted_optimizer import HostedOptimizer
from alignment.types import Rollout
from benchmarks.card import held_bytes, most_bytes, ratio
from benchmarks.gpu_run import DTYPE, MB, Found, Run
from benchmarks.peers.plain_torch import PlainLoop
from benchmarks.rounds import Way
from benchmarks.update_setup import TRAINING, engine_for, matrix_rate, operations, uniform_rollouts, updating

LOSS_TOLERANCE = 0.05
"""In bfloat16 two ways' losses of about 10 nats differ by rounding."""
MICRO_BATCH = 8


def updates_small(run: Run) -> Found:
    """8 sequences of 256 tokens: what a step costs apart from its operations shows."""
    return _updates(run, *run.sizes.updates[0])


def updates_large(run: Run) -> Found:
    """32 sequences of 1024 tokens in micro-batches of 8."""
    return _updates(run, *run.sizes.updates[1])


def _updates(run: Run, count: int, length: int) -> Found:
    """One step of ours, without ZeRO, over plain loops; and the share of the card's rate that its operations make."""
    examples = uniform_rollouts(count, length, vocabulary=run.sizes.model["vocab_size"])

    def plain(**how: Any) -> Way:
        size = {"micro_batch_size": MICRO_BATCH, "device": run.device}
        return PlainLoop(run.folder, examples, **size, **how).step

    makers = {
        "ours": _ours(run, examples),
        "float32 under autocast": lambda: plain(dtype="float32", autocast=True),
        "bfloat16 without masters": lambda: plain(dtype=DTYPE),
    }
    seconds, memory = _measured(run, f"update, {count} x {length} tokens", makers)
    done, median = operations(run.folder, examples), statistics.median(seconds["ours"])
    return {
        "update_vs_plain_torch": {name: ratio(seconds[name], seconds["ours"]) for name in makers if name != "ours"},
        "model_flop_utilisation": done / median / run.card.rate,
        "share_of_the_models_own_shapes": done
        / median
        / matrix_rate(run.folder, min(count, MICRO_BATCH) * length, device=run.device, dtype=DTYPE),
        "workload": f"{count} x {length} tokens, micro-batches of {MICRO_BATCH}",
        "tokens_per_second": count * length / median,
        "seconds": seconds,
        "memory_mb": memory,
    }


def update_memory(run: Run) -> Found:
    """What spares memory in an update, beside the same without it: seconds and the most memory."""
    count, length = run.sizes.updates[1]
    examples = uniform_rollouts(count, length, vocabulary=run.sizes.model["vocab_size"])
    makers = {
        "plain": _ours(run, examples),
        "gradient_checkpointing": _ours(run, examples, gradient_checkpointing=True),
        "zero_stage=2": _ours(run, examples, zero_stage=2),
        "zero_stage=2, offload_optimizer": _ours(run, examples, zero_stage=2, offload_optimizer=True),
    }
    seconds, memory = _measured(run, "update, ways to spare memory", makers)
    speed = {name: ratio(seconds["plain"], seconds[name]) for name in makers}
    return {"speed_of_plain": speed, "seconds": seconds, "memory_mb": memory}


def state_moves(run: Run) -> Found:
    """`training.offload_during_rollouts`: seconds that AdamW's state takes to the host and back, and what it frees."""
    training = TrainingSection.model_validate(TRAINING)
    hosted = HostedOptimizer(engine_for(run.model(), training))
    away, back = [], []
    for _ in range(run.rounds + 1):  # the first one allocates the host's copies
        held, begun = held_bytes(run.card), run.card.clock()
        moved = hosted.put_away()
        away.append(run.card.clock() - begun)
        freed, begun = held - held_bytes(run.card), run.card.clock()
        hosted.bring_back()
        back.append(run.card.clock() - begun)
    return {"moved_mb": moved / MB, "freed_mb": freed / MB, "away_seconds": away, "back_seconds": back}


def _ours(run: Run, examples: Sequence[Rollout], **settings: Any) -> Callable[[], Way]:
    def make() -> Way:
        return updating(run.folder, examples, MICRO_BATCH, device=run.device, dtype=DTYPE, **settings)

    return make


def _measured(
    run: Run, title: str, makers: Mapping[str, Callable[[], Way]]
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Seconds of each way's rounds, and its memory in MB: what it holds between steps, and the most within one."""
    ways, memory = {}, {}
    for name, make in makers.items():
        run.note(f"{title}: {name} begins")
        before = held_bytes(run.card)
        way = ways[name] = make()
        way()  # moments and gradients come with the first step
        held = held_bytes(run.card)
        memory[name] = {"held": (held - before) / MB, "peak": (most_bytes(run.card, way) - before) / MB}
    return run.seconds(title, ways, LOSS_TOLERANCE), memory
