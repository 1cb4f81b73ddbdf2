"""Rollouts and updates on a GPU: against transformers' `generate`, a plain loop in torch, and the card's own limit.

    python -m benchmarks.gpu [--only NAME …] [--rounds N] [--out FILE]
    python -m benchmarks.gpu --tiny        the same on a CPU with a tiny model: that it runs, no numbers to quote

A Llama of 0.56 billion random weights in bfloat16, built here. Ways of one comparison take turns in one process, with
the card's queue empty at each reading of the clock; a ratio above 1 is in favour of the first way named. The file is
written after each measurement, so that what was measured is kept whatever ends the command. A measurement that fails is
noted in it with its error, the others go on, and the command then returns 1.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from alignment.atomic_files import write_json
from alignment.types import Rollout
from benchmarks.card import Card, held_bytes, kernels, least_rollout_seconds, measured_card, most_bytes, ratio
from benchmarks.gpu_model import HALF_BILLION, TINY, write_policy
from benchmarks.peers.plain_torch import PlainLoop
from benchmarks.results import LATEST, noted
from benchmarks.rollouts import UNDRAWN, Bench, workload
from benchmarks.rounds import Note, Way, interleaved
from benchmarks.update_setup import matrix_rate, operations, start_alone, uniform_rollouts, updating
from models import shared_rows
from models.memory import release_memory
from models.quiet import quiet_transformers
from models.rows import longest_first

DTYPE = "bfloat16"
THREADS = 8
LOSS_TOLERANCE = 0.05
"""In bfloat16 two ways' losses of about 10 nats differ by rounding."""
MICRO_BATCH = 8
PREFILL_TOKENS = (512, 4096, 16384)
PROFILED_TOKENS = 8
MB = 1e6

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured. Rollouts: prompts, samples, tokens, rows of `generate`. Updates: sequences, tokens of each."""

    model: Mapping[str, int]
    copied: int
    side: int
    small: tuple[int, int, int, int]
    large: tuple[int, int, int, int]
    updates: tuple[tuple[int, int], ...]
    prompt_lengths: tuple[tuple[int, int], ...]
    """Shortest and longest prompt of each measurement of reading `large` many prompts."""


GPU = Sizes(
    model=HALF_BILLION,
    copied=2**30,
    side=8192,
    small=(16, 8, 64, 32),
    large=(64, 16, 256, 1024),
    updates=((8, 256), (32, 1024)),
    prompt_lengths=((40, 200), (400, 2000)),
)
CPU = Sizes(
    model=TINY,
    copied=2**20,
    side=64,
    small=(4, 2, 6, 4),
    large=(4, 4, 8, 16),
    updates=((3, 16), (8, 24)),
    prompt_lengths=((4, 20),),
)


@dataclass(frozen=True)
class Run:
    """What all measurements share."""

    folder: Path
    sizes: Sizes
    card: Card
    rounds: int
    note: Note

    @property
    def device(self) -> str:
        return self.card.device

    def model(self) -> Any:
        """The policy, to be sampled from."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=DTYPE).eval().to(self.device)

    def seconds(self, title: str, ways: Mapping[str, Way], tolerance: float) -> dict[str, list[float]]:
        """One number per round and way."""
        return interleaved(ways, self.rounds, self.note, title=title, clock=self.card.clock, tolerance=tolerance)


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
    from models.row_kinds import rows_for

    with patch.object(shared_rows, "PREFILL_TOKENS", size):
        room = len(texts) * (max(map(len, texts)) + 1)
        rows = rows_for(model, texts, 1, 1, budget=room, pad_id=UNDRAWN)
        waiting: deque[Any] = longest_first(texts, 1)
        begun = run.card.clock()
        rows.begin(waiting)
        assert not waiting
        return run.card.clock() - begun


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


MEASUREMENTS: dict[str, Callable[[Run], Found]] = {
    "updates_small": updates_small,
    "updates_large": updates_large,
    "prefill": prefill,
    "rollouts_small": rollouts_small,
    "update_memory": update_memory,
    "rollouts_large": rollouts_large,
    "rollouts_kernels": rollouts_kernels,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure, write and print. 1 where a measurement failed, 2 without a GPU, else 0 whatever the ratios are."""
    options = _parser().parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("no GPU that torch can use: run it where there is one, or with --tiny on a CPU", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as scratch, quiet_transformers():
        return measure(options, Path(scratch), noted())


def measure(options: argparse.Namespace, scratch: Path, note: Note) -> int:
    """All measurements that were asked for, the file written after each."""
    device, sizes = ("cpu", CPU) if options.tiny else ("cuda", GPU)
    start_alone(THREADS, gpu=not options.tiny)
    card = measured_card(device, DTYPE, copied=sizes.copied, side=sizes.side)
    folder = write_policy(sizes.model, scratch / "policy", device=device, dtype=DTYPE, undrawn=UNDRAWN)
    run = Run(folder, sizes, card, options.rounds, note)
    found: Found = {"machine": _machine(run), "measurements": {}, "failed": {}}
    write_json(options.out, found)
    note(f"{found['machine']}")
    for name in options.only:
        release_memory()
        try:
            found["measurements"][name] = MEASUREMENTS[name](run)
        except Exception as error:  # told, written, and the command's status: the others may still be measured
            traceback.print_exc()
            found["failed"][name] = f"{type(error).__name__}: {error}"
        write_json(options.out, found)
        note(f"{name}: {found['measurements'].get(name, found['failed'].get(name))}")
    return 1 if found["failed"] else 0


def _machine(run: Run) -> Found:
    """What the numbers hold for."""
    import deepspeed
    import transformers

    return {
        "device": torch.cuda.get_device_name() if run.device == "cuda" else platform.machine(),
        "memory_mb": torch.cuda.get_device_properties(0).total_memory / MB if run.device == "cuda" else None,
        "dtype": DTYPE,
        "copy_gb_per_second": run.card.bandwidth / 1e9,
        "product_tflop_per_second": run.card.rate / 1e12,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, deepspeed)},
        "python": platform.python_version(),
        "model": dict(run.sizes.model),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--rounds", type=int, default=3, help="ratios per comparison")
    parser.add_argument("--out", type=Path, default=LATEST.with_name("gpu.json"), help="file for the results")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
