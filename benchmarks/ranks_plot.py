"""Growth with the number of ranks, at one total of work: seconds and memory of rollouts and of an update.

Every rank has one thread, so that one rank and two do the same on as many cores as they are. More ranks than cores
share them: their seconds show what sharing costs, no speed. Each point is a set of processes of its own, so that their
peaks of memory are their own. Memory is a rank's whole peak, torch's own some hundred MB included.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignment.atomic_files import write_json, write_text
from alignment.errors import WorkerError
from benchmarks.plot import line_chart
from benchmarks.results import LATEST
from benchmarks.rounds import Note

RANKS = (1, 2, 4)
PRODUCTS = "matrix products"
LINES = {PRODUCTS: 0, "rollouts": 0, "update, ZeRO 0": 0, "update, ZeRO 2": 2}
"""What is measured, and the ZeRO stage of its engine; the products say what this machine's cores give together."""
PROMPTS, SAMPLES, TOKENS = 8, 8, 32
BATCH_TOKENS = 16_384
SEQUENCES, LENGTH = 8, 128
SHAPE, COUNT = (512, 576, 1536), 800
"""Rows, inputs and outputs of the products (a prompt batch through a layer of SmolLM2-135M), and how many there are."""
ROOT = Path(__file__).resolve().parent.parent

Lines = dict[str, list[tuple[float, float]]]
Work = Callable[[], object]


def draw(source: Path, note: Note, ranks: tuple[int, ...] = RANKS, folder: Path = LATEST.parent) -> list[Path]:
    """Measure and draw time and memory; returns the SVGs, beside which the numbers stand as JSON."""
    seconds: Lines = {name: [] for name in LINES}
    memory: Lines = {name: [] for name in LINES}
    for name in LINES:
        for count in ranks:
            found = _measured(source, name, count)
            seconds[name].append((count, found["seconds"]))
            memory[name].append((count, found["peak_mb"]))
            note(f"ranks: {name}, {count}: {found['seconds']:.1f} s, {found['peak_mb']:.0f} MB at most on a rank")
    made = []
    cores = len(os.sched_getaffinity(0))
    for kind, label, lines in (("time", "seconds", seconds), ("memory", "MB, the peak of a rank", memory)):
        path = folder / f"ranks_{kind}.svg"
        write_text(path, line_chart(f"The same work by more ranks, {cores} cores: {kind}", "ranks", label, lines))
        write_json(path.with_suffix(".json"), {"cores": cores, "lines": lines})
        made.append(path)
    return made


def _measured(source: Path, name: str, ranks: int) -> dict[str, float]:
    """One point: the slowest rank's seconds and the largest peak. Raises WorkerError."""
    command = [sys.executable, "-m", "alignment.one_node", f"--nproc-per-node={ranks}", "-m", "benchmarks.ranks_plot"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(source), name], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    if done.returncode:
        raise WorkerError(f"{name} on {ranks} ranks could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """One rank's part of one point; the first rank prints what all of them found."""
    import torch

    from alignment.engine import start_ranks
    from benchmarks.update_parts import memory_mb, reset_peak

    parser = argparse.ArgumentParser(description="one point of growth with ranks; started by benchmarks.rollouts")
    parser.add_argument("source", type=Path)
    parser.add_argument("name", choices=LINES)
    options = parser.parse_args()
    ranks = start_ranks(threads=1, gpu=False)
    prepare = {PRODUCTS: _products, "rollouts": _rollouts}.get(options.name, _update)
    warm_up, work = prepare(options.source, LINES[options.name], ranks)
    warm_up()
    torch.distributed.barrier()
    reset_peak()
    begun = time.perf_counter()
    work()
    found = torch.tensor([time.perf_counter() - begun, memory_mb("VmHWM")], dtype=torch.float64)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    if ranks.rank == 0:
        print(json.dumps({"seconds": float(found[0]), "peak_mb": float(found[1])}))


def _products(_: Path, __: int, ranks: Any) -> tuple[Work, Work]:
    """This rank's share of the products."""
    import torch

    rows, inputs, outputs = SHAPE
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)

    def multiply() -> None:
        for _ in range(COUNT // ranks.world_size):
            torch.nn.functional.linear(x, weight)

    return multiply, multiply


def _rollouts(source: Path, _: int, ranks: Any) -> tuple[Work, Work]:
    """What starts the libraries, and this rank's share of the prompts."""
    from transformers import AutoModelForCausalLM

    from benchmarks.rollouts import Bench, workload

    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
    vocabulary = model.config.vocab_size
    prompts, numbers = workload(PROMPTS, SAMPLES, TOKENS, vocabulary=vocabulary)
    mine = slice(ranks.rank, None, ranks.world_size)
    bench = Bench(model, prompts[mine], numbers[mine], 1, print, batch_tokens=BATCH_TOKENS)
    return lambda: bench.drawn(prompts[:1], numbers[:1, :1, :2], BATCH_TOKENS), bench.ours


def _update(source: Path, zero_stage: int, ranks: Any) -> tuple[Work, Work]:
    """One optimizer step, of which this rank does its share, twice: the first one makes the moments."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from alignment.config_training import TrainingSection
    from alignment.engine import build_engine
    from alignment.update import update
    from benchmarks.update_setup import TRAINING, uniform_rollouts
    from models.sequence_loss import SequenceLoss

    sizes = {"global_batch_size": SEQUENCES, "micro_batch_size": 1, "zero_stage": zero_stage}
    training = TrainingSection.model_validate({**sizes, **TRAINING})
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
    examples = uniform_rollouts(SEQUENCES, LENGTH, vocabulary=AutoConfig.from_pretrained(source).vocab_size)
    loss = SequenceLoss(model, packed=True)
    engine = build_engine(loss, training, zero_stage=zero_stage, world_size=ranks.world_size)

    def step() -> object:
        return update(engine, examples, training, ranks, lr=training.lr, stream="bench")

    return step, step


if __name__ == "__main__":
    main()
