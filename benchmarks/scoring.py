"""What serving the reward model costs, and what its batching gains against how others serve theirs.

    python -m benchmarks.scoring [--texts N] [--rounds N] [--threads N] [--dialogues FILE] [--only NAME …]

Real texts of mixed length, the default reward model, Triton with its default config; one server is asked at a
time. All of the compared ways score the same texts to the same rewards (1e-4), else the benchmark stops.
Results go to benchmarks/results/latest.json, throughput by instances and length to scoring_throughput.svg there.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alignment.config_sections import ResourcesSection
from alignment.reward_server import RewardServer
from benchmarks import reward_setup
from benchmarks.in_process import LocalRewardModel
from benchmarks.results import Result, noted, record, result, shown, speedups
from benchmarks.rounds import Note, Way, interleaved
from benchmarks.texts import HH_PAIRS, mixed_conversations

COMMAND = "python -m benchmarks.scoring"
CONCURRENCIES = (16, 64)
POSTS_IN_FLIGHT = 64
PLOT = "plot"
MAX_TOKENS = 512
"""The longest text that the model reads, and so what a client that pads to the maximum pads to."""


@dataclass(frozen=True)
class Bench:
    """One set-up that all comparisons share: a model in three places, and the texts."""

    local: LocalRewardModel
    weights: Path
    server: RewardServer
    log: Path
    conversations: Sequence[Any]
    rounds: int
    threads: int
    note: Note


def in_process(bench: Bench) -> list[Result]:
    """Served over in-process scoring of as many texts at a time as are in flight; the lower concurrency counts.

    That is the same micro-batching: what a server can sort is what is in flight. Sorting all texts at once is
    timed too, and told beside the result.
    """
    name = "scoring_vs_in_process"
    with served_in_flight(bench) as served:
        ways: dict[str, Way] = {"all in process": lambda: bench.local.score(bench.conversations)}
        for n, score in served.items():
            ways |= {f"{n} in process": partial(_in_windows, bench, n), f"{n} served": score}
        seconds = interleaved(ways, bench.rounds, bench.note, title=name)
    ratios = {n: speedups(seconds[f"{n} in process"], seconds[f"{n} served"]) for n in served}
    strict = {n: speedups(seconds["all in process"], seconds[f"{n} served"]) for n in served}
    against = (
        "the same model and micro-batching in process, as many texts at a time as are in flight "
        f"({_summary(ratios)}; against all texts sorted at once, {_summary(strict)})"
    )
    return [_lowest(name, ratios, target=0.95, against=against)]


def constant_padding(bench: Bench) -> list[Result]:
    """Ours over rows padded to the longest that the run allows, each batch awaited before the next."""
    from benchmarks.peers.constant_padding import BATCH, ConstantPaddingClient, served_with_padding

    against = f"NeMo-Aligner's client: rows of {MAX_TOKENS} tokens, batches of {BATCH}, one after the other"
    pad_id = bench.local.model.config.pad_token_id
    with served_with_padding(bench.weights, threads=bench.threads, log=bench.log.with_name("padded.log")) as url:
        client = ConstantPaddingClient(url, MAX_TOKENS, pad_id)
        try:
            return _against(
                bench,
                "scoring_vs_constant_padding",
                lambda: client.score(bench.local.rows(bench.conversations)),
                target=2.5,
                against=against,
            )
        finally:
            client.close()


def fastapi(bench: Bench) -> list[Result]:
    """Ours over an async FastAPI server with a blocking forward pass and one text per POST."""
    from benchmarks.peers.fastapi_server import PostingClient, served_by_fastapi
    from models.reward_model import render

    log = bench.log.with_name("fastapi.log")
    with served_by_fastapi(bench.weights, max_tokens=MAX_TOKENS, threads=bench.threads, log=log) as port:
        client = PostingClient(port, POSTS_IN_FLIGHT)
        return _against(
            bench,
            "scoring_vs_fastapi",
            lambda: client.score([render(bench.local.template, one) for one in bench.conversations]),
            target=1.10,
            against=f"OpenRLHF's server: FastAPI, one text per POST, {POSTS_IN_FLIGHT} in flight, blocking forward",
        )


def real_over_padded(bench: Bench) -> list[Result]:
    """Tokens of the texts over tokens computed, by the server's own counters; the lower concurrency counts."""
    name, read = "scoring_real_over_padded", reward_setup.token_counters(bench.log)
    shares: dict[int, list[float]] = {}
    with served_in_flight(bench) as served:
        for n, score in served.items():
            for _ in range(bench.rounds):
                real, padded = read()
                score()
                real_after, padded_after = read()
                shares.setdefault(n, []).append((real_after - real) / (padded_after - padded))
    bench.note(f"{name}: {_summary(shares)}")
    against = f"all tokens that the server computed, padding included ({_summary(shares)})"
    return [_lowest(name, shares, target=0.91, against=against)]


