"""Throughput of the served reward model by text length, for one and two instances of it."""

from pathlib import Path
from time import perf_counter

from alignment.atomic_files import write_json, write_text
from alignment.scoring import RewardClient
from alignment.types import Message
from benchmarks import reward_setup
from benchmarks.in_process import LocalRewardModel
from benchmarks.plot import line_chart
from benchmarks.results import LATEST
from benchmarks.rounds import Note
from benchmarks.texts import whole_reviews

INSTANCES = (1, 2)
LENGTHS = (32, 64, 128, 256, 512)
TOKENS_PER_POINT = 8192
"""Scored per measurement, so that each takes about as long."""
REPEATS = 3


def draw(local: LocalRewardModel, scratch: Path, *, threads: int, note: Note) -> Path:
    """Measure and draw; returns the SVG, beside which the numbers stand as JSON.

    All instances together get `threads` torch threads, each its share and at least one: more of them is a
    question of how to divide the cores, not of more cores.
    """
    texts = {length: texts_of(local, length) for length in LENGTHS}
    lines: dict[str, list[tuple[float, float]]] = {}
    for count in INSTANCES:
        each = max(1, threads // count)
        name = f"{count} × {each} thread{'s' if each > 1 else ''}"
        repository = scratch / f"instances-{count}"
        reward_setup.export(local, repository, instances=count)
        with (
            reward_setup.served(repository, threads=each, log=scratch / f"instances-{count}.log") as server,
            reward_setup.ready_client(server) as client,
        ):
            lines[name] = [(length, _throughput(client, texts[length])) for length in LENGTHS]
        note(f"throughput, {name}: " + ", ".join(f"{rate:.0f} texts/s of {n:g} tokens" for n, rate in lines[name]))
    path = LATEST.with_name("scoring_throughput.svg")
    write_text(path, line_chart("Scoring through Triton", "tokens per text", "texts per second", lines))
    write_json(path.with_suffix(".json"), lines)
    return path


def texts_of(local: LocalRewardModel, length: int) -> list[list[Message]]:
    """Conversations of `length` tokens, give or take the few that cutting a word adds or spares."""
    count = TOKENS_PER_POINT // length
    reviews = whole_reviews(count, min_words=max(LENGTHS))
    special = local.tokenizer.num_special_tokens_to_add()
    cut = []
    for [message] in reviews:
        ids = local.tokenizer(message["content"], add_special_tokens=False, verbose=False)["input_ids"]
        text = local.tokenizer.decode(ids[: length - special])
        cut.append([Message(role="assistant", content=text)])
    return cut


def _throughput(client: RewardClient, texts: list[list[Message]]) -> float:
    """Texts per second, the best of a few repeats after one to warm up."""
    client.score(texts)
    seconds = []
    for _ in range(REPEATS):
        begun = perf_counter()
        client.score(texts)
        seconds.append(perf_counter() - begun)
    return len(texts) / min(seconds)
