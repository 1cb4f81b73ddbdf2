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
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from alignment.atomic_files import write_json
from benchmarks.card import measured_card
from benchmarks.gpu_model import write_policy
from benchmarks.gpu_rollouts import prefill, rollouts_kernels, rollouts_large, rollouts_small
from benchmarks.gpu_run import CPU, DTYPE, GPU, MB, Found, Run
from benchmarks.gpu_updates import state_moves, update_memory, updates_large, updates_small
from benchmarks.results import LATEST, noted
from benchmarks.rollouts import UNDRAWN
from benchmarks.rounds import Note
from benchmarks.update_setup import start_alone
from models.memory import release_memory
from models.quiet import quiet_transformers

THREADS = 8

MEASUREMENTS: dict[str, Callable[[Run], Found]] = {
    "updates_small": updates_small,
    "updates_large": updates_large,
    "prefill": prefill,
    "rollouts_small": rollouts_small,
    "update_memory": update_memory,
    "state_moves": state_moves,
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
