"""Strategies side by side: what each arm is, the paired report by hand, and what is done again."""

import json
from pathlib import Path
from typing import Any

import pytest

from alignment import strategies
from alignment.config import Config, load_config
from alignment.errors import ConfigError, DataError, WorkerError
from alignment.run_folder import RunFolder, write_json
from alignment.strategies import arms_of, control_of, main, run_arm, slug
from alignment.strategy_report import compare, measured, table
from flow_runs import ROOT, SMOKE, Place

CONFIG = load_config(SMOKE)  # 4 prompts a step, the best of each


def selections(theirs: Config, *names: str) -> list[dict[str, Any]]:
    arms = arms_of(theirs, "/runs/7", names)
    return [{k: v for k, v in arm.config.selection.model_dump().items() if v is not None} for arm in arms]


def test_a_strategy_keeps_as_many_as_the_run_did_unless_it_says_how_many() -> None:
    two = load_config(SMOKE, ["selection.top_n_rollouts=2", "selection.truncated=refuse"])
    same = {"top_n_rollouts": 2, "truncated": "refuse"}
    assert selections(two, "top_per_prompt", "top_k_overall", "random_per_prompt", "random_k_overall top_k=3") == [
        {"strategy": "top_per_prompt", **same},
        {"strategy": "top_k_overall", **same, "top_k": 8},
        {"strategy": "random_per_prompt", **same},
        {"strategy": "random_k_overall", **same, "top_k": 3},
    ]
    overall = load_config(SMOKE, ["selection.strategy=top_k_overall", "selection.top_k=12"])
    assert selections(overall, "top_k_overall", "top_per_prompt", "top_per_prompt top_n_rollouts=1 min_reward=0") == [
        {"strategy": "top_k_overall", "top_n_rollouts": 3, "truncated": "allow", "top_k": 12},
        {"strategy": "top_per_prompt", "top_n_rollouts": 3, "truncated": "allow"},
        {"strategy": "top_per_prompt", "top_n_rollouts": 1, "truncated": "allow", "min_reward": 0.0},
    ]


def test_an_arm_is_the_run_s_config_on_its_rollouts() -> None:
    theirs = load_config(SMOKE, ["resume.from=/runs/6", "training.lr=0.5"])
    (arm,) = arms_of(theirs, "/runs/7", ["top_per_prompt"], ["training.lr=0.25", "loop.max_steps=2"])
    same = load_config(SMOKE, ["reuse.rollouts=/runs/7", "training.lr=0.25", "loop.max_steps=2"])
    assert arm.config == same


@pytest.mark.parametrize(
    ("names", "control", "said"),
    [
        (["best"], None, r"selection.strategy \('best'\): input should be"),
        (["top_per_prompt top_n=2"], None, r"selection.top_n \(2\): unknown key"),
        (["top_per_prompt top_n_rollouts=9"], None, r"selection.top_n_rollouts \(9\) must be <="),
        (["top_per_prompt", "top_per_prompt"], None, "names 'top_per_prompt' twice"),
        (["top_per_prompt"], None, "no random strategy to compare with: add random_per_prompt, or --control"),
        (["random_per_prompt"], "top_per_prompt", r"--control \(top_per_prompt\) is none of --strategies"),
    ],
)
def test_what_is_no_strategy_is_said(names: list[str], control: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        control_of(arms_of(CONFIG, "/runs/7", names), control)


def finished(path: Path, config: Config, reward: list[float], judge: list[float], kept: list[tuple[int, float]]) -> str:
    """The files of a finished run with these scores of the aligned policy; `kept` is by RS step."""
    run = RunFolder(path)
    path.mkdir(parents=True)
    run.config.write_text(config.model_dump_json())
    for step, (count, mean) in enumerate(kept, start=1):
        record = {"num_selected": count, "selected_reward_mean": mean, "optimizer_steps": 1}
        run.append_metrics({"kind": "step", "step": step, **record})
    rows = [
        {"prompt_id": f"p{i}", "aligned_reward": r, "aligned_judge": j}
        for i, (r, j) in enumerate(zip(reward, judge, strict=True))
    ]
    write_json(path / "evaluation.json", rows)
    gains = {f"{label}_gain": 0.5 for label in ("reward", "judge")}
    gains |= {f"{label}_gain_ci95": [0.25, 0.75] for label in ("reward", "judge")}  # type: ignore[misc]
    write_json(run.report_json, {"evaluation": {"aligned": {"kl_to_base": 1.5}, **gains}})
    return str(path)


def test_differences_are_paired_by_prompt(tmp_path: Path) -> None:
    best = finished(tmp_path / "1", CONFIG, [1.0, 2.0, 4.0], [0.0, 0.0, 0.0], [(4, 2.0), (2, 5.0)])
    control = finished(tmp_path / "2", CONFIG, [0.0, 2.0, 1.0], [1.0, -1.0, 0.0], [(4, 0.0), (4, 1.0)])
    rows = json.loads((tmp_path / "2/evaluation.json").read_text())
    write_json(tmp_path / "2/evaluation.json", rows[::-1])  # the order of the file says nothing
    found = [measured(name, run, RunFolder(Path(run))) for name, run in (("best", best), ("random", control))]
    result = compare(found, "random")
    assert (result["control"], result["prompts"]) == ("random", 3)
    first, other = result["strategies"]
    assert (first["kept"], first["kept_reward"], first["updates"], first["steps"]) == (6, 3.0, 2, 2)
    assert first["reward_difference"] == pytest.approx((1 + 0 + 3) / 3)
    assert first["reward_win_rate"] == pytest.approx(2.5 / 3) and first["judge_win_rate"] == 0.5
    assert first["judge_difference"] == 0.0
    low, high = first["reward_difference_ci95"]
    assert 0.0 <= low < 4 / 3 < high <= 3.0
    assert "reward_difference" not in other and other["kept_reward"] == 0.5
    lines = table({"rollouts": "/runs/7", **result}).splitlines()
    assert lines[0] == "strategies on the rollouts of /runs/7"
    assert lines[1].split("  ")[0] == "strategy" and "reward − control" in lines[1]
    assert lines[2].startswith("best      6     3.000   2        1.50  +0.500 (+0.250 to +0.750)")
    assert lines[2].endswith("+0.000 (-1.000 to +1.000)") and f"+1.333 ({low:+.3f} to {high:+.3f})" in lines[2]
    assert lines[3].split()[-2:] == ["control", "control"]


def test_runs_that_were_not_evaluated_alike_are_not_compared(tmp_path: Path) -> None:
    runs = [finished(tmp_path / name, CONFIG, [0.0] * n, [0.0] * n, []) for name, n in (("1", 2), ("2", 3))]
    found = [measured(run, run, RunFolder(Path(run))) for run in runs]
    assert found[0].kept_reward is None
    with pytest.raises(DataError, match="were evaluated on different prompts"):
        compare(found, runs[1])
    (tmp_path / "1/report.json").unlink()
    with pytest.raises(DataError, match=r"1 lacks .*report\.json: resume that run"):
        measured("1", runs[0], RunFolder(tmp_path / "1"))


def test_the_command_takes_finished_runs_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = load_config(SMOKE, [f"run.root={tmp_path}", "wandb.mode=disabled"])
    source = finished(tmp_path / "7", theirs, [1.0, 1.0], [1.0, 1.0], [(4, 1.0)])
    names = ["top_per_prompt", "random_per_prompt"]
    for i, arm in enumerate(arms_of(theirs, source, names)):
        finished(tmp_path / str(i), arm.config, [2.0 - i, 3.0], [0.0, i], [(4, 1.0)])
        id_file = tmp_path / "strategies" / "7" / f"{slug(arm.name)}.run_id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        id_file.write_text(str(i))
    monkeypatch.setattr(strategies, "run_flow", None)  # nothing is run
    assert main(["7", "--root", str(tmp_path), "--strategies", *names]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "strategies/7/comparison.json").read_text())
    assert [s["name"] for s in result["strategies"]] == [*names, "RUN itself, on its own rollouts"]
    assert [s.get("reward_difference") for s in result["strategies"]] == [0.5, None, -1.0]
    assert (tmp_path / "strategies/7/comparison.txt").read_text() in out + "\n"
    assert main(["8", "--root", str(tmp_path)]) == 1
    assert "ConfigError: RUN (8): no run of that id" in capsys.readouterr().err


