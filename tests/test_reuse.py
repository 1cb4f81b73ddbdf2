"""Training on another run's rollouts: nothing is generated or scored, and the decisions are this run's own.

The worker runs in this process; the reward server's client is a stand-in that counts what it is asked.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

import config_effects as see
from alignment import disaggregated, rs_step
from alignment.config import Config, load_config
from alignment.errors import ConfigError, DataError
from alignment.judge_stage import prepare_judge
from alignment.launch import Gang
from alignment.lineage import check, describe
from alignment.report import rollouts_of_others
from alignment.reward_selftest import PROBES
from alignment.run_folder import RunFolder, write_json
from alignment.selection import select
from alignment.types import ScoredRollout
from flow_runs import SMOKE

OWN = ("wandb.mode=disabled", "judge.num_train_pairs=64", "loop.max_steps=2")
DISAGGREGATED = ("loop.executor=disaggregated", "loop.steps_per_iteration=1", "phases.shards=2")


@dataclass(frozen=True)
class Bench:
    """A root with one run of two RS steps that drew its own rollouts."""

    root: Path
    source: RunFolder
    weights: str

    def config(self, *overrides: str) -> Config:
        return load_config(SMOKE, [f"run.root={self.root}", *OWN, *overrides])

    def reusing(self, *overrides: str) -> Config:
        return self.config(f"reuse.rollouts={self.source.path}", *overrides)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("reuse")
    config = load_config(SMOKE, [f"run.root={root}", *OWN])
    judge = prepare_judge(config, root / "judge", lambda _: None)
    done = see.run_iteration(config)
    run = done.trainer.run
    shutil.copytree(root / "judge", run.path / "judge")
    judge_ref = {**asdict(judge), "uri": str(run.path / "judge")}
    write_json(run.scorers, {"reward_model": {**asdict(see.reference(config)), "digest": "d"}, "judge": judge_ref})
    return Bench(root, run, done.weights)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The conversations that the server is asked to score, those of its self-test apart."""
    conversations: list[Any] = []

    class Counting(see.RewardClientStandIn):
        def score(self, given: Any) -> list[float]:
            conversations.extend(one for one in given if one not in PROBES)
            return super().score(given)

    monkeypatch.setattr(see, "RewardClientStandIn", Counting)
    return conversations


