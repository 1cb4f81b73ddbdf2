"""Rollouts on a GPU: beside `generate` and the card's limit, their kernels, and reading more prompt at once."""

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.card import held_bytes, kernels, least_rollout_seconds, most_bytes, ratio
from benchmarks.gpu_run import MB, Found, Run
from benchmarks.rollouts import UNDRAWN, Bench, workload
from benchmarks.rounds import Way
from models import shared_rows
from models.row_kinds import rows_for
from models.rows import longest_first

PREFILL_TOKENS = (512, 4096, 16384)
PROFILED_TOKENS = 8


def rollouts_small(run: Run) -> Found:
    """The CPU benchmark's workload: `generate` with 32 rows a batch, as on the CPU."""
    return _rollouts(run, "rollouts", run.sizes.small)


def rollouts_large(run: Run) -> Found:
    """As many rows for both ways as there are responses."""
    return _rollouts(run, "rollouts, large", run.sizes.large)


def _rollouts(run: Run, title: str, sizes: tuple[int, int, int, int]) -> Found:
    """Ours over `generate`, and ours over the least time that the card allows."""
    prompts, samples, tokens, rows = sizes
    texts, numbers = workload(prompts, samples, tokens, vocabulary=run.sizes.model["vocab_size"])
    room = sum(map(len, texts)) * 2 + prompts * samples * tokens  # all side by side, prompts at the widest one's width
    bench = Bench(run.model(), texts, numbers, run.rounds, run.note, rows, room)
    ways: dict[str, Way] = {"ours": bench.ours, "generate": bench.generate}
    seconds = run.seconds(title, ways, 0.5)
    least = least_rollout_seconds(run.card, bench.model, list(map(len, texts)), samples=samples, tokens=tokens)
    drawn, held = prompts * samples * tokens, held_bytes(run.card)
    return {
        "rollouts_vs_generate": ratio(seconds["generate"], seconds["ours"]),
        "rollouts_share_of_limit": ratio([least] * run.rounds, seconds["ours"]),
        "workload": f"{prompts} prompts x {samples} samples x {tokens} tokens, generate with {rows} rows",
        "least_seconds": least,
        "seconds": seconds,
        "tokens_per_second": {name: drawn / statistics.median(found) for name, found in seconds.items()},
        "peak_mb_beside_the_weights": {n: (most_bytes(run.card, way) - held) / MB for n, way in ways.items()},
    }


def rollouts_kernels(run: Run) -> Found:
    """Why: how many kernels a few tokens of `large` launch, and how busy they keep the card, under the profiler."""
    prompts, samples, _, rows = run.sizes.large
    texts, numbers = workload(prompts, samples, PROFILED_TOKENS, vocabulary=run.sizes.model["vocab_size"])
    room = sum(map(len, texts)) * 2 + prompts * samples * PROFILED_TOKENS
    bench = Bench(run.model(), texts, numbers, 1, run.note, rows, room)
    found = {}
    for name, way in (("ours", bench.ours), ("generate", bench.generate)):
        way()
        found[name] = kernels(run.card, way)
    return {"tokens": PROFILED_TOKENS, **found}


def prefill(run: Run) -> Found:
    """Reading prompts `PREFILL_TOKENS` at a time: what more at once gives over the first number of them."""
    model, found = run.model(), {}
    for shortest, longest in run.sizes.prompt_lengths:
        of = {"shortest": shortest, "longest": longest, "vocabulary": run.sizes.model["vocab_size"]}
        texts, _ = workload(run.sizes.large[0], 1, 1, **of)
        seconds: dict[int, list[float]] = {size: [] for size in PREFILL_TOKENS}
        for round_number in range(run.rounds + 1):  # the first one warms up
            for size in PREFILL_TOKENS:
                took = _prefill_seconds(run, model, texts, size)
                if round_number:
                    seconds[size].append(took)
        found[f"{len(texts)} prompts of {shortest} to {longest} tokens"] = {
            "seconds": seconds,
            "times_faster_than_the_first": {n: ratio(seconds[PREFILL_TOKENS[0]], seconds[n]) for n in PREFILL_TOKENS},
        }
        run.note(f"prefill of {longest} tokens at most: {seconds}")
    return found


@torch.inference_mode()
def _prefill_seconds(run: Run, model: Any, texts: Sequence[Sequence[int]], size: int) -> float:
    with patch.dict(shared_rows.PREFILL_TOKENS, {model.device.type: size}):
        room = len(texts) * (max(map(len, texts)) + 1)
        rows = rows_for(model, texts, 1, 1, budget=room, pad_id=UNDRAWN)
        waiting: deque[Any] = longest_first(texts, 1)
        begun = run.card.clock()
        rows.begin(waiting)
        assert not waiting
        return run.card.clock() - begun
