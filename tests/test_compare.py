"""Runs side by side: numbers by hand, runs that are unfinished or of an older version, the page as a parser sees it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignment.compare import main
from alignment.config import load_config
from alignment.run_folder import RunFolder, write_json
from alignment.runs import rows_of
from flow_runs import SMOKE
from test_report import Page

EVALUATION: dict[str, Any] = {
    "prompts": 4,
    "seconds": 7.0,
    "base": {"response_length_mean": 20.0},
    "aligned": {"response_length_mean": 22.5, "kl_to_base": 1.25, "kl_to_base_ci95": [1.0, 1.5]},
    **{"reward_gain": 0.5, "reward_gain_ci95": [0.25, 0.75], "judge_gain": -0.125, "judge_gain_ci95": [-0.5, 0.25]},
    **{"win_rate": 0.625, "win_rate_ci95": [0.5, 0.75], "judge_win_rate": 0.5, "judge_win_rate_ci95": [0.25, 0.75]},
}
SECONDS = {"total": 90.0, "setup": 12.0, "rollouts": 30.0, "scoring": 5.0, "update": 20.0, "validation": 8.0}
JUDGED = {"name": "judge_gain", "passed": False}
NOT_PROMOTED = {
    "verdict": "not promoted",
    "rules": [{"name": "reward_gain", "passed": True}, JUDGED],
    "rolled_back": None,
}


def begun(path: Path, *overrides: str, rewards: tuple[float, ...] = (0.25, 0.5)) -> RunFolder:
    """A run of as many RS steps as `rewards`, with a validation of the base, that nobody works on."""
    run = RunFolder(path)
    run.checkpoints.mkdir(parents=True)
    run.config.write_text(load_config(SMOKE, overrides).model_dump_json())
    run.append_metrics({"kind": "validation", "step": 0, "reward_mean": 0.125, "judge_mean": 0.0, "seconds": 4.0})
    for step, reward in enumerate(rewards, start=1):
        seconds = {"rollouts": 3.0, "scoring": 1.0, "update": 2.0}
        run.append_metrics({"kind": "step", "step": step, "reward_mean": reward, "seconds": seconds})
    return run


def finished(
    path: Path, *overrides: str, scores: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0), **changes: Any
) -> RunFolder:
    """A run evaluated on four prompts, with these rewards of the aligned policy and its judge's scores thrice them."""
    run = begun(path, *overrides)
    rows = [{"prompt_id": f"p{i}", "aligned_reward": s, "aligned_judge": 3 * s} for i, s in enumerate(scores)]
    write_json(run.path / "evaluation.json", rows)
    report = {
        "run_id": path.name,
        "evaluation": EVALUATION,
        "promotion": NOT_PROMOTED,
        "seconds": SECONDS | {"overhead": 8.0},
        "reward_model": {"name": "reward_model", "digest": "ab12"},
        "checkpoint": {"uri": f"{path}/checkpoints/step-000002", "sha256": "", "step": 2},
    }
    write_json(run.report_json, report | changes)
    return run


def compared(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    assert main([str(argument) for argument in arguments]) == status
    shown = capsys.readouterr()
    return shown.err if status else shown.out


def rows(text: str) -> dict[str, list[str]]:
    """Cells by the first one; the columns are two spaces or more apart."""
    cells = [re.split(r"\s{2,}", line.rstrip()) for line in text.splitlines()]
    return {first: rest for first, *rest in cells}


def test_two_runs_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "one")
    finished(tmp_path / "two", "training.lr=0.5", "seed=7", scores=(2.0, 3.0, 4.0, 5.0))
    text = compared(capsys, "one", "two", "--root", tmp_path)
    found = rows(text)
    assert found["run"] == ["one", "two"]
    assert found["reward gain"] == ["+0.500 (+0.250 to +0.750)"] * 2
    assert found["judge gain"] == ["-0.125 (-0.500 to +0.250)"] * 2
    assert found["win rate by reward"] == ["62.5% (50.0% to 75.0%)"] * 2
    assert found["win rate by judge"] == ["50.0% (25.0% to 75.0%)"] * 2
    assert found["KL to base, nats"] == ["1.25 (1.00 to 1.50)"] * 2
    assert found["response length, tokens"] == ["22.5"] * 2
    assert found["base's length"] == ["20.0"] * 2
    assert found["state"] == ["not promoted"] * 2
    assert found["promotion"] == ["not promoted: judge_gain"] * 2
    assert found["checkpoint"] == ["step-000002"] * 2
    assert found["RS steps"] == ["2/4"] * 2
    # Each prompt's reward is higher by 1, its judge's score by 3: intervals of no width.
    assert found["reward − one"] == ["–", "+1.000 (+1.000 to +1.000)"]
    assert found["judge − one"] == ["–", "+3.000 (+3.000 to +3.000)"]
    assert found["total"] == ["1 min 30 s"] * 2
    assert found["rollouts"] == ["30 s"] * 2
    assert found["evaluation"] == ["7 s"] * 2
    # Of the configs only what differs.
    lr = json.dumps(load_config(SMOKE).training.lr)
    at = text.index("config")
    assert rows(text[at : text.index("gains and")]) == {
        "config": ["one", "two"],
        "seed": [str(load_config(SMOKE).seed), "7"],
        "training.lr": [lr, "0.5"],
        "": [],
    }


