"""What a run reads when it goes on, damaged in between: each time a message that names the file and the remedy."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from alignment.config import Config, load_config
from alignment.errors import DataError
from alignment.preparation import load_prompts
from alignment.provenance import judge_digests, metrics_digest
from alignment.run_folder import RunFolder
from alignment.types import Decision, JudgeRef, RewardModelRef, ScoredRollout
from alignment.unchanged import check_scorers, check_unchanged, read_run_config
from flow_runs import SMOKE
from models.checkpoints import checkpoint_folder, seal, sha256_file, staging_folder

REWARD = RewardModelRef("reward_model", "1", "/repository", "d" * 64, 0.9)


def begun(root: Path) -> tuple[Config, RunFolder]:
    """A run of four RS steps with checkpoints after 2 and 4, made by hand."""
    config, run = load_config(SMOKE, [f"run.root={root}"]), RunFolder(root / "run")
    for folder in (run.prompts, run.path / "judge", run.checkpoints):
        folder.mkdir(parents=True)
    run.config.write_text(config.model_dump_json(indent=2))
    (run.prompts / "train.jsonl").write_text('{"id": "a"}\n')
    (run.path / "judge" / "judge.json").write_text("{}")
    run.scorers.write_text(json.dumps({"reward_model": asdict(REWARD), "judge": asdict(judge(run))}))
    for step in range(1, 5):
        run.append_metrics({"kind": "step", "step": step, "reward_mean": step / 8})
        if step % 2 == 0:
            save(config, run, step)
    return config, run


def judge(run: RunFolder) -> JudgeRef:
    return JudgeRef(name="judge", uri=str(run.path / "judge"), accuracy=0.8, details={})


def save(config: Config, run: RunFolder, step: int) -> None:
    staging = staging_folder(run.checkpoints, step)
    staging.mkdir()
    (staging / "model.safetensors").write_bytes(b"weights")
    details = {
        "ranks": 1, "zero_stage": 0, "run_id": "run", "parent": {}, "judge": {"files": judge_digests(run)},
        "data": {"train.jsonl": sha256_file(run.prompts / "train.jsonl")}, "metrics_sha256": metrics_digest(run, step),
    }  # fmt: skip
    seal(run.checkpoints, step, config=config.model_dump(mode="json"), details=details)


def check(config: Config, run: RunFolder) -> None:
    check_unchanged(config, run, checkpoint_folder(run.checkpoints, 4))


def flip(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_run_as_it_was_goes_on(tmp_path: Path) -> None:
    config, run = begun(tmp_path)
    check(config, run)
    check_scorers(run, REWARD, judge(run))
    assert read_run_config(run) == config
    run.append_metrics({"kind": "step", "step": 5, "reward_mean": 9.0})  # which the resume forgets
    check(config, run)


@pytest.mark.parametrize("name", ["prompts/train.jsonl", "judge/judge.json"])
@pytest.mark.parametrize("change", [lambda path: path.write_text("{} "), Path.unlink])
def test_prompts_and_judge_are_those_of_the_checkpoint(
    tmp_path: Path, name: str, change: Callable[[Path], object]
) -> None:
    config, run = begun(tmp_path)
    change(run.path / name)
    with pytest.raises(DataError, match=rf"/run/{name} is missing or damaged: .* put it back from a copy"):
        check(config, run)


def test_prompts_that_cannot_be_read(tmp_path: Path) -> None:
    _, run = begun(tmp_path)
    (run.prompts / "train.jsonl").write_text('{"id" "a"}\n')
    with pytest.raises(DataError, match=r"train.jsonl cannot be read .*: put it back from a copy"):
        load_prompts(run.path, "train")


def test_records_are_those_of_the_checkpoint_or_of_an_older_one(tmp_path: Path) -> None:
    config, run = begun(tmp_path)
    flip(run.metrics, "0.375", "0.875")  # of RS step 3: that of 2 is whole
    newest = checkpoint_folder(run.checkpoints, 4)
    with pytest.raises(DataError, match=rf"metrics.jsonl is not .* remove {newest} and resume to go on from there"):
        check(config, run)
    shutil.rmtree(newest)
    check_unchanged(config, run, checkpoint_folder(run.checkpoints, 2))
    flip(run.metrics, "0.125", "0.625")
    with pytest.raises(DataError, match="Put it back from a copy, or start a new run"):
        check_unchanged(config, run, checkpoint_folder(run.checkpoints, 2))


def test_the_config_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    _, run = begun(tmp_path)
    flip(run.config, '"lr": 0.001', '"lr": 0.009')
    with pytest.raises(DataError, match=r"config.json is not what .* training.lr \(0.001 there, 0.009 here\): put"):
        check(read_run_config(run), run)
    run.config.write_text(run.config.read_text()[:-5])
    with pytest.raises(DataError, match=r"config.json cannot be read .*: put it back from a copy"):
        read_run_config(run)


@pytest.mark.parametrize("text", ["", "[]", '{"reward_model": {}}'])
def test_scorers_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    _, run = begun(tmp_path)
    run.scorers.write_text(text)
    with pytest.raises(DataError, match=r"scorers.json cannot be read .*: put it back from a copy"):
        check_scorers(run, REWARD, judge(run))


def test_scorers_are_those_that_the_run_began_with(tmp_path: Path) -> None:
    _, run = begun(tmp_path)
    flip(run.scorers, "/repository", "/repositorx")
    with pytest.raises(DataError, match=r"scorers.json is damaged or was changed"):
        check_scorers(run, REWARD, judge(run))


def test_a_bit_of_the_stored_rollouts_is_not_read_as_another_score(tmp_path: Path) -> None:
    _, run = begun(tmp_path)
    rows = [ScoredRollout(prompt_id="a", rollout_index=0, response="yes", finish_reason="stop", reward=0.5)]
    path = run.write_rollouts(5, rows, [Decision("a", 0, True, "the best")])
    data = path.read_bytes()
    found = 0
    tried = range(0, len(data), 11)
    for at in tried:
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        try:
            assert run.read_rollouts(5)[0]["reward"] == 0.5
        except DataError as error:
            found += "remove it and resume" in str(error)
    assert found > len(tried) // 4
