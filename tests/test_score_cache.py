"""Scores that were given before: known again, by any run and rank, whatever a killed writer left."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignment.ensemble import Ensemble
from alignment.errors import DataError
from alignment.score_cache import ScoreCache, export_digest, text_digest
from alignment.scoring import score_rollouts
from flow_runs import ROOT
from test_ensemble import Client, rollouts


def conversation(text: str) -> list[Any]:
    return [{"role": "user", "content": "say"}, {"role": "assistant", "content": text}]


A, B, C = (conversation(text) for text in "abc")


def test_what_was_scored_is_known_and_counted(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores" / "model.jsonl")
    assert cache.known([A, B]) == [None, None]
    cache.add([A, B], [0.1, -2.5])
    assert cache.known([B, C, A]) == [-2.5, None, 0.1]
    assert cache.take_counts() == (2, 3)
    assert cache.take_counts() == (0, 0)
    lines = [json.loads(line) for line in (tmp_path / "scores/model.jsonl").read_text().splitlines()]
    assert lines == [{"text": text_digest(A), "reward": 0.1}, {"text": text_digest(B), "reward": -2.5}]


def test_a_text_is_roles_and_contents() -> None:
    assert text_digest(A) == text_digest([dict(reversed(message.items())) for message in A])
    moved = [{"role": "user", "content": "sa"}, {"role": "assistant", "content": "ya"}]
    other = [{"role": "system", "content": "say"}, A[1]]
    assert len({text_digest(c) for c in (A, B, moved, other)}) == 4


def test_another_export_of_the_same_weights_is_another_file() -> None:
    card = {"digest": "d", "template": "a", "version": "1"}
    assert export_digest(card) == export_digest(dict(reversed(card.items())))
    assert export_digest(card) != export_digest({**card, "template": "b"})


def test_two_that_score_at_once_learn_from_each_other(tmp_path: Path) -> None:
    one, other = (ScoreCache(tmp_path / "model.jsonl") for _ in range(2))
    one.add([A], [1.0])
    assert other.known([A, B]) == [1.0, None]
    other.add([B], [2.0])
    assert one.known([A, B]) == [1.0, 2.0]
    other.add([A], [1.5])  # two asked for the same at once: the first answer stays
    assert one.known([A]) == other.known([A]) == ScoreCache(tmp_path / "model.jsonl").known([A]) == [1.0]


@pytest.mark.parametrize("torn", ['{"text": "abc', '{"text": "', "{", '{"text": "abc", "reward": 1'])
def test_a_line_that_a_killed_writer_left_is_no_score_and_is_cut_off(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "model.jsonl"
    cache = ScoreCache(path)
    cache.add([A], [1.0])
    with path.open("a") as file:
        file.write(torn)
    assert [ScoreCache(path).known([A, B]), cache.known([A])] == [[1.0, None], [1.0]]
    cache.add([B], [2.0])
    assert [c.known([A, B]) for c in (cache, ScoreCache(path))] == [[1.0, 2.0]] * 2
    assert len(path.read_text().splitlines()) == 2


def test_a_line_that_lacks_only_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "model.jsonl"
    path.write_text(json.dumps({"text": text_digest(A), "reward": 1.0}))
    cache = ScoreCache(path)
    assert cache.known([A]) == [None]
    cache.add([B], [2.0])
    assert cache.known([A, B]) == [1.0, 2.0]


@pytest.mark.parametrize("line", ["no json", "[]", '{"text": "abc"}', '{"text": "abc", "reward": NaN}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "model.jsonl"
    ScoreCache(path).add([A], [1.0])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"model\.jsonl:2: "):
        ScoreCache(path).known([A])


def test_processes_that_write_at_once_lose_no_line(tmp_path: Path) -> None:
    writer = """
import sys
from pathlib import Path
from alignment.score_cache import ScoreCache
cache = ScoreCache(Path(sys.argv[1]))
for i in range(100):
    cache.add([[{"role": "user", "content": f"{sys.argv[2]} {i}"}]], [i / 2])
"""
    path = tmp_path / "model.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", writer, str(path), name], cwd=ROOT) for name in "xy"]
    assert [process.wait(60) for process in writers] == [0, 0]
    asked = [[{"role": "user", "content": f"{name} {i}"}] for name in "xy" for i in range(100)]
    assert ScoreCache(path).known(asked) == [i / 2 for _ in "xy" for i in range(100)]  # type: ignore[arg-type]


def test_the_server_is_asked_for_what_is_not_known(tmp_path: Path) -> None:
    client, cache = Client("a", 1.0, 2.0, 3.0), ScoreCache(tmp_path / "a.jsonl")
    first = score_rollouts(client, rollouts("ab"), cache)  # type: ignore[arg-type]
    again = score_rollouts(client, rollouts("abcb"), ScoreCache(tmp_path / "a.jsonl"))  # type: ignore[arg-type]
    assert [sorted(texts) for texts in client.asked] == [["a", "b"], ["c"]]
    assert [r.reward for r in first] == [1.0, 2.0] and [r.reward for r in again] == [1.0, 2.0, 3.0, 2.0]
    assert {(r.reward_model, r.reward_model_version) for r in again} == {("a", "1")}


def test_each_of_several_models_has_scores_of_its_own(tmp_path: Path) -> None:
    clients = Client("a", 1.0, 2.0), Client("b", 10.0, 20.0), Client("s", 7.0, 8.0)
    caches = tuple(ScoreCache(tmp_path / f"{client.model_name}.jsonl") for client in clients)
    both = Ensemble(clients[:2], (1.0, 1.0), "weighted_sum", clients[2:], caches)  # type: ignore[arg-type]
    scored = both.score(rollouts("ab"))
    again = both.score(rollouts("ba"))
    assert [r.reward for r in scored] == [11.0, 22.0] and [r.reward for r in again] == [22.0, 11.0]
    assert [r.shadow_rewards for r in again] == [{"s/1": 8.0}, {"s/1": 7.0}]
    assert [[sorted(texts) for texts in client.asked] for client in clients] == [[["a", "b"]]] * 3
    assert both.take_counts() == {"hits": 6, "misses": 6}
    assert Ensemble(clients[:1]).take_counts() is None  # type: ignore[arg-type]
