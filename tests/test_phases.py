"""An RS step's phases one by one, and what the disaggregated executor does around its inner run.

The update is the real worker, in a process of its own; the reward server's client is a stand-in.
"""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

import config_effects as see
import phase_effects
from alignment import disaggregated, inner_run, trainer
from alignment.config import Config, load_config
from alignment.engine import Ranks
from alignment.errors import CheckpointError, ConfigError, StoppedError, WorkerError
from alignment.judge_stage import prepare_judge
from alignment.launch import Gang
from alignment.lifeline import ELSEWHERE_S, INTERRUPTED_S
from alignment.node_gpus import hold_one
from alignment.run_folder import RunFolder, write_json
from alignment.run_metrics import RunProgress, progress_file
from alignment.types import JudgeRef
from flow_runs import ROOT, SMOKE
from sources import parse_preset

OWN = (
    *("wandb.mode=disabled", "judge.num_train_pairs=64", "reward.url=127.0.0.1:9", "loop.executor=disaggregated"),
    *("loop.steps_per_iteration=1", "loop.max_steps=1", "phases.update.cpu=3", "phases.shards=2"),
)


def config_in(root: Path, *overrides: str) -> Config:
    return load_config(SMOKE, [f"run.root={root}", *OWN, *overrides])


@dataclass(frozen=True)
class Step:
    """The first RS step of a run, done but for its validation."""

    config: Config
    run: RunFolder
    place: dict[str, Any]
    shards: list[Any]
    scored: dict[str, Any]
    checkpoint: dict[str, Any]


def plain(value: Any) -> Any:
    """As it comes out of an artifact of another task."""
    return json.loads(json.dumps(value))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Step:
    root = tmp_path_factory.mktemp("phases")
    config = config_in(root)
    judge = prepare_judge(config, root / "judge", lambda _: None)
    run = see.new_run(config)
    write_json(run.scorers, {"reward_model": asdict(see.reference(config)), "judge": asdict(judge)})
    place = disaggregated.with_scorers(config, disaggregated.begin_step(config, str(run.path), "1"))
    shards = plain([disaggregated.sample_shard(config, place, i) for i in range(2)])
    with patch("alignment.scoring.RewardClient", see.RewardClientStandIn):
        scored = plain(disaggregated.score_shards(config, place, shards))
    decisions = plain(disaggregated.select_and_store(config, place, scored["scored"]))
    checkpoint = disaggregated.train(config, place, scored, decisions, Gang(0, 1, "127.0.0.1", 1))
    return Step(config, run, place, shards, scored, checkpoint)


@pytest.fixture
def step(done: Step, tmp_path: Path) -> Step:
    """The same in a folder that the test may change."""
    run = RunFolder(tmp_path / "runs" / done.run.path.name)
    shutil.copytree(done.run.path, run.path)
    return replace(done, run=run, place={**done.place, "run_path": str(run.path)})


def test_a_checkpoint_holds_the_run_s_config_whatever_the_phase_s_resources(done: Step) -> None:
    """Else `alignment.lineage --verify` would report an honest run as changed."""
    saved = json.loads((done.run.checkpoints / "step-000001" / "run_config.json").read_text())
    assert saved == json.loads(done.run.config.read_text())
    assert saved["resources"]["cpu"] == 1 and saved["phases"]["update"]["cpu"] == 3


