"""Benchmarks: the arithmetic of ratios, their file, and that all compared ways score alike."""

import itertools
import json
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from alignment.errors import DataError
from alignment.scoring import RewardClient
from benchmarks.in_process import LocalRewardModel
from benchmarks.peers import constant_padding, fastapi_server
from benchmarks.plot import line_chart
from benchmarks.results import Result, read_results, record, result, speedups, table
from benchmarks.rollout_limit import limit_seconds
from benchmarks.rounds import DifferentWorkError, check_same_work, interleaved
from infra.triton_setup import free_ports
from models.reward_model import render
from reward_fixtures import MAX_TOKENS, TEMPLATE, ServedRewardModel, triton_module
from tiny import VOCABULARY, tiny_llama

REPOSITORY = Path(__file__).resolve().parent.parent
CONVERSATIONS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    [{"role": "assistant", "content": "Grüße 🙂 " * 5}],
    [{"role": "assistant", "content": "over-long, so that its start is lost " * 9}],
    *([{"role": "assistant", "content": "word " * n}] for n in range(12)),
]


def made(name: str, ratio: float) -> Result:
    return Result(name, ratio, ratio - 0.1, ratio + 0.1, 1.0, "a peer", "python -m benchmarks.x")


def test_a_ratio_is_the_median_of_its_rounds_between_the_lowest_and_the_highest():
    ratios = speedups(theirs=[3.0, 4.0, 1.0], ours=[2.0, 2.0, 2.0])
    assert ratios == [1.5, 2.0, 0.5]
    one = result("x", ratios, target=1.5, against="y", command="z")
    assert (one.ratio, one.low, one.high, one.reached) == (1.5, 0.5, 2.0, True)
    assert not result("x", ratios, target=1.51, against="y", command="z").reached
    with pytest.raises(ValueError, match="at least one round"):
        result("x", [], target=1.0, against="y", command="z")
    with pytest.raises(ValueError, match="shorter"):
        speedups([1.0, 2.0], [1.0])


def test_a_run_replaces_its_own_entries_and_keeps_the_others(tmp_path):
    path = tmp_path / "results" / "latest.json"
    assert read_results(path) == []
    record([made("a", 1.0), made("b", 2.0)], path)
    record([made("b", 3.0), made("c", 4.0)], path)
    assert [(one.name, one.ratio) for one in read_results(path)] == [("a", 1.0), ("b", 3.0), ("c", 4.0)]
    first = json.loads(path.read_text())[0]
    assert first == {
        "name": "a",
        "ratio": 1.0,
        "low": 0.9,
        "high": 1.1,
        "target": 1.0,
        "against": "a peer",
        "command": "python -m benchmarks.x",
    }
    assert [entry.name for entry in path.parent.iterdir()] == ["latest.json"]


@pytest.mark.parametrize("text", ["{", "{}x", '[{"name": "a"}]', "[1]", "3"])
def test_a_file_of_another_form_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "latest.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"latest\.json is not a list of results .* delete it"):
        record([made("a", 1.0)], path)
    assert path.read_text() == text


def test_the_table_says_which_target_was_reached():
    lines = table([made("fast", 1.0), made("slow_one", 0.99)]).splitlines()
    assert lines[1].split() == ["fast", "1.000", "0.900", "-", "1.100", "1.00", "yes"]
    assert lines[3].split()[-1] == "NO"


def test_ways_take_turns_and_only_they_are_timed():
    order: list[str] = []
    ticks = itertools.accumulate([0.0, 1.0, 10.0, 2.0, 10.0, 3.0, 10.0, 4.0])

    def way(name: str):
        return lambda: order.append(name) or [0.5]

    notes: list[str] = []
    seconds = interleaved({"a": way("a"), "b": way("b")}, 2, notes.append, title="x", clock=lambda: next(ticks))
    assert order == ["a", "b"] * 3  # the first of each is the untimed one
    assert seconds == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert notes[0] == "x: warm-up of 2 ways, 2 rounds follow"
    assert notes[1:] == ["x: round 1/2 | a 1.00 s, b 2.00 s | 3 s left", "x: round 2/2 | a 3.00 s, b 4.00 s"]


