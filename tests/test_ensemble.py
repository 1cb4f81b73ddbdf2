"""Several reward models: values by hand, what is asked and recorded, and a real server with two models."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

import config_effects as see
from alignment import disaggregated, task
from alignment.ensemble import Combine, Ensemble, by_model, vote, weighted_sum
from alignment.ensemble_stage import check_distinct, find_others
from alignment.errors import ConfigError
from alignment.judge_stage import prepare_judge
from alignment.records import validation_record
from alignment.report_charts import model_charts
from alignment.rollout_table import COLUMNS
from alignment.rs_step import _score
from alignment.run_folder import RunFolder
from alignment.selection import select
from alignment.stored_scores import stored_scores
from alignment.types import RewardModelRef, Rollout
from flow_runs import SMOKE
from infra.triton import main
from reward_fixtures import TEMPLATE, export_tiny, tiny_reward_model
from test_config import effect_config, load_config

LETTERS = "abcde"


class Client:
    """Stands in for a client and its server: a response is a letter, `scores` says what each is worth."""

    def __init__(self, name: str, *scores: float, version: str = "1") -> None:
        self.model_name, self.model_version = name, version
        self.asked: list[list[str]] = []
        self._scores, self._background = dict(zip(LETTERS, scores, strict=False)), ThreadPoolExecutor(1)

    def score(self, conversations: Sequence[Any]) -> list[float]:
        if conversations:
            self.asked.append([c[-1]["content"] for c in conversations])
        return [self._scores[c[-1]["content"]] for c in conversations]

    def _submit(self, pool: ThreadPoolExecutor, function: Any, *arguments: Any) -> Any:
        return pool.submit(function, *arguments)


def ensemble(
    *members: Client, weights: tuple[float, ...] = (1.0,), combine: Combine = "weighted_sum", shadows: Any = ()
) -> Ensemble:
    return Ensemble(members, weights, combine, shadows)  # type: ignore[arg-type]


def rollouts(letters: str, prompt_id: str = "p") -> list[Rollout]:
    return [
        Rollout(prompt_id=prompt_id, rollout_index=i, response=letter, finish_reason="stop")
        for i, letter in enumerate(letters)
    ]


def test_a_weighted_sum_by_hand() -> None:
    assert weighted_sum([2.0, -1.0, 0.5], [1.0, 0.5, 4.0]) == 2.0 - 0.5 + 2.0
    assert weighted_sum([2.0, 3.0], [1.0, -1.0]) == -1.0


def test_a_vote_by_hand() -> None:
    # Of two others, the first member's responses beat 2, 0, 1; the second's 0, 1 and a tie, 1 and a tie.
    scores = [[3.0, 1.0, 2.0], [0.0, 5.0, 5.0]]
    assert vote(scores, [1.0, 1.0]) == [0.5, 0.375, 0.625]
    assert vote(scores, [3.0, 1.0]) == [0.75, 0.1875, 0.5625]
    assert vote([[1.0, 1.0 + 4e-5]], [1.0]) == [0.5, 0.5]  # batching moves a score by as much
    assert vote([[7.0], [-1.0]], [1.0, 1.0]) == [0.5]


def ballots() -> Any:
    """Whole scores of 1 to 6 responses by 1 to 3 members, with weights."""
    return st.tuples(st.integers(1, 6), st.integers(1, 3)).flatmap(
        lambda size: st.tuples(
            st.lists(
                st.lists(st.integers(-3, 3), min_size=size[0], max_size=size[0]), min_size=size[1], max_size=size[1]
            ),
            st.lists(st.integers(1, 4), min_size=size[1], max_size=size[1]),
        )
    )


@given(ballots(), st.sampled_from([lambda x: 5 * x - 70, lambda x: x**3, lambda x: 1.5**x, lambda x: -(0.5**x)]))
def test_a_vote_hears_the_order_alone(drawn: Any, monotone: Any) -> None:
    scores, weights = drawn
    rewards = vote(scores, weights)
    for i in range(len(scores)):
        moved = [*scores[:i], [monotone(score) for score in scores[i]], *scores[i + 1 :]]
        assert vote(moved, weights) == rewards
    assert sum(rewards) == pytest.approx(len(rewards) / 2)
    assert all(0 <= reward <= 1 for reward in rewards)


@given(ballots(), st.randoms())
def test_a_vote_does_not_depend_on_the_order_of_the_responses(drawn: Any, random: Any) -> None:
    scores, weights = drawn
    order = list(range(len(scores[0])))
    random.shuffle(order)
    moved = vote([[row[i] for i in order] for row in scores], weights)
    assert moved == [vote(scores, weights)[i] for i in order]


def test_one_model_alone_is_asked_once_and_adds_nothing() -> None:
    client = Client("a", 1.0, 2.0)
    scored = ensemble(client).score(rollouts("aba"))
    assert client.asked == [["a", "b"]]
    assert [(r.reward, r.reward_model, r.reward_model_version) for r in scored] == [
        (1.0, "a", "1"), (2.0, "a", "1"), (1.0, "a", "1")
    ]  # fmt: skip
    assert all(not r.member_rewards and not r.shadow_rewards for r in scored)
    assert ensemble(client).compared(scored) == scored


def test_members_are_summed_and_each_ones_score_is_kept() -> None:
    both = ensemble(
        Client("a", 1.0, 2.0),
        Client("b", 10.0, -10.0, version="3"),
        weights=(1.0, 0.5),
        shadows=(Client("s", 7.0, 8.0, version="2"),),
    )
    scored = both.score(rollouts("ab"))
    assert [r.reward for r in scored] == [6.0, -3.0]
    assert {(r.reward_model, r.reward_model_version) for r in scored} == {("a+b", "1+3")}
    assert [r.member_rewards for r in scored] == [{"a/1": 1.0, "b/3": 10.0}, {"a/1": 2.0, "b/3": -10.0}]
    assert [r.shadow_rewards for r in scored] == [{"s/2": 7.0}, {"s/2": 8.0}]
    assert both.score_in_background(rollouts("ab")).result(10) == scored == both.compared(scored)
    assert both.score([]) == []


def test_a_vote_is_within_a_prompt_and_over_distinct_responses() -> None:
    voting = ensemble(Client("a", 3.0, 1.0, 2.0), Client("b", 0.0, 5.0, 5.0), weights=(3.0, 1.0), combine="vote")
    scored = voting.score([*rollouts("abbc"), *rollouts("cb", "q"), *rollouts("aa", "r")])
    # By itself a response has the first member's score, under its name.
    assert [r.reward for r in scored] == [3.0, 1.0, 1.0, 2.0, 2.0, 1.0, 3.0, 3.0]
    assert {r.reward_model for r in scored} == {"a"}
    compared = voting.compared(scored)
    # To p, b was said twice and counts once, as in the vote by hand; to q, c beats b by member a and ties by b.
    assert [r.reward for r in compared] == [0.75, 0.1875, 0.1875, 0.5625, 0.875, 0.125, 0.5, 0.5]
    assert {(r.reward_model, r.reward_model_version) for r in compared} == {("a+b", "1+1")}
    assert [r.member_rewards for r in compared] == [r.member_rewards for r in scored]


def stored(folder: Path, of: Ensemble, letters: str) -> RunFolder:
    """A run whose first RS step has been scored and stored."""
    run = RunFolder(folder)
    scored = of.compared(of.score(rollouts(letters)))
    run.write_rollouts(1, scored, select(scored, strategy="top_per_prompt"))
    return run


def session(run: RunFolder, of: Ensemble) -> Any:
    return SimpleNamespace(trainer=SimpleNamespace(run=run), ensemble=of, stop=SimpleNamespace(check=lambda: None))


@pytest.mark.parametrize("combine", ["weighted_sum", "vote"])
def test_a_replay_uses_the_scores_of_the_same_models_and_asks_for_the_others(combine: Combine, tmp_path: Path) -> None:
    def models(shadow_version: str = "1") -> Ensemble:
        return ensemble(
            Client("a", 3.0, 1.0, 2.0, 9.0),
            Client("b", 0.0, 5.0, 5.0, 1.0),
            weights=(3.0, 1.0),
            combine=combine,
            shadows=(Client("s", 1.0, 2.0, 3.0, 4.0, version=shadow_version),),
        )

    first = models()
    run = stored(tmp_path, first, "abc")
    again = session(run, models())
    replayed = _score(again, rollouts("abc"), stored_scores(again.trainer.run, again.ensemble, 1))()
    assert replayed == first.compared(first.score(rollouts("abc")))
    assert [client.asked for client in again.ensemble.clients] == [[], [], []]
    # One response more: it alone is asked for, and a vote is again over all four.
    replayed = _score(again, rollouts("abcd"), stored_scores(again.trainer.run, again.ensemble, 1))()
    assert replayed == first.compared(first.score(rollouts("abcd")))
    assert [client.asked for client in again.ensemble.clients] == [[["d"]]] * 3
    assert stored_scores(run, models(shadow_version="2"), 1) == {}
    assert stored_scores(run, ensemble(Client("a", 3.0, 1.0, 2.0)), 1) == {}


def test_the_columns_are_there_only_where_several_models_score(tmp_path: Path) -> None:
    alone = stored(tmp_path / "alone", ensemble(Client("a", 1.0, 2.0)), "ab").read_rollouts(1)
    assert list(alone[0]) == list(COLUMNS)
    watched = ensemble(Client("a", 1.0, 2.0), shadows=(Client("s", 5.0, 6.0),))
    rows = stored(tmp_path / "watched", watched, "ab").read_rollouts(1)
    assert list(rows[0]) == [*COLUMNS, "shadow_rewards"]
    assert [by_model(row, "shadow_rewards") for row in rows] == [{"s/1": 5.0}, {"s/1": 6.0}]
    assert [row["reward_model"] for row in rows] == ["a", "a"]


def test_the_records_have_the_means_of_each_model() -> None:
    members = (Client("a", 1.0, 2.0), Client("b", 10.0, -10.0))
    scored = ensemble(*members, weights=(1.0, 1.0), shadows=(Client("s", 5.0, 6.0),)).score(rollouts("ab"))
    judge: Any = SimpleNamespace(score=lambda texts: [0.0] * len(texts))
    record = validation_record(5, scored, judge, 1.0)
    assert record["member_means"] == {"a/1": 1.5, "b/1": 0.0}
    assert record["shadow_means"] == {"s/1": 5.5} and record["shadowed"] == {"s/1": [5.0, 6.0]}
    assert [(c.key, c.title) for c in model_charts([], [record])] == [
        ("member-a-1", "Mean score of the member a/1 by step"),
        ("member-b-1", "Mean score of the member b/1 by step"),
        ("shadow-s-1", "Mean score of the shadow s/1 by step"),
    ]


def test_a_shadow_never_changes_a_decision(tmp_path: Path) -> None:
    prepare_judge(effect_config(tmp_path), tmp_path / "judge", lambda _: None)
    plain = see.run_iteration(effect_config(tmp_path))
    watched = see.run_iteration(effect_config(tmp_path, "reward_ensemble.shadows=[other, third/1]"))
    assert watched.weights == plain.weights
    assert [{k: v for k, v in row.items() if k != "shadow_rewards"} for row in watched.rows] == plain.rows
    assert all(len(row["shadow_rewards"]) == 2 for row in watched.rows)
    step = next(m for m in watched.metrics if m["kind"] == "step")
    values = [dict(row["shadow_rewards"])["third/1"] for row in watched.rows]
    chosen = [v for v, row in zip(values, watched.rows, strict=True) if row["selected"]]
    assert step["shadow_means"]["third/1"] == pytest.approx(sum(values) / len(values))
    assert step["selected_shadow_means"]["third/1"] == pytest.approx(sum(chosen) / len(chosen))


def test_both_executors_store_the_same_scores_and_decisions(tmp_path: Path) -> None:
    names = ["reward_ensemble.members={reward_model: 1, other: 0.5}", "reward_ensemble.shadows=[strict]"]
    config = effect_config(
        tmp_path, *names, "reward_ensemble.combine=vote", "reward.url=127.0.0.1:9", "phases.shards=2"
    )
    prepare_judge(config, tmp_path / "judge", lambda _: None)
    colocated = see.run_iteration(config)
    run = see.new_run(config)
    see.write_scorers(config, run)
    place = {"run_path": str(run.path), "step": 1, "from_sha256": ""}
    place["reward_model_ref"] = asdict(see.reference(config))
    shards = [disaggregated.sample_shard(config, place, i) for i in range(2)]
    with patch("alignment.scoring.RewardClient", see.RewardClientStandIn):
        scored = disaggregated.score_shards(config, place, json.loads(json.dumps(shards)))["scored"]
    disaggregated.select_and_store(config, place, json.loads(json.dumps(scored)))
    assert run.read_rollouts(1) == colocated.rows
    best = max(colocated.rows, key=lambda row: row["reward"])
    assert best["reward_model"] == "reward_model+other" and 0.5 < best["reward"] <= 1
    assert dict(best["member_rewards"]).keys() == {"reward_model/1", "other/1"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports: reward_model 1 and 2, other 1."""
    folder = tmp_path_factory.mktemp("ensemble") / "triton_repo"
    for name, seed in (("reward_model", 0), ("reward_model", 1), ("other", 2)):
        export_tiny(folder, name=name, seed=seed, accuracy=0.5 + seed / 10)
    return folder


