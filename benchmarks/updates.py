"""What an update costs beside a plain loop in torch, TRL's SFTTrainer and transformers' Trainer.

    python -m benchmarks.updates [--examples N] [--rounds N] [--threads N] [--dialogues FILE] [--only NAME …]

The default policy in float32, and AdamW with a rate too small to move a weight: so each round starts from the same
weights, and the loss of each way's step is checked to be the same (1e-4). The machine's own limit, the operations of
the step at the measured rate of the model's matrix products, is told beside each result.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config_sections import ResourcesSection
from alignment.types import Rollout
from benchmarks.results import Result, noted, record, result, shown, speedups
from benchmarks.rounds import Note, Way, interleaved
from benchmarks.texts import HH_PAIRS
from benchmarks.update_setup import matrix_rate, operations, rollouts, start, uniform_rollouts, updating

COMMAND = "python -m benchmarks.updates"
CACHE = Path("runs") / "cache"
"""Where the default run keeps its converted models."""
UNIFORM = (8, 256)
"""Sequences, and tokens of each, of the comparison with a plain loop."""
MICRO_BATCH = 8
"""Examples per forward and backward pass: both peers' default."""


@dataclass(frozen=True)
class Bench:
    """What all comparisons share: where the policy lies, and the examples."""

    policy: Path
    examples: Sequence[Rollout]
    rounds: int
    note: Note
    options: str = ""
    """What the command says besides, to repeat the same work."""


def plain_torch(bench: Bench) -> list[Result]:
    """Ours under ZeRO 0 over a loop of forward, backward, clipping and AdamW; every token but the first counts."""
    from benchmarks.peers.plain_torch import PlainLoop

    examples = uniform_rollouts(*UNIFORM)
    ways = {"ours": updating(bench.policy, examples, MICRO_BATCH), "theirs": PlainLoop(bench.policy, examples).step}
    against = f"forward, backward, clipping and the same AdamW in torch on {UNIFORM[0]} x {UNIFORM[1]} tokens"
    return _compared(bench, "update_vs_plain_torch", ways, examples, target=0.91, against=against)


def trl(bench: Bench) -> list[Result]:
    """Ours over TRL's SFTTrainer, which checkpoints gradients and computes the loss in chunks by default."""
    from benchmarks.peers.supervised_trainers import trl_trainer

    against = "TRL's SFTTrainer with its defaults, but in float32: a whole train() of one step, gradient checkpointing"
    return _ragged(bench, "update_vs_trl", trl_trainer(bench.policy, bench.examples), against)


def hf_trainer(bench: Bench) -> list[Result]:
    """Ours over transformers' Trainer."""
    from benchmarks.peers.supervised_trainers import hf_trainer as theirs

    against = "transformers' Trainer with its defaults: a whole train() of one step, padding to a batch's longest"
    return _ragged(bench, "update_vs_hf_trainer", theirs(bench.policy, bench.examples), against)


COMPARISONS: dict[str, Callable[[Bench], list[Result]]] = {
    "update_vs_plain_torch": plain_torch,
    "update_vs_hf_trainer": hf_trainer,
    "update_vs_trl": trl,
}


def _ragged(bench: Bench, name: str, theirs: Way, against: str) -> list[Result]:
    """One comparison on the ragged examples."""
    ways = {"ours": updating(bench.policy, bench.examples, MICRO_BATCH), "theirs": theirs}
    return _compared(bench, name, ways, bench.examples, target=1.3, against=against)


def _compared(
    bench: Bench, name: str, ways: dict[str, Way], examples: Sequence[Rollout], *, target: float, against: str
) -> list[Result]:
    """One comparison, and how near ours came to what the machine's matrix products allow."""
    seconds = interleaved(ways, bench.rounds, bench.note, title=name)
    tokens = sum(len(r.prompt_ids) + len(r.response_ids) for r in examples)
    rate = matrix_rate(bench.policy, UNIFORM[0] * UNIFORM[1])
    limit, ours = operations(bench.policy, examples) / rate, statistics.median(seconds["ours"])
    told = (
        f"{tokens} tokens: {ours:.1f} s, {tokens / ours:.0f} tokens/s; their matrix products at "
        f"{rate / 1e9:.0f} GFLOP/s take {limit:.1f} s, {limit / ours:.0%} of that"
    )
    bench.note(f"{name}: {told}")
    ratios = speedups(seconds["theirs"], seconds["ours"])
    return [
        result(
            name,
            ratios,
            target=target,
            against=f"{against} ({told})",
            command=f"{COMMAND} --only {name} {bench.options}",
        )
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the comparisons, record and print them. 0 whatever the ratios are; 1 where one could not be made."""
    options = _parser().parse_args(arguments)
    return shown(lambda: run(options, noted()))


def run(options: argparse.Namespace, note: Note) -> list[Result]:
    """Each comparison that was asked for, recorded as soon as it is made. Raises AlignmentError."""
    policy = start(CACHE, options.threads, note)
    examples = rollouts(policy, options.examples, options.dialogues)
    bench, results = Bench(policy, examples, options.rounds, note, f"--examples {options.examples}"), []
    for name in options.only:
        made = COMPARISONS[name](bench)
        record(made)
        results += made
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=32, help="ragged examples of an optimizer step")
    parser.add_argument("--rounds", type=int, default=3, help="ratios per comparison")
    parser.add_argument("--threads", type=int, default=ResourcesSection().threads, help="torch threads")
    dialogues: dict[str, Any] = {"default": HH_PAIRS if HH_PAIRS.is_file() else None, "type": Path}
    parser.add_argument("--dialogues", **dialogues, help="HH pairs whose preferred answers are learned; else IMDB")
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    return parser


if __name__ == "__main__":
    sys.exit(main())