@pytest.mark.parametrize("other", [[1.0, 2.001], [1.0], [1.0, float("nan")]])
def test_a_comparison_of_different_work_is_an_error(other):
    check_same_work({"a": [1.0, 2.0], "b": [1.0, 2.00009]})
    with pytest.raises(DifferentWorkError, match="b"):
        check_same_work({"a": [1.0, 2.0], "b": other})


def test_padding_is_constant():
    tokens, lengths = constant_padding.pad([[7, 8], [9]], 4, pad_id=3)
    assert tokens.tolist() == [[7, 8, 3, 3], [9, 3, 3, 3]]
    assert lengths.tolist() == [2, 1]
    assert tokens.dtype == lengths.dtype == np.int64


def local(served: ServedRewardModel) -> LocalRewardModel:
    return LocalRewardModel(served.model, served.tokenizer, TEMPLATE, MAX_TOKENS, token_budget=256)


@pytest.fixture
def expected(served_reward_model) -> list[float]:
    with RewardClient(served_reward_model.url) as client:
        return client.score(CONVERSATIONS)


def test_scoring_in_process_gives_the_served_rewards(served_reward_model, expected):
    assert np.ptp(expected) > 0.1  # rewards that differ, else the comparison says nothing
    check_same_work({"served": expected, "in process": local(served_reward_model).score(CONVERSATIONS)})


def test_the_constant_padding_peer_gives_the_served_rewards(served_reward_model, expected):
    """Triton aside: the client's rows through the forward pass of the peer's model."""
    module = triton_module(Path(constant_padding.__file__).with_name("padded_model.py"))
    one = local(served_reward_model)
    rows = constant_padding.pad(one.rows(CONVERSATIONS), MAX_TOKENS, one.model.config.pad_token_id)
    check_same_work({"served": expected, "padded": module.padded_rewards(one.model, *rows).tolist()})


def test_the_fastapi_peer_gives_the_served_rewards(served_reward_model, expected):
    reward = fastapi_server.reward_of(served_reward_model.model, served_reward_model.tokenizer, MAX_TOKENS)
    texts = [render(TEMPLATE, one) for one in CONVERSATIONS]
    check_same_work({"served": expected, "one by one": [reward(text) for text in texts]})


def test_the_fastapi_peer_answers_posts():
    import uvicorn

    [port] = free_ports(1)
    app = fastapi_server.application(lambda text: len(text) / 8)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        client = fastapi_server.PostingClient(port, concurrency=4)
        assert client.score(["", "a", "ä" * 12, '"\n'] * 5) == [0.0, 0.125, 1.5, 0.25] * 5
    finally:
        server.should_exit = True
        thread.join()


def test_the_limit_of_rollouts_counts_each_prompt_once_and_each_drawn_token(monkeypatch):
    monkeypatch.setattr("benchmarks.rollout_limit.SECONDS_PER_SHAPE", 1e-3)
    found = limit_seconds(tiny_llama(), [3, 5], samples=2, tokens=4)
    layer = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)  # q, k and v of 2 heads, o, and the three of the MLP
    passes = 3 + 5 + 4 * 3  # prompts once, then three tokens of each of four responses
    head = 2 * 32 * VOCABULARY * (2 + 4 * 3)
    pairs = (6 + 15) + 2 * ((4 + 5 + 6) + (6 + 7 + 8))
    assert found.operations == 2 * layer * passes + head + 4 * pairs * 2 * 4 * 8
    assert found.seconds > 0 and found.streamed_seconds > 0


def test_the_chart_is_well_formed_and_shows_every_point():
    svg = line_chart("a < b", "tokens", "texts/s", {"1 & 1": [(32, 100.0), (64, 50.0)], "2": [(32, 120.0), (64, 0.0)]})
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    circles = root.findall(f"{space}circle")
    assert [one.find(f"{space}title").text for one in circles] == [
        "1 & 1, 32: 100",
        "1 & 1, 64: 50",
        "2, 32: 120",
        "2, 64: 0",
    ]
    # Axis from 0 to 150 over y = 344 down to 40: 120 lies at 344 - 304 * 0.8.
    assert [float(one.get("cy")) for one in circles][2:] == [100.8, 344.0]
    assert [float(one.get("cx")) for one in circles][:2] == [64.0, 490.0]