def test_a_run_that_was_interrupted_is_resumed_and_another_config_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = load_config(SMOKE, [f"run.root={tmp_path}"])
    (arm,) = arms_of(theirs, "/runs/7", ["top_k_overall top_k=3"])
    asked: list[Any] = []

    def run_flow(words: list[str], status: int = 0) -> int:
        asked.append(words)
        if "--run-id-file" in words:
            Path(words[words.index("--run-id-file") + 1]).write_text("1")
        return status

    monkeypatch.setattr(strategies, "run_flow", run_flow)
    out = tmp_path / "out"
    assert run_arm(arm, out) == str(tmp_path / "1")
    assert (out / "top_k_overall_top_k=3.run_id").read_text() == "1"
    assert run_arm(arm, out) == str(tmp_path / "1") and "run" in asked[1]  # it had not even laid out its folder
    (tmp_path / "1").mkdir()
    (tmp_path / "1/config.json").write_text(arm.config.model_dump_json())
    assert run_arm(arm, out) == str(tmp_path / "1")
    assert asked[2] == ["resume", "--origin-run-id", "1"]
    (other,) = arms_of(theirs, "/runs/8", ["top_k_overall top_k=3"])
    run_arm(other, out)
    assert "run" in asked[3]
    monkeypatch.setattr(strategies, "run_flow", lambda words: 1)
    with pytest.raises(WorkerError, match=r"top_k_overall top_k=3: its run failed.*the same command goes on"):
        run_arm(arm, out)


def test_rs_flow_takes_the_words_that_it_is_given() -> None:
    assert strategies.run_flow(["show"]) == 0


@pytest.mark.long
def test_the_command_on_a_real_run(tmp_path: Path) -> None:
    """Three whole runs of the smoke preset."""
    import sys

    place = Place(tmp_path)
    source = place.run(loop__max_steps=2).folder
    words = [sys.executable, "-m", "alignment.strategies", source.name, "--root", str(place.root)]
    words += ["--strategies", "top_per_prompt top_n_rollouts=2", "random_per_prompt"]
    done = place.execute(words, PYTHONPATH=str(ROOT))
    assert done.status == 0, done.output
    result = json.loads((place.root / "strategies" / source.name / "comparison.json").read_text())
    assert [(s["kept"], s["steps"]) for s in result["strategies"]] == [(16, 2), (8, 2), (8, 2)]
    for entry in result["strategies"][:2]:
        report = json.loads((Path(entry["run"]) / "report.json").read_text())
        assert report["rollouts"].startswith(f"RS steps 1 to 2: those of {source}")
    again = place.execute(words, PYTHONPATH=str(ROOT))
    assert again.status == 0 and "begins" not in again.output, again.output
