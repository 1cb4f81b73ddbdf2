"""An RS step that fails badly: the rules by hand, then toy runs whose loop ends early, in both executors."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

import config_effects as see
from alignment import colocated, disaggregated, inner_run, rs_step, stages, update_worker
from alignment.config import Config, load_config
from alignment.config_promotion import PromotionSection
from alignment.errors import CheckpointError, ConfigError, TrainingError
from alignment.judge_stage import prepare_judge
from alignment.rollback import first_failure, settle, standing_checkpoint
from alignment.run_folder import RunFolder, create, write_json
from alignment.run_metrics import progress_file
from flow_runs import SMOKE
from promotion_effects import SCORES, validation


def failing(*records: dict[str, Any], **config: Any) -> dict[str, Any] | None:
    return first_failure(PromotionSection(**config), records)


# The rules


def test_a_fall_from_the_best_by_more_than_the_bound_is_one() -> None:
    # The first validation's rewards have a standard deviation of 1, and equal falls an interval without width.
    assert failing(validation(0, 0.0), validation(5, 2.0), validation(10, 1.0)) is None
    found = failing(validation(0, 0.0), validation(5, 2.0), validation(10, 0.5), validation(15, 0.4))
    assert found == {
        "kind": "rollback",
        "step": 10,
        "rule": "validation",
        "value": 1.5,
        "ci95": [1.5, 1.5],
        "bound": 1.0,
        "reason": "the mean reward of the validation after RS step 10 lies 1.50 standard deviations (95% 1.50 to 1.50) "
        "below that after RS step 5, more than promotion.max_validation_fall (1)",
    }
    assert failing(validation(0, 0.0), validation(5, 2.0), validation(10, 0.5), max_validation_fall=1.5) is None
    assert failing(validation(0, 0.0), validation(5, 2.0), validation(10, -9.0), max_validation_fall=None) is None
    assert failing(validation(0, 0.0), validation(5, -1.5))["reason"].count("below that after RS step 0") == 1


def test_the_unit_is_the_first_validation_s_whatever_has_become_of_the_spread() -> None:
    narrow = {**validation(5, 0.0), "rewards": [5.0, 5.001] * 4, "reward_mean": 5.0005}
    lower = {**narrow, "step": 10, "rewards": [4.9, 4.901] * 4, "reward_mean": 4.9005}
    assert failing(validation(0, 0.0), narrow, lower) is None


def test_a_fall_that_chance_may_have_made_is_none() -> None:
    falls = [3.0, 0.0] * 4  # 1.5 on average; of eight draws one in thirty holds at most one of the falls
    now = {**validation(5, 0.0), "rewards": [score - fall for score, fall in zip(SCORES, falls, strict=True)]}
    assert failing(validation(0, 0.0), now) is None
    assert failing(validation(0, 0.0), now, max_validation_fall=0.3)["ci95"] == [0.375, 2.625]


def test_what_cannot_be_compared_is_no_fall() -> None:
    means = {"kind": "validation", "step": 5, "reward_mean": -9.0}
    assert failing(validation(0, 0.0), means) is None
    null = {**validation(5, -9.0), "rewards": [None, *SCORES[1:]]}
    assert failing(validation(0, 0.0), null) is None
    few = [{**validation(step, 0.0), "rewards": [reward] * 7} for step, reward in ((0, 9.0), (5, 0.0))]
    assert failing(*few) is None


def test_a_step_beyond_the_budget_of_kl_is_one_at_once() -> None:
    steps = [{"kind": "step", "step": i, "kl": kl} for i, kl in enumerate([None, 0.1, 0.2, 0.21], start=1)]
    assert failing(*steps) is None and failing(*steps[:3], max_kl_per_token=0.2) is None
    found = failing(*steps, max_kl_per_token=0.2)
    assert (found["step"], found["rule"], found["value"]) == (4, "kl", 0.21)
    assert found["reason"].endswith("a KL to the base of 0.21 nats per token, above promotion.max_kl_per_token (0.2)")


def test_another_run_s_past_is_compared_with_and_fails_no_more() -> None:
    adopted = [{**validation(0, 0.0), "run_id": "1"}, {**validation(5, 2.0), "run_id": "1"}]
    assert failing(*adopted, {**validation(10, 0.0), "run_id": "1"}) is None
    assert failing(*adopted, {**validation(10, 0.0), "run_id": "1"}, validation(15, 0.0))["step"] == 15


def test_it_is_written_down_once(tmp_path: Path) -> None:
    run = create(tmp_path, "7", "{}")
    for record in (validation(0, 0.0), validation(2, 1.0), validation(4, -2.0)):
        run.append_metrics(record)
    assert run.rollback() is None and list(run.validations()) == [0, 2, 4]
    found = [settle(PromotionSection(), run) for _ in range(2)]
    assert found[0] == found[1] == run.rollback() and run.failed_step() == 4
    assert [r["kind"] for r in run.read_metrics()].count("rollback") == 1
    assert list(run.validations()) == [0, 2]  # nobody's best
    assert settle(PromotionSection(max_validation_fall=None), run) == found[0]  # it stays


# Toy runs

OWN = ("loop.max_steps=6", "loop.steps_per_iteration=6", "loop.val_check_interval=1", "loop.save_interval=1")


class FallingStandIn(see.RewardClientStandIn):
    """Stands in for a reward server that likes a run's responses less from its RS step 3 on, by three deviations."""

    run: RunFolder

    def score(self, conversations: Any) -> list[float]:
        worse = 10.0 if any(f.name >= "step-000002" for f in self.run.checkpoints.glob("step-*")) else 0.0
        return [score - worse for score in super().score(conversations)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs lie, with a judge."""
    root = tmp_path_factory.mktemp("rollback")
    prepare_judge(config_in(root, "judge.num_train_pairs=64"), root / "judge", lambda _: None)
    return root


def config_in(root: Path, *overrides: str) -> Config:
    own = ("wandb.mode=disabled", "judge.num_train_pairs=64", "reward.url=127.0.0.1:9")
    return load_config(SMOKE, [f"run.root={root}", *own, *OWN, *overrides])


@pytest.fixture(scope="module")
def fallen(root: Path) -> tuple[Config, RunFolder]:
    """A run of which a worker did the iteration: its third RS step's validation fell."""
    config = config_in(root)
    run = see.new_run(config)
    FallingStandIn.run = run
    with patch.object(see, "RewardClientStandIn", FallingStandIn):
        done = see.run_iteration(config, run, until=6)
    assert done.steps("step") == [1, 2, 3] and done.steps("validation") == [0, 1, 2, 3]
    assert done.checkpoints[-1] == "step-000003"  # it is kept, to be looked at
    return config, run


def copied(run: RunFolder, place: Path) -> RunFolder:
    shutil.copytree(run.path, place)
    return RunFolder(place)


@contextlib.contextmanager
def nobody_works() -> Iterator[None]:
    with patch.object(colocated, "run_workers", lambda *_, **__: pytest.fail("workers were started")):
        yield


def scorers(config: Config, run: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    reward = {"name": config.reward.name, "version": "1", "digest": "", "repository": "", "accuracy": None}
    return reward, {"name": "judge", "uri": str(run.path.parent / "judge"), "accuracy": 1.0}


def test_the_best_before_is_evaluated_the_loop_is_over_and_the_report_says_why(
    fallen: tuple[Config, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = fallen
    validations = {r["step"]: r["reward_mean"] for r in run.read_metrics() if r["kind"] == "validation"}
    best = max((1, 2), key=lambda step: validations[step])
    with nobody_works():
        checkpoint, steps_left = stages.run_iteration(config, str(run.path), *scorers(config, run))
    assert checkpoint["step"] == best and not steps_left
    assert not progress_file(run).exists()  # nothing to watch
    with patch("alignment.scoring.RewardClient", see.RewardClientStandIn):
        report, evaluated = stages.run_evaluation(config, str(run.path), *scorers(config, run), 0.0)
    assert evaluated["step"] == report["checkpoint"]["step"] == best
    back = report["promotion"]["rolled_back"]
    assert (back["step"], back["to_step"], back["rule"]) == (3, best, "validation")
    assert re.match(r"the mean reward of the validation after RS step 3 lies \d\.\d\d standard dev", back["reason"])
    assert report["promotion"]["rules"][-1]["name"] == "rollback" and report["promotion"]["rules"][-1]["passed"]
    assert json.loads(run.report_json.read_text()) == report
    assert "The loop ended early: the mean reward" in run.report_html.read_text()
    assert (
        "the loop ends here, and the best checkpoint before RS step 3 is evaluated: the mean" in capsys.readouterr().out
    )

    # Asked again, it says the same and measures nothing: there is no server now.
    again, _ = stages.run_evaluation(config, str(run.path), *scorers(config, run), 99.0)
    assert again == report


def test_killed_before_it_was_written_down_it_is_when_the_run_is_resumed(
    fallen: tuple[Config, RunFolder], root: Path
) -> None:
    config, run = fallen
    copy = copied(run, root / "killed")
    kept = [r for r in run.read_metrics() if r["kind"] != "rollback"]
    copy.metrics.write_text("".join(json.dumps(r) + "\n" for r in kept))
    shutil.rmtree(copy.checkpoints / "step-000003")
    for _ in range(2):
        with nobody_works():
            checkpoint, steps_left = stages.run_iteration(config, str(copy.path), *scorers(config, copy))
        assert checkpoint["step"] == standing_checkpoint(run).step and not steps_left
    assert [r for r in copy.read_metrics() if r["kind"] == "rollback"] == [run.rollback()]


def test_another_run_goes_on_from_where_it_was_rolled_back_to(fallen: tuple[Config, RunFolder], root: Path) -> None:
    config, run = fallen[0], copied(fallen[1], root / "gone-on-from")
    write_json(run.scorers, dict(zip(("reward_model", "judge"), scorers(config, run), strict=True)))
    other = see.new_run(config_in(root, f"resume.from={run.path}", "training.lr=1e-5"))
    best = standing_checkpoint(run).step
    assert standing_checkpoint(other).step == best == max(r["step"] for r in other.read_metrics() if "run_id" in r)
    assert other.rollback() is None and all(f.name <= f"step-{best:06d}" for f in other.checkpoints.glob("step-*"))
    for step in (1, 2):  # now there is nothing to go on from
        shutil.rmtree(run.checkpoints / f"step-{step:06d}", ignore_errors=True)
    with pytest.raises(CheckpointError, match="has no checkpoint before its RS step 3, which failed badly: start anew"):
        see.new_run(config_in(root, f"resume.from={run.path}", "training.lr=2e-5"))


def diverging_from(step: int) -> Any:
    """An update that is not finite from an RS step on."""

    def train_step(trainer: Any, selected: Any, now: int, real: Any = rs_step.train_step) -> Any:
        if now >= step:
            raise TrainingError("the loss is nan: training diverged")
        return real(trainer, selected, now)

    return patch.object(rs_step, "train_step", train_step)


def test_an_update_that_is_not_finite_goes_back_to_the_best_checkpoint_if_there_is_one(root: Path) -> None:
    config = config_in(root, "loop.steps_per_iteration=3")
    run = see.new_run(config)
    with diverging_from(3):
        done = see.run_iteration(config, run)
    assert done.steps("step") == done.steps("validation")[1:] == [1, 2]
    assert (run.rollback()["step"], run.rollback()["rule"]) == (3, "finite")
    assert run.rollback()["reason"] == "RS step 3 failed: the loss is nan: training diverged"
    assert not (run.checkpoints / "step-000003").exists() and standing_checkpoint(run).step in (1, 2)
    first = see.new_run(config)
    with diverging_from(1), pytest.raises(TrainingError, match="the loss is nan"):
        see.run_iteration(config, first)
    assert first.rollback() is None


def test_a_step_beyond_the_budget_is_neither_validated_nor_followed(root: Path) -> None:
    config = config_in(root, "training.kl_penalty=0.1", "promotion.max_kl_per_token=1e-9", "loop.save_interval=6")
    run = see.new_run(config)
    done = see.run_iteration(config, run)
    failed = run.rollback()
    assert failed["rule"] == "kl" and done.steps("step")[-1] == failed["step"] == max(done.steps("validation")) + 1
    assert done.checkpoints == [f"step-{failed['step']:06d}"]
    assert standing_checkpoint(run).step == failed["step"]  # there is no other


# The disaggregated executor

PHASES = ("loop.executor=disaggregated", "loop.steps_per_iteration=1")


def place_of(config: Config, run: RunFolder, step: int, sha256: str) -> dict[str, Any]:
    reward, judge = scorers(config, run)
    return {
        "run_path": str(run.path),
        "step": step,
        "from_sha256": sha256,
        "reward_model_ref": reward,
        "judge_ref": judge,
    }


def test_in_phases_the_validation_that_falls_ends_the_loop_too(fallen: tuple[Config, RunFolder], root: Path) -> None:
    config, whole = config_in(root, *PHASES), fallen[1]
    run = see.new_run(config)
    FallingStandIn.run = run
    with patch.object(see, "RewardClientStandIn", FallingStandIn):
        see.run_iteration(config, run, until=2)
        with patch("alignment.rollback.settle", lambda *_: None):  # which the validation does here
            trained = see.run_iteration(config, run, until=3)
    checkpoint = {"sha256": trained.weights}
    run.truncate_metrics(2)
    steps = [r for r in whole.read_metrics() if r["kind"] == "step"]
    run.append_metrics(steps[2])  # the update's record; its checkpoint is there, its validation is to come
    with patch("alignment.scoring.RewardClient", FallingStandIn):
        disaggregated.validate(config, place_of(config, run, 3, ""), checkpoint)
    assert run.failed_step() == 3
    assert disaggregated.validate(config, place_of(config, run, 3, ""), checkpoint) == {}
    with pytest.raises(
        ConfigError, match=r"does no further RS step: the mean reward .* begin another with --set resume"
    ):
        disaggregated.begin_step(config, str(run.path), "1")
    with (
        patch.object(inner_run, "_unfinished", lambda *_: None),
        patch.object(inner_run, "_run_step", lambda *_: pytest.fail("a step was begun")),
    ):
        for _ in range(2):
            found, steps_left = inner_run.iterate(config, str(run.path))
            assert found.step == standing_checkpoint(run).step < 3 and not steps_left
    assert not progress_file(run).exists()


def test_an_update_phase_that_is_not_finite_leaves_a_rollback_and_no_checkpoint(root: Path) -> None:
    config = config_in(root, *PHASES)
    run = create(root, "diverged", "{}")
    trainer = SimpleNamespace(run=run, config=config, start=1, is_writer=True)
    scoring = {"scored": [], "decisions": [], "seconds": {}, "scoring_server": {}, "lost_prompts": [], "judge": ""}

    def train_step_stand_in(*_: Any) -> None:
        raise TrainingError("the loss is nan")

    with (
        patch("alignment.trainer.train_step", train_step_stand_in),
        patch("alignment.trainer.save_checkpoint", lambda *_: pytest.fail("a checkpoint was saved")),
    ):
        for _ in range(2):  # a task that is repeated
            update_worker._train(trainer, 2, scoring)
        assert [(r["kind"], r["step"], r["rule"]) for r in run.read_metrics()] == [("rollback", 2, "finite")]
        trainer.start = 0
        with pytest.raises(TrainingError):
            update_worker._train(trainer, 1, scoring)