@pytest.fixture
def asked(scored: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The same, where no rollouts of RS steps can be drawn."""

    def validating_only(*arguments: Any, real: Any = rs_step.generate, **others: Any) -> Any:
        assert others["stream"].endswith("/validation"), others["stream"]
        return real(*arguments, **others)

    monkeypatch.setattr(rs_step, "generate", validating_only)
    return scored


def chosen(run: RunFolder, step: int) -> list[tuple[Any, ...]]:
    return [(r["prompt_id"], r["rollout_index"], r["selected"], r["reason"]) for r in run.read_rollouts(step)]


def test_with_the_same_selection_decisions_and_weights_are_the_same(bench: Bench, asked: list[Any]) -> None:
    done = see.run_iteration(bench.reusing())
    run = done.trainer.run
    assert len(asked) == 2 * 8  # the validations of the base and of the last step
    assert done.weights == bench.weights
    for step in (1, 2):
        assert chosen(run, step) == chosen(bench.source, step)
        ours, theirs = run.read_rollouts(step), bench.source.read_rollouts(step)
        same = [{**row, "log_prob": None} for row in theirs]  # which another policy drew
        assert ours == same
        assert run.reused_file(step).read_bytes() == bench.source.rollouts_file(step).read_bytes()
    theirs = {r["step"]: r for r in bench.source.read_metrics() if r["kind"] == "step"}
    for record in (r for r in done.metrics if r["kind"] == "step"):
        other = theirs[record["step"]]
        assert record["reused_from"] == str(bench.source.path) and "reused_from" not in other
        assert (record["loss"], record["reward_mean"]) == (other["loss"], other["reward_mean"])
        assert record["tokens_per_second"] is None and record["seconds"]["scoring"] == 0.0
        assert set(record["scoring_server"].values()) == {None}


def test_another_selection_chooses_anew_and_trains_otherwise(bench: Bench, asked: list[Any]) -> None:
    config = bench.reusing("selection.strategy=random_per_prompt", "selection.top_n_rollouts=2")
    done = see.run_iteration(config)
    run = done.trainer.run
    assert len(asked) == 2 * 8 and done.weights != bench.weights
    for step in (1, 2):
        rows = bench.source.read_rollouts(step)
        keys = ("prompt_id", "rollout_index", "response", "finish_reason", "reward")
        stored = [ScoredRollout(**{key: row[key] for key in keys}) for row in rows]
        expected = select(stored, strategy="random_per_prompt", top_n=2, seed=config.seed)
        assert chosen(run, step) == [(d.prompt_id, d.rollout_index, d.selected, d.reason) for d in expected]
        assert [r["reward"] for r in run.read_rollouts(step)] == [row["reward"] for row in rows]
    assert [r["num_selected"] for r in done.metrics if r["kind"] == "step"] == [8, 8]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(bench: Bench, asked: list[Any]) -> None:
    config = bench.reusing("selection.top_n_rollouts=2")
    whole = see.run_iteration(config)
    run = see.run_iteration(config, until=1).trainer.run
    assert see.run_iteration(config, run, until=2).weights == whole.weights


def test_manifests_tell_whose_rollouts_they_were(bench: Bench, asked: list[Any]) -> None:
    run = see.run_iteration(bench.reusing("selection.strategy=random_per_prompt")).trainer.run
    manifest = json.loads((run.lineage / "step-000002.json").read_text())
    assert manifest["reused_rollouts"]["run"] == str(bench.source.path)
    assert list(manifest["reused_rollouts"]["files"]) == ["step-000002.parquet"]
    assert f"1 RS steps of rollouts of {bench.source.path} selected by random_per_prompt" in "\n".join(describe(run))
    found = {what: right for right, what in checked(run)}
    assert all(found.values()) and {"reused/step-000001.parquet", "rollouts/step-000001.parquet"} <= set(found)
    run.reused_file(1).unlink()
    assert (False, f"{run.reused_file(1)} is missing") in checked(run)
    assert json.loads(run.config.read_text())["reuse"]["rollouts"] == str(bench.source.path)
    scorers = json.loads(run.scorers.read_text())
    assert scorers["judge"]["uri"] == str(run.path / "judge") and scorers["reward_model"]["digest"] == "d"


def checked(run: RunFolder) -> list[tuple[bool, str]]:
    """What `--verify` says but for the reward model, a stand-in that nobody exported, and the worker's URL of it."""
    return [(right, what) for right, what in check(run) if not what.startswith(("reward model ", "config.json"))]


def test_the_phases_take_the_same_rollouts_and_ask_nobody(bench: Bench) -> None:
    config = bench.reusing(*DISAGGREGATED, "reward.url=127.0.0.1:9")
    run = see.new_run(config)
    place = disaggregated.with_scorers(config, disaggregated.begin_step(config, str(run.path), "1"))
    with patch("alignment.scoring.RewardClient", None):
        shards = [disaggregated.sample_shard(config, place, i) for i in range(2)]
        assert shards == [([], 0.0)] * 2
        scored = json.loads(json.dumps(disaggregated.score_shards(config, place, shards)))
    decisions = disaggregated.select_and_store(config, place, scored["scored"])
    assert chosen(run, 1) == chosen(bench.source, 1)
    checkpoint = disaggregated.train(config, place, scored, decisions, Gang(0, 1, "127.0.0.1", 1))
    assert checkpoint["step"] == 1
    record = next(r for r in run.read_metrics() if r["kind"] == "step")
    theirs = next(r for r in bench.source.read_metrics() if r["kind"] == "step")
    assert record["reused_from"] == str(bench.source.path)
    assert (record["loss"], record["num_selected"]) == (pytest.approx(theirs["loss"], abs=1e-6), 4)


def test_a_resolved_config_names_the_source_for_good(bench: Bench) -> None:
    from sources import parse_preset

    named = bench.config(f"reuse.rollouts={bench.source.path.name}")
    resolved = parse_preset(named.model_dump_json())
    assert resolved["reuse"]["rollouts"] == str(bench.source.path)
    gone = {**resolved, "reuse": {"rollouts": "/no/such/run", "scores": False}}
    assert parse_preset(json.dumps(gone))["reuse"]["rollouts"] == "/no/such/run"  # parsed again, when it was moved


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("seed=1",), "was drawn or scored otherwise: seed (0 there, 1 here). Give these keys its values"),
        (("rollouts.temperature=0.5",), "otherwise: rollouts.temperature (1.0 there, 0.5 here)"),
        (("reward.max_tokens=48",), "otherwise: reward.max_tokens (64 there, 48 here)"),
        (("reward.version=7",), "reward.version (7) is not the 1 that reuse.rollouts"),
        (("loop.max_steps=3",), "has rollouts of 2 RS steps, and this run is to have 3: set loop.max_steps=2, or"),
        (("reuse.rollouts=nowhere",), "reuse.rollouts (nowhere): no run of that id in"),
    ],
)
def test_what_does_not_go_with_the_rollouts_is_refused(bench: Bench, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        see.new_run(bench.reusing(*overrides))
    assert said in str(caught.value)


def test_what_samples_and_how_it_trains_may_be_another(bench: Bench) -> None:
    free = ("rollouts.batch_tokens=99", "training.lora_rank=2", "training.lr=1e-5", "loop.max_steps=1")
    run = see.new_run(bench.reusing(*free))
    assert [path.name for path in run.reused.iterdir()] == ["step-000001.parquet"]


def test_a_run_that_reuses_names_the_one_to_take(bench: Bench) -> None:
    second = see.new_run(bench.reusing())
    with pytest.raises(ConfigError, match=rf"has its rollouts from {bench.source.path}: set reuse.rollouts to that"):
        see.new_run(bench.config(f"reuse.rollouts={second.path}"))


@pytest.fixture
def copy(bench: Bench, tmp_path: Path) -> RunFolder:
    """The source in a folder that the test may change."""
    shutil.copytree(bench.source.path, tmp_path / "source")
    return RunFolder(tmp_path / "source")


def changed(run: RunFolder, step: int, change: Any) -> None:
    path = run.rollouts_file(step)
    parquet.write_table(change(parquet.read_table(path)), path)


def with_column(name: str, value: str) -> Any:
    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, pa.array([value] * len(table)))

    return change