def test_no_phase_works_on_another_checkpoint_than_the_step_s(step: Step) -> None:
    config, place = step.config, step.place
    with pytest.raises(
        CheckpointError, match=r"RS step 1 was begun from another checkpoint than the newest in .* RS step 1"
    ):
        disaggregated.score_shards(config, place, step.shards)
    with pytest.raises(CheckpointError, match="was begun from another checkpoint"):
        disaggregated.select_and_store(config, place, step.scored["scored"])
    with pytest.raises(CheckpointError, match="was begun from another checkpoint"):
        disaggregated.sample_shard(config, place, 0)
    with patch.object(disaggregated, "prepare_scorers"), pytest.raises(CheckpointError, match="was begun from another"):
        disaggregated.prepare_step(config, place)
    with pytest.raises(CheckpointError, match="RS step 1 made another checkpoint"):
        disaggregated.validate(config, place, {**step.checkpoint, "sha256": "0" * 64})
    shutil.rmtree(step.run.checkpoints / "step-000001")
    with pytest.raises(
        CheckpointError, match=r"RS step 1 made another checkpoint .* that of RS step 0: it was removed"
    ):
        disaggregated.validate(config, place, step.checkpoint)
    assert not step.run.validations()


def test_the_step_s_own_checkpoint_is_validated_once(step: Step) -> None:
    with patch("alignment.scoring.RewardClient", see.RewardClientStandIn):
        means = disaggregated.validate(step.config, step.place, step.checkpoint)
    assert means["step"] == 1 and "rewards" not in means
    assert disaggregated.validate(step.config, step.place, step.checkpoint) == means  # the server is gone
    assert list(step.run.validations()) == [1]


def test_the_base_is_validated_under_the_resources_of_validation(tmp_path: Path) -> None:
    config = config_in(tmp_path, "phases.validation.cpu=7")
    run, seen = see.new_run(config), []
    see_place = disaggregated.begin_step(config, str(run.path), "1")
    judge = JudgeRef("judge", "/judge", 0.9)
    write_json(run.scorers, {"reward_model": asdict(see.reference(config)), "judge": asdict(judge)})
    with patch.object(disaggregated, "_validate", lambda own, *_: seen.append(own.resources.cpu)):
        disaggregated.prepare_step(config, see_place)
    assert seen == [7]