def test_a_run_that_is_not_finished_has_its_steps_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path / "1")
    begun(tmp_path / "2", rewards=(0.5,))
    text = compared(capsys, "1", "2", "--root", tmp_path)
    found = rows(text)
    assert found["state"] == ["not promoted", "unfinished"]
    assert found["RS steps"] == ["2/4", "1/4"]
    assert found["reward gain"] == ["+0.500 (+0.250 to +0.750)", "–"]
    assert found["rollouts"] == ["30 s", "3 s so far"]
    assert found["validation"] == ["8 s", "4 s so far"]
    assert found["setup"] == ["12 s", "–"]
    assert "2 is not finished (unfinished): it has no evaluation" in text
    assert "reward − 1" not in text
    assert "config: the same" in text


def test_what_is_no_number_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = [None, None]  # how an interval is written that is none
    gains = {"reward_gain_ci95": nothing, "win_rate_ci95": nothing, "aligned": {"kl_to_base_ci95": nothing}}
    finished(tmp_path / "1")
    run = finished(tmp_path / "2", evaluation=EVALUATION | gains, promotion={"verdict": "promoted"})
    run.metrics.write_text(run.metrics.read_text().replace("0.25", "NaN").replace("0.5", '"much"'))
    found = rows(compared(capsys, "1", "2", "--root", tmp_path, "--html", tmp_path / "page.html"))
    assert found["reward gain"][1] == "+0.500" and found["win rate by reward"][1] == "62.5%"
    assert found["KL to base, nats"][1] == "–" and found["promotion"][1] == "promoted"
    assert "nan" not in (tmp_path / "page.html").read_text()
    assert rows_of(tmp_path)[0] == ["2", "promoted", "2/4", "", "", "step-000002"]


def test_a_report_of_an_older_version_has_dashes_and_is_said_to_be_old(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {k: v for k, v in EVALUATION.items() if k not in ("judge_win_rate", "judge_win_rate_ci95", "win_rate_ci95")}
    finished(tmp_path / "1")
    finished(tmp_path / "2", evaluation=old | {"aligned": {"kl_to_base": 2.0}}, promotion=None, seconds={"total": 60.0})
    (tmp_path / "2" / "evaluation.json").unlink()
    config = json.loads((tmp_path / "2" / "config.json").read_text())
    del config["promotion"], config["seed"]  # keys that came later
    (tmp_path / "2" / "config.json").write_text(json.dumps(config))
    text = compared(capsys, "1", "2", "--root", tmp_path)
    found = rows(text)
    assert found["win rate by reward"] == ["62.5% (50.0% to 75.0%)", "62.5%"]
    assert found["win rate by judge"] == ["50.0% (25.0% to 75.0%)", "–"]
    assert found["KL to base, nats"] == ["1.25 (1.00 to 1.50)", "2.00"]
    assert found["response length, tokens"] == ["22.5", "–"]
    assert found["state"] == ["not promoted", "finished"]
    assert found["overhead"] == ["8 s", "–"]
    assert found["seed"] == [str(load_config(SMOKE).seed), "–"]
    lacks = "win_rate_ci95, judge_win_rate_ci95, aligned.kl_to_base_ci95"
    assert f"2 was written by an older version: its report lacks {lacks}" in text
    assert "no paired difference: the runs were not all evaluated on the same prompts" in text


def test_runs_of_other_prompts_or_reward_models_are_not_paired_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path / "1")
    finished(tmp_path / "2", scores=(1.0, 2.0, 3.0), reward_model={"name": "reward_model", "digest": "cd34"})
    text = compared(capsys, "1", "2", "--root", tmp_path)
    assert "reward − 1" not in text
    assert "no paired difference" in text
    assert "the runs were scored by different reward models: their rewards are on different scales" in text


def test_the_page_says_the_same_and_draws_both_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "one")
    begun(tmp_path / "<b>two", "training.lr=0.5", rewards=(0.5, 1.0))
    file = tmp_path / "page.html"
    assert compared(capsys, "one", "<b>two", "--root", tmp_path, "--html", file).splitlines()[-1] == str(file)
    page = Page(file.read_text())
    assert page.open == []
    for said in ("+0.500 (+0.250 to +0.750)", "training.lr", "<b>two is not finished", "1 min 30 s"):
        assert said in page.text
    assert "one, step 2: 0.5" in page.text
    assert "<b>two, step 2: 1" in page.text
    assert len([tag for tag, _ in page.elements if tag == "polyline"]) == 2
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "img", "b"}
    assert not any(value and "//" in value for _, attributes in page.elements for value in attributes.values())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["1", "2"], r"ConfigError: RUN \(2\): no run of that id in "),
        (["1", "latest"], r"ConfigError: RUN \(.*/1\) is named twice"),
        (["1", "model"], "DataError: .*/model holds no run: its config.json is missing, or something else's"),
        (["1", "broken"], "DataError: .*/broken/report.json is not JSON"),
    ],
)
def test_what_cannot_be_compared_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], said: str
) -> None:
    finished(tmp_path / "1")
    (tmp_path / "latest").symlink_to("1")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    finished(tmp_path / "broken").report_json.write_text("{")
    assert re.match(said, compared(capsys, *names, "--root", tmp_path, status=1))