def test_other_models_are_found_and_pinned(repository: Path) -> None:
    def others(*overrides: str) -> dict[str, list[dict[str, Any]]]:
        return find_others(load_config(SMOKE, [f"reward.repository={repository}", *overrides]))

    assert others() == {}
    found = others("reward_ensemble.members={other: 2, reward_model: 1}", "reward_ensemble.shadows=[reward_model/1]")
    assert [(m["name"], m["version"], m["accuracy"]) for m in found["members"]] == [("other", "1", 0.7)]
    assert [(m["name"], m["version"]) for m in found["shadows"]] == [("reward_model", "1")]
    assert len(found["shadows"][0]["digest"]) == 64
    mine = RewardModelRef("reward_model", "2", "", str(repository), None)
    check_distinct(mine, found)
    with pytest.raises(ConfigError, match="would score with reward_model version 1, 1: each version may score once"):
        check_distinct(RewardModelRef("reward_model", "1", "", "", None), found)
    with pytest.raises(ConfigError, match=r"a server holds 2 of a name; change reward_ensemble"):
        check_distinct(mine, {"shadows": [{**found["shadows"][0], "version": v} for v in ("1", "3")]})
    with pytest.raises(
        ConfigError, match=r"reward_ensemble\.shadows \(other/4\): .*other holds the versions 1; `python"
    ):
        others("reward_ensemble.shadows=[other/4]")
    with pytest.raises(
        ConfigError, match=r"reward_ensemble\.shadows \(new\): .*new holds no version; .*reward\.name=new"
    ):
        others("reward_ensemble.shadows=[new]")