COMPARISONS: dict[str, Callable[[Bench], list[Result]]] = {
    "scoring_vs_in_process": in_process,
    "scoring_vs_constant_padding": constant_padding,
    "scoring_vs_fastapi": fastapi,
    "scoring_real_over_padded": real_over_padded,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the comparisons, record and print them. 0 whatever the ratios are; 1 where one could not be made."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="scoring-bench-") as scratch:
        return shown(lambda: run(options, Path(scratch), noted()))


def run(options: argparse.Namespace, scratch: Path, note: Note) -> list[Result]:
    """Each comparison that was asked for, recorded as soon as it is made; the plot at the end."""
    local = reward_setup.default_reward_model(MAX_TOKENS, options.threads)
    weights = reward_setup.export(local, scratch / "repository")
    conversations = mixed_conversations(options.texts, options.dialogues)
    lengths = [len(row) for row in local.rows(conversations)]
    note(f"{len(lengths)} texts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all")
    log, results = scratch / "triton.log", []
    with reward_setup.served(scratch / "repository", threads=options.threads, log=log) as server:
        bench = Bench(local, weights, server, log, conversations, options.rounds, options.threads, note)
        for name in options.only:
            if name != PLOT:
                made = COMPARISONS[name](bench)
                record(made)
                results += made
    if PLOT in options.only:
        from benchmarks.scoring_plot import draw

        draw(local, scratch, threads=options.threads, note=note)
    return results


@contextmanager
def served_in_flight(bench: Bench) -> Iterator[dict[int, Way]]:
    """The served way with 16 and with 64 conversations in flight, each a request of its own."""
    with ExitStack() as stack:
        yield {
            n: stack.enter_context(reward_setup.callers(bench.server, bench.conversations, n)) for n in CONCURRENCIES
        }


def _in_windows(bench: Bench, size: int) -> list[float]:
    """In process, `size` texts at a time."""
    starts = range(0, len(bench.conversations), size)
    return [reward for s in starts for reward in bench.local.score(bench.conversations[s : s + size])]


def _against(bench: Bench, name: str, theirs: Way, *, target: float, against: str) -> list[Result]:
    """One comparison of the run's own client, as it is, with a peer."""
    with reward_setup.ready_client(bench.server) as client:
        ways: dict[str, Way] = {"ours": lambda: client.score(bench.conversations), "theirs": theirs}
        seconds = interleaved(ways, bench.rounds, bench.note, title=name)
    ratios = speedups(seconds["theirs"], seconds["ours"])
    return [result(name, ratios, target=target, against=against, command=COMMAND)]


def _lowest(name: str, ratios: Mapping[int, Sequence[float]], *, target: float, against: str) -> Result:
    """The result of the concurrency whose median is the lowest."""
    lowest = min(ratios.values(), key=statistics.median)
    return result(name, lowest, target=target, against=against, command=COMMAND)


def _summary(ratios: Mapping[int, Sequence[float]]) -> str:
    """E.g. `concurrency 16: 0.951, 64: 0.962`, medians."""
    return "concurrency " + ", ".join(f"{n}: {statistics.median(values):.3f}" for n, values in ratios.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=192, help="conversations per round")
    parser.add_argument("--rounds", type=int, default=5, help="ratios per comparison")
    parser.add_argument("--threads", type=int, default=ResourcesSection().threads, help="torch threads of each way")
    parser.add_argument(
        "--dialogues",
        type=Path,
        default=HH_PAIRS if HH_PAIRS.is_file() else None,
        help="HH pairs (.jsonl.gz) to score beside the reviews; reviews alone where there are none",
    )
    parser.add_argument("--only", nargs="+", choices=[*COMPARISONS, PLOT], default=[*COMPARISONS, PLOT])
    return parser


if __name__ == "__main__":
    sys.exit(main())