def test_rollouts_that_cannot_be_trained_on_are_refused(bench: Bench, copy: RunFolder) -> None:
    config = bench.config(f"reuse.rollouts={copy.path}")
    changed(copy, 2, with_column("reward_model_version", "3"))
    with pytest.raises(
        ConfigError,
        match=r"RS step 2 was scored by reward_model version 3, and this run would report reward_model version 1",
    ):
        see.new_run(config)
    changed(copy, 2, lambda table: table.drop_columns(["response_ids"]))
    with pytest.raises(DataError, match=r"step-000002\.parquet lacks response_ids, which earlier releases"):
        see.new_run(config)
    copy.scorers.unlink()
    with pytest.raises(ConfigError, match="has no rollouts yet"):
        see.new_run(config)


def test_rollouts_of_other_prompts_than_the_step_s_are_refused(bench: Bench, copy: RunFolder, asked: list[Any]) -> None:
    changed(copy, 1, with_column("prompt", "another text"))
    with pytest.raises(DataError, match=r"reused/step-000001\.parquet has rollouts of the prompt toy-\d+ \('another"):
        see.run_iteration(bench.config(f"reuse.rollouts={copy.path}"))


def test_the_report_says_whose_rollouts_they_were() -> None:
    steps = [{"step": 1, "reused_from": "/a"}, {"step": 2, "reused_from": "/a"}, {"step": 3}]
    assert rollouts_of_others(steps) == (
        "RS steps 1 to 2: those of /a, drawn by that run's policies, not by this one's: off-policy, RS step 1 apart"
    )
    assert rollouts_of_others([{"step": 1}]) == ""


def test_scores_that_a_run_kept_are_not_asked_for_again(
    bench: Bench, scored: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignment.reward_repository.card_of", lambda ref: {"digest": "d", "version": ref.version})
    config = bench.config("reuse.scores=true")
    first = see.run_iteration(config)
    answered = len(scored)
    second = see.run_iteration(config)
    assert len(scored) == answered > 0 and second.weights == first.weights == bench.weights
    counts = [
        [r["scoring_cache"] for r in done.metrics if r["kind"] in ("step", "validation")] for done in (first, second)
    ]
    assert sum(c["misses"] for c in counts[0]) == answered
    for before, after in zip(*counts, strict=True):
        assert after == {"hits": before["hits"] + before["misses"], "misses": 0}
    assert len(list((bench.root / "scores").iterdir())) == 1