@pytest.mark.slow
def test_two_models_and_a_shadow_on_one_real_server(repository: Path, tmp_path: Path) -> None:
    """Against the same weights in this process; each model passes its self-test."""
    from models.reward_model import render, score_texts

    said = ["good", "bad film", "It was long, and I liked it.", "good"]
    asked = ({"role": "user", "content": "Say"},)
    sampled = [
        Rollout(prompt_id="p", rollout_index=i, response=text, finish_reason="stop", messages=asked)  # type: ignore[arg-type]
        for i, text in enumerate(said)
    ]
    texts = [render(TEMPLATE, r.conversation) for r in sampled]
    shadow, first, second = (score_texts(*tiny_reward_model(seed), texts, max_tokens=96) for seed in range(3))
    config = load_config(
        SMOKE,
        [
            f"reward.repository={repository}",
            "resources.threads=1",
            "reward_ensemble.members={other: -2, reward_model: 1}",
            "reward_ensemble.shadows=[reward_model/1]",
        ],
    )
    run = RunFolder(tmp_path)
    notes: list[str] = []
    run.scorers.write_text(json.dumps(find_others(config)))
    digest = json.loads((repository / "reward_model" / "2" / "card.json").read_text())["digest"]
    reward = RewardModelRef("reward_model", "2", digest, str(repository), None)
    assert [m.name for m in task.scoring_models(config, run, reward).all] == ["reward_model", "other", "reward_model"]
    with (
        task.served(config, run, reward) as server,
        task.tested_clients(config, run, server, reward, notes.append) as models,
    ):
        scored = models.score(sampled)
        voted = replace(models, combine="vote", weights=(1.0, 2.0)).compared(models.score(sampled))
    assert [note.partition(" at ")[0] for note in notes] == [
        "self-test of reward_model version 2", "self-test of other version 1", "self-test of reward_model version 1"
    ]  # fmt: skip
    assert [r.shadow_rewards["reward_model/1"] for r in scored] == pytest.approx(shadow, abs=1e-4)
    assert [r.member_rewards["reward_model/2"] for r in scored] == pytest.approx(first, abs=1e-4)
    assert [r.member_rewards["other/1"] for r in scored] == pytest.approx(second, abs=1e-4)
    assert {(r.reward_model, r.reward_model_version) for r in scored} == {("reward_model+other", "2+1")}
    assert [r.reward for r in scored] == pytest.approx(
        [a - 2 * b for a, b in zip(first, second, strict=True)], abs=1e-3
    )
    beaten = [[sum(x > y for y in row[:3]) / 2 for x in row] for row in (first, second)]
    assert [r.reward for r in voted] == pytest.approx([(a + 2 * b) / 3 for a, b in zip(*beaten, strict=True)])


def test_a_version_to_serve_too_must_be_named_whole(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--repository", str(repository), "--also", "other"])
    assert "'other' is no version of a model: give e.g. reward_model/2" in capsys.readouterr().err
    assert main(["--repository", str(repository), "--model", "reward_model", "--also", "other/7"]) == 2
    assert "no exported version of other version 7" in capsys.readouterr().err
