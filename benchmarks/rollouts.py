"""What generating rollouts costs: against transformers' `generate`, and against what the machine could do.

    python -m benchmarks.rollouts [--rounds N] [--threads N] [--only NAME …]

16 prompts of 40 to 200 tokens × 8 samples × 64 new tokens, SmolLM2-135M in float32, its own distribution. The tokens of
the prompts are random, and the ending token is one that is never drawn, so that every way draws the same number of
tokens. Results go to benchmarks/results/latest.json, growth in time and memory with samples and length to
rollouts_*.svg there, with ranks (of updates too) to ranks_*.svg.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignment.config_sections import ResourcesSection, RolloutsSection
from alignment.embedded import policy_folder
from benchmarks.results import Result, noted, record, result, shown, speedups
from benchmarks.rollout_limit import Limit, limit_seconds
from benchmarks.rounds import Note, Way, interleaved
from models.decoding import respond
from models.memory import keep_freed_memory
from models.policy import load_policy
from models.sampling import Sampling

COMMAND = "python -m benchmarks.rollouts"
PLOTS = ("plot", "plot_ranks")
PROMPTS, SAMPLES, NEW_TOKENS = 16, 8, 64
SHORTEST, LONGEST = 40, 200
ROWS = 32
"""Rows of a batch of `generate`."""
UNDRAWN = 3
"""A reserved token of SmolLM2's, which ends a response in no way's eyes but never comes."""


@dataclass(frozen=True)
class Bench:
    """The model and the work that all comparisons share. Shape: numbers (prompts, samples, new tokens).

    `rows` are those of a batch of `generate`, `batch_tokens` is our budget.
    """

    model: Any
    prompts: list[list[int]]
    numbers: torch.Tensor
    rounds: int
    note: Note
    rows: int = ROWS
    batch_tokens: int = RolloutsSection.model_fields["batch_tokens"].default

    def ours(self) -> list[float]:
        """All responses by the in-process engine; returns the number of tokens drawn."""
        return [float(self.drawn(self.prompts, self.numbers, self.batch_tokens))]

    def drawn(self, prompts: list[list[int]], numbers: torch.Tensor, batch_tokens: int) -> int:
        """Tokens that the in-process engine draws."""
        sampling = Sampling(numbers.shape[2])
        found = respond(self.model, prompts, numbers, sampling, eos_ids=[UNDRAWN], batch_tokens=batch_tokens)
        return sum(len(one.token_ids) for some in found for samples in some.values() for one in samples)

    @torch.inference_mode()
    def generate(self) -> list[float]:
        """The same number of responses by `generate`, prompts in their order, padded on the left."""
        from models.batching import left_pad

        _, samples, tokens = self.numbers.shape
        count, drawn = self.rows // samples, 0
        for start in range(0, len(self.prompts), count):
            ids, mask = left_pad(self.prompts[start : start + count], UNDRAWN, self.model.device)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                num_return_sequences=samples,
                max_new_tokens=tokens,
                eos_token_id=UNDRAWN,
                pad_token_id=UNDRAWN,
            )
            drawn += int((out[:, ids.shape[1] :] != UNDRAWN).sum())
        return [float(drawn)]


def against_generate(bench: Bench) -> list[Result]:
    """Ours over `generate` for the same number of tokens."""
    name = "rollouts_vs_generate"
    ways: dict[str, Way] = {"ours": bench.ours, "generate": bench.generate}
    seconds = interleaved(ways, bench.rounds, bench.note, title=name)
    tokens = len(bench.prompts) * SAMPLES * NEW_TOKENS
    against = (
        f"transformers' generate, num_return_sequences={SAMPLES}, {ROWS} rows a batch: "
        f"{tokens / min(seconds['generate']):.0f} tokens/s, ours {tokens / min(seconds['ours']):.0f}, "
        f"matrix products alone {tokens / limit(bench).seconds:.0f}"
    )
    ratios = speedups(seconds["generate"], seconds["ours"])
    return [result(name, ratios, target=3.0, against=against, command=COMMAND)]


def share_of_limit(bench: Bench) -> list[Result]:
    """Seconds of the bare matrix products over ours, both timed in each round."""
    name, limits = "rollouts_share_of_limit", list[Limit]()

    def products() -> list[float]:
        limits.append(limit(bench))
        return [float(bench.numbers.numel())]

    seconds = interleaved({"ours": bench.ours, "limit": products}, bench.rounds, bench.note, title=name)["ours"]
    rounds = list(zip(limits[1:], seconds, strict=True))  # the first was the warm-up
    streamed = statistics.median(one.streamed_seconds / own for one, own in rounds)
    against = (
        "operations of prefill and decoding over the rate of matrix products of their shapes, timed by themselves; "
        f"where each weight comes from memory, as for every token, {streamed:.3f}"
    )
    return [result(name, [one.seconds / own for one, own in rounds], target=0.6, against=against, command=COMMAND)]


def limit(bench: Bench) -> Limit:
    """What the bench's work would take if it were matrix products alone."""
    _, samples, tokens = bench.numbers.shape
    return limit_seconds(bench.model, [len(prompt) for prompt in bench.prompts], samples=samples, tokens=tokens)


COMPARISONS: dict[str, Callable[[Bench], list[Result]]] = {
    "rollouts_vs_generate": against_generate,
    "rollouts_share_of_limit": share_of_limit,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the comparisons, record and print them. 0 whatever the ratios are; 1 where one could not be made."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rollouts-bench-") as scratch:
        return shown(lambda: run(options, Path(scratch), noted()))


def run(options: argparse.Namespace, scratch: Path, note: Note) -> list[Result]:
    """Each comparison that was asked for, recorded as soon as it is made; the plot at the end."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as a worker does
    source = policy_folder("smollm2-135m", scratch, note)
    bench = Bench(load_policy(source, prompt_format="text").model, *workload(), options.rounds, note)
    results = []
    for name in options.only:
        if name not in PLOTS:
            made = COMPARISONS[name](bench)
            record(made)
            results += made
    if "plot" in options.only:
        from benchmarks.rollouts_plot import draw

        draw(options.threads, Path(source), note)
    if "plot_ranks" in options.only:
        from benchmarks.ranks_plot import draw as draw_ranks

        draw_ranks(Path(source), note)
    return results


def workload(
    prompts: int = PROMPTS,
    samples: int = SAMPLES,
    tokens: int = NEW_TOKENS,
    *,
    shortest: int = SHORTEST,
    longest: int = LONGEST,
    vocabulary: int = 49152,
) -> tuple[list[list[int]], torch.Tensor]:
    """Prompts of random tokens, lengths spread evenly and in no order, and a uniform number for every token."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(shortest, longest, prompts).round().int()[torch.randperm(prompts, generator=generator)]
    rows = [torch.randint(100, vocabulary, (int(n),), generator=generator).tolist() for n in lengths]
    return rows, torch.rand(prompts, samples, tokens, generator=generator, dtype=torch.float64)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="ratios per comparison")
    parser.add_argument("--threads", type=int, default=ResourcesSection().threads, help="torch threads of each way")
    parser.add_argument("--only", nargs="+", choices=[*COMPARISONS, *PLOTS], default=[*COMPARISONS, *PLOTS])
    return parser


if __name__ == "__main__":
    sys.exit(main())