def test_a_start_that_is_resumed_keeps_its_folder(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    first = disaggregated.begin_step(config, None, "11")
    assert disaggregated.begin_step(config, None, "12", "11") == first
    assert Path(first["run_path"]).name == "11"


def test_an_update_by_itself_is_on_its_phase_s_devices_and_has_no_engine_for_rollouts(
    done: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (
        "phases.update.gpu=8",
        "rollouts.engine=vllm",
        "policy.dtype=float32",
        "training.offload_during_rollouts=true",
    )
    config = config_in(done.run.path.parent, *own, "loop.executor=colocated", "resources.gpu=1")
    placed = []
    engine_stand_in = SimpleNamespace(eval=lambda: None)
    monkeypatch.setattr(trainer, "check_own", lambda *_: None)
    monkeypatch.setattr(trainer, "check_unchanged", lambda *_: None)  # the run was made with another config
    monkeypatch.setattr(trainer, "load", lambda own, _: placed.append(own.resources.gpu))
    monkeypatch.setattr(trainer, "policy_engine", lambda own, *_: placed.append(own.resources.gpu) or engine_stand_in)
    monkeypatch.setattr(trainer, "restore_optimizer", lambda *_: None)
    monkeypatch.setattr(trainer, "load_engine", lambda *_: pytest.fail("an engine for rollouts"))
    loaded = trainer.load_trainer(config, done.run, Ranks(0, 1), updates_only=True)
    assert placed == [8, 8] and loaded.config is config
    assert loaded.sampler is None and loaded.hosted is None


# Around the inner run


STEP = {"kind": "step", "seconds": {"rollouts": 3.0, "scoring": 1.0, "update": 2.0}, "reward_mean": 0.5}
STEP |= {"selected_reward_mean": 1.0}
TOLD = {"kind": "task", "name": "iterate", "seconds": 30.0}


def test_what_was_recorded_after_the_last_task_that_tells_is_untold() -> None:
    first, base, second = {**STEP, "step": 1}, {"kind": "validation", "step": 0}, {**STEP, "step": 2}
    other = {"kind": "task", "name": "reward_model", "seconds": 9.0}
    assert inner_run.untold([other, base, first]) == [base, first]
    assert inner_run.untold([base, first, TOLD, other]) == []
    assert inner_run.untold([base, first, TOLD, second]) == [second]
    assert inner_run.untold([{**first, "run_id": "earlier"}, second]) == [second]


def test_progress_before_a_step_is_that_of_the_last_one_s_whole_task() -> None:
    todo = inner_run._Todo(1, 2, 4, None)
    assert replace(inner_run._progress([], todo), at=0) == RunProgress(1, 4, 0)
    records = [{**STEP, "step": 1}, TOLD, {**STEP, "step": 2, "reward_mean": 9.0}]  # whose checkpoint is not there
    assert replace(inner_run._progress(records, todo), at=0) == RunProgress(1, 4, 0, 30.0, 0.5, 1.0)
    assert inner_run._progress(records[:1], todo).step_seconds == 6.0


@pytest.mark.parametrize(("error", "stays"), [(StoppedError, False), (WorkerError, True)])
def test_progress_is_told_from_the_start_and_not_of_a_run_that_was_stopped(
    tmp_path: Path, error: type[Exception], stays: bool
) -> None:
    config, seen = config_in(tmp_path), []
    run = see.new_run(config)

    def run_step_stand_in(*_: Any) -> None:
        seen.append(progress_file(run).exists())
        raise error("ended")

    with (
        patch.object(inner_run, "_unfinished", lambda *_: None),
        patch.object(inner_run, "_run_step", run_step_stand_in),
        pytest.raises(error),
    ):
        inner_run.iterate(config, str(run.path))
    assert seen == [True] and progress_file(run).exists() == stays


def test_a_task_killed_before_it_told_of_a_step_tells_of_it_when_resumed(
    step: Step, capsys: pytest.CaptureFixture[str]
) -> None:
    with patch.object(inner_run, "_unfinished", lambda *_: None):
        for _ in range(2):
            assert inner_run.iterate(step.config, str(step.run.path))[0].step == 1
    assert capsys.readouterr().err.count("step 1/1") == 1


class TaskStandIn(dict):
    """A task of a Metaflow client: its artifacts by name."""

    def __init__(self, finished: bool = True, **artifacts: Any) -> None:
        super().__init__({name: SimpleNamespace(data=value) for name, value in artifacts.items()})
        self.finished = finished


class InnerStandIn(dict):
    """A run of a Metaflow client: its tasks by step; `id` is when it was created, too."""

    def __init__(self, number: int, finished: bool = False, **steps: list[TaskStandIn]) -> None:
        super().__init__(steps)
        self.id, self.created_at, self.finished = str(number), number, finished


def begun(step: int, sha256: str) -> list[TaskStandIn]:
    return [TaskStandIn(place={"step": step, "from_sha256": sha256})]


def test_the_newest_inner_run_with_a_fitting_place_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import metaflow

    config = config_in(tmp_path)
    run = RunFolder(tmp_path / "7")

    def unfinished(*inner: InnerStandIn, sha256: str | None = "a") -> str | None:
        flow = SimpleNamespace(runs=lambda *_: list(inner))
        monkeypatch.setattr(metaflow, "Flow", lambda _: flow)
        return inner_run._unfinished(config, run, 2, sha256)

    one = InnerStandIn(1, start=begun(2, "a"), rollouts=[TaskStandIn(lost=None)])
    early = InnerStandIn(2, start=[TaskStandIn(finished=False)])
    assert unfinished(one) == unfinished(early, one) == unfinished(InnerStandIn(3), one, early) == "1"
    assert unfinished(one, InnerStandIn(2, start=begun(2, "b"))) == "1"
    assert unfinished(one, InnerStandIn(2, finished=True, start=begun(2, "a"))) is None
    assert unfinished(InnerStandIn(1, start=begun(2, "a"), rollouts=[TaskStandIn(lost="timed out")])) is None
    # Its checkpoint was made, and is there: what is left is done; else it was removed, and the step begins anew.
    trained = InnerStandIn(1, start=begun(2, "a"), update=[TaskStandIn()])
    assert unfinished(trained, sha256=None) == "1" and unfinished(trained) is None
    # An inner run that never had a place would begin the step after the one that is done.
    assert unfinished(early, sha256=None) is None


def test_tasks_side_by_side_are_as_many_as_the_node_has_cores_and_gpus_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inner_run.os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr(inner_run, "gpu_count", lambda: 3)
    shards = ("rollouts.num_rollout_samples=32", "phases.shards=32", "phases.rollouts.cpu=2")
    assert inner_run.side_by_side(config_in(tmp_path, *shards)) == 8
    assert inner_run.side_by_side(config_in(tmp_path, *shards, "resources.gpu=8")) == 3
    assert inner_run.side_by_side(config_in(tmp_path, *shards, "phases.run_with=[kubernetes]")) == 32


def test_each_of_the_tasks_that_share_a_node_holds_another_gpu(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from alignment.node_gpus import hold_one; "
        "print(hold_one(Path(sys.argv[1]), 2), flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None and other.stdout.readline() == "0\n"
    assert hold_one(tmp_path, 2) == 1
    other.communicate()
    assert hold_one(tmp_path, 2) == 0


def test_a_source_that_was_found_is_not_looked_up_again(tmp_path: Path) -> None:
    gone = tmp_path / "runs" / "7"
    for found in (str(gone), "s3://bucket/runs/7"):
        assert parse_preset(json.dumps({"resume": {"from": found}}))["resume"]["from"] == found
    for name in ("7", str(gone.with_name("latest"))):
        with pytest.raises(Exception, match=r"resume.from .*: no run of that id"):
            parse_preset(json.dumps({"run": {"root": str(tmp_path)}, "resume": {"from": name}}))
    with pytest.raises(ConfigError, match="no run of that id"):  # the first step of a run that names it looks
        disaggregated.begin_step(config_in(tmp_path, f"resume.from={gone}"), None, "8")


def test_every_step_is_retried_and_the_preparation_asks_for_what_its_validation_does(tmp_path: Path) -> None:
    own = ("phases.validation.gpu=1", "phases.validation.memory=9", "policy.dtype=float32", "phases.update.retries=3")
    steps = phase_effects.decorators(config_in(tmp_path, *own, "phases.update.timeout_s=77").model_dump_json())
    assert all(steps[name, "retry"]["times"] for name in ("start", "sharding", "selection", "end"))
    assert {rule["minutes_between_retries"] for (_, name), rule in steps.items() if name == "retry"} == {0}
    asked = steps["preparation", "resources"]
    assert (asked["gpu"], asked["memory"]) == (1, 4000)
    assert steps["preparation", "retry"]["times"] == 3 and steps["preparation", "timeout"]["seconds"] == 77


def test_a_cluster_s_tasks_get_longer_to_end(tmp_path: Path) -> None:
    pods = (
        "kubernetes.image=trainer:1",
        "kubernetes.service_account=runs",
        f"kubernetes.volume_claims={{runs: {tmp_path}}}",
    )
    for elsewhere in (("phases.run_with=[kubernetes]",), ("slurm.enabled=true",), pods):
        assert inner_run.interrupt_grace_s(config_in(tmp_path, *elsewhere)) == ELSEWHERE_S
    assert inner_run.interrupt_grace_s(config_in(tmp_path)) == INTERRUPTED_S


def test_an_inner_run_that_does_not_end_in_order_is_ended_by_force(tmp_path: Path) -> None:
    deaf = tmp_path / "deaf.py"
    deaf.write_text(
        "import signal, sys, time\n"
        f"sys.path.insert(0, {str(ROOT / 'flows')!r})\n"
        "from sources import main\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "main(lambda: time.sleep(600))\n"
    )
    command = [sys.executable, str(deaf), "--watch-stdin", "0.5", "run"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    process.stdin.close()
    assert process.wait() == -signal.SIGKILL
