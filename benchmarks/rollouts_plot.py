"""Growth of the in-process engine in time and in memory: with the samples a prompt, and with the response's length.

Each point is a process of its own, so that its peak of memory is its own; the weights are in all of them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from alignment.atomic_files import write_json, write_text
from alignment.errors import WorkerError
from benchmarks.plot import line_chart
from benchmarks.results import LATEST
from benchmarks.rounds import Note

PROMPTS = 8
SAMPLES, TOKENS = (4, 8, 16, 32), (16, 32, 64, 128)
BASE_SAMPLES, BASE_TOKENS = 8, 32
BATCH_TOKENS = 4096
"""Fewer than the default, so that the larger points do not fit at once: memory is what is bounded."""


def draw(threads: int, source: Path, note: Note) -> list[Path]:
    """Measure and draw time and memory; returns the SVGs, beside which the numbers stand as JSON."""
    seconds: dict[str, list[tuple[float, float]]] = {"samples a prompt": [], "tokens a response": []}
    memory: dict[str, list[tuple[float, float]]] = {name: [] for name in seconds}
    points = {"samples a prompt": [(n, BASE_TOKENS, n) for n in SAMPLES]}
    points["tokens a response"] = [(BASE_SAMPLES, n, n) for n in TOKENS]
    for name, row in points.items():
        for samples, tokens, x in row:
            found = _measured(source, samples, tokens, threads)
            seconds[name].append((x, found["seconds"]))
            memory[name].append((x, found["cache_mb"]))
            note(f"growth: {samples} samples × {tokens} tokens: {found['seconds']:.1f} s, {found['cache_mb']:.0f} MB")
    made = []
    for name, label, lines in (("time", "seconds", seconds), ("memory", "MB beside the weights", memory)):
        path = LATEST.with_name(f"rollouts_{name}.svg")
        write_text(path, line_chart(f"Rollouts of {PROMPTS} prompts: {name}", "samples, or tokens", label, lines))
        write_json(path.with_suffix(".json"), lines)
        made.append(path)
    return made


def _measured(source: Path, samples: int, tokens: int, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.rollouts_plot", str(source), str(samples), str(tokens), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    if done.returncode:
        raise WorkerError(f"a point of the growth could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """One point: seconds of a run after one to warm up, and its peak of memory above what stood before it."""
    import time

    import torch

    from benchmarks.rollouts import Bench, workload
    from benchmarks.update_parts import memory_mb, reset_peak
    from models.memory import keep_freed_memory
    from models.policy import load_policy

    parser = argparse.ArgumentParser(description="one point of benchmarks.rollouts' growth; started by it")
    parser.add_argument("source")
    for name in ("samples", "tokens", "threads"):
        parser.add_argument(name, type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as a worker does
    prompts, numbers = workload(PROMPTS, options.samples, options.tokens)
    bench = Bench(load_policy(options.source, prompt_format="text").model, prompts, numbers, 1, print)
    bench.drawn(prompts[:1], numbers[:1, :1, :2], BATCH_TOKENS)
    reset_peak()  # which loading the weights left higher than what they take
    before = memory_mb("VmHWM")
    begun = time.perf_counter()
    bench.drawn(prompts, numbers, BATCH_TOKENS)
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "cache_mb": memory_mb("VmHWM") - before}))


if __name__ == "__main__":
    main()
