"""Tracking: real W&B runs, offline, read back from the files that `wandb sync` would upload."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignment.run_folder import RunFolder
from alignment.tracked_marks import Marks
from alignment.tracking import _has_credentials, tracked
from alignment.wandb_files import records
from alignment.wandb_writer import lost_marks

ROOT = Path(__file__).resolve().parent.parent
SECRET = "0123456789abcdef0123456789abcdef01234567"  # the form of an API key; not one

PROGRAM = """
import json, os, sys, time
from pathlib import Path
from alignment.over_optimisation import Alarm
from alignment.run_folder import RunFolder
from alignment.tracking import tracked
folder, mode, steps, end = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
run = RunFolder(folder / "run-7")
run.path.mkdir(exist_ok=True)
run.truncate_metrics(min(steps, default=100) - 1)
config = {"training": {"lr": 1e-5}}
own = {"mode": mode, "project": "p", "sample_prompts": 1, "tensorboard": mode == "disabled+", "config": config}
if mode == "disabled+":
    own["mode"] = "disabled"
with tracked(run, **own) as tracker:
    for step in steps:
        record = {"kind": "validation", "step": step, "reward_mean": 0.5, "judge_mean": None, "seconds": 2.0}
        run.append_metrics(record)
        tracker.log_validation(record)
        record = {
            "kind": "step", "step": step, "reward_mean": 0.25 * step, "selected_reward_mean": 1.0,
            "response_length_mean": 20.0, "truncated_fraction": 0.0, "duplicate_fraction": 0.0, "num_rollouts": 64,
            "num_selected": 8, "response_tokens": 160, "loss": None if step == 2 else 3.0, "grad_norm": 1.0, "lr": 1e-5,
            "kl": 0.25, "best_of_n": [0.5, 1.0, 1.25], "entropy": 2.5, "gpu_memory_bytes": None,
            "seconds": {"rollouts": 3.0, "scoring": 1.0, "update": 2.0}, "tokens_per_second": 400.0,
            "prompt_ids": ["a"], "judge_mean": 0.25, "selected_judge_mean": 0.5,
            "scoring_server": {"mean_batch": 8.0, "real_over_padded": None},
        }
        run.append_metrics(record)
        if end == "untold" and step == steps[-1]:
            os._exit(0)
        tracker.log_step(record)
    if end == "killed":
        os.kill(os.getpid(), 9)
    tracker.log_models({2: ("best",)})
    tracker.alert(Alarm(2, "the judge stays behind"))
    report = {"evaluation": {"win_rate": 0.75, "win_rate_ci95": [0.6, 0.9], "base": {"reward_mean": 0.0}}}
    report |= {"reward_model": {"name": "rm"}, "judge": {}, "seconds": {"total": 9.0}, "checkpoint": {"step": 2}}
    tracker.log_summary(report)
print("run ended; wandb imported:", "wandb" in sys.modules)
"""


def run_program(
    folder: Path, mode: str, steps: list[int], first: str = "", end: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """What is written for these RS steps; `end` is "killed", or "untold" for one that is recorded and not told of."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    env = clean | {"PYTHONPATH": str(ROOT), "NETRC": str(folder / "no-netrc"), "HOME": str(folder)} | environment
    command = [sys.executable, "-c", first + PROGRAM, str(folder), mode, json.dumps(steps), end]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=not end)


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """What each offline run of a run's folder holds, oldest first."""
    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        content: dict[str, Any] = {"history": [], "summary": {}, "metrics": {}, "alerts": [], "artifacts": []}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run" and record.run.run_id:
                content["id"], content["project"] = record.run.run_id, record.run.project
                content["config"] = {c.key: json.loads(c.value_json) for c in record.run.config.update}
            elif kind == "history":
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                content["history"].append({k: v for k, v in row.items() if not k.startswith("_")})
            elif kind == "summary":
                items = record.summary.update
                content["summary"] |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
            elif kind == "alert":
                content["alerts"].append((record.alert.title, record.alert.text))
            elif kind == "artifact":
                content["artifacts"].append(record.artifact)
            elif kind == "metric":
                content["metrics"][record.metric.glob_name or record.metric.name] = record.metric.step_metric
        runs.append(content)
    return runs


def told(folder: Path) -> list[tuple[str, int]]:
    """Kind and RS step of each row of a run's offline files."""
    rows = [row for found in read_runs(folder) for row in found["history"]]
    return [("step" if "train_optim/lr" in row else "validation", row["rs/step"]) for row in rows]


def both(*steps: int) -> list[tuple[str, int]]:
    return [(kind, step) for step in steps for kind in ("validation", "step")]


def test_two_processes_are_one_run_and_no_step_is_doubled(tmp_path: Path) -> None:
    first = run_program(tmp_path, "offline", [1, 2])
    second = run_program(tmp_path, "auto", [2, 3])  # replays step 2; auto finds no key
    assert first.stdout == second.stdout == "run ended; wandb imported: True\n"
    assert first.stderr == second.stderr == ""
    runs = read_runs(tmp_path / "run-7")
    assert [(r["id"], r["project"]) for r in runs] == [("run-7", "p")] * 2
    assert runs[0]["config"]["training"] == {"lr": 1e-5}
    assert told(tmp_path / "run-7") == both(1, 2, 3)
    rows = [row for r in runs for row in r["history"]]
    assert rows[0] == {"rs/step": 1, "val_rollouts/global_rewards": 0.5, "timers/validation_time": 2.0}
    assert rows[1] == {
        "rs/step": 1,
        "train_rollouts/global_rewards": 0.25,
        "train_rollouts/selected_rewards": 1.0,
        "train_rollouts/selection_lift": 0.75,
        "train_rollouts/best_of_n/1": 0.5,
        "train_rollouts/best_of_n/2": 1.0,
        "train_rollouts/best_of_n/3": 1.25,
        "train_rollouts/judge_mean": 0.25,
        "train_rollouts/selected_judge_mean": 0.5,
        "train_rollouts/entropy": 2.5,
        "train_rollouts/global_response_lengths_mean": 20.0,
        "train_rollouts/truncated_fraction": 0.0,
        "train_rollouts/duplicate_fraction": 0.0,
        "train_rollouts/num_rollouts": 64,
        "train_rollouts/num_selected": 8,
        "train_rollouts/tokens_per_second": 400.0,
        "train_optim/loss": 3.0,
        "train_optim/kl": 0.25,
        "train_optim/grad_norm": 1.0,
        "train_optim/lr": 1e-5,
        "train_optim/response_tokens": 160,
        "train_optim/tokens_per_second": 80.0,
        "timers/rollout_time": 3.0,
        "timers/scoring_time": 1.0,
        "timers/train_time": 2.0,
        "scoring_server/mean_batch": 8.0,
    }
    assert "train_optim/loss" not in rows[3]  # an empty selection has no loss
    for run in runs:
        families = ("train_rollouts/*", "train_optim/*", "val_rollouts/*", "timers/*", "scoring_server/*")
        assert {k: v for k, v in run["metrics"].items() if k in families} == dict.fromkeys(families, "rs/step")
    alarm = ("RS step 2: the judge does not follow the reward", "the judge stays behind")
    assert [r["alerts"] for r in runs] == [[alarm], []]  # told once
    summary = runs[1]["summary"]
    assert (summary["evaluation/win_rate"], summary["evaluation/win_rate_ci95/low"]) == (0.75, 0.6)
    assert (summary["evaluation/base/reward_mean"], summary["checkpoint/step"]) == (0.0, 2)


def test_what_a_killed_process_had_not_put_on_the_disk_is_told_again(tmp_path: Path) -> None:
    run_program(tmp_path, "offline", [1, 2], end="killed")
    assert told(tmp_path / "run-7") == []  # wandb writes every few seconds
    for _ in range(2):
        run_program(tmp_path, "offline", [3])
        assert told(tmp_path / "run-7") == both(1, 2, 3)


def test_marks_of_a_killed_process_are_doubted_until_another_has_told_the_same(tmp_path: Path) -> None:
    text = "step 0\nbegun offline-run-1\nmodel a 0\nended\nbegun run-2\nstep 2\nmodel b 0\nmodel c 0\n"
    (tmp_path / "logged.txt").write_text(f"{text}begun run-3\nmodel b 0\nended\n")
    marks = Marks(tmp_path / "logged.txt", lambda part: lost_marks(part, tmp_path))
    assert [(part.name, part.has_ended) for part in marks.parts] == [
        ("", True), ("offline-run-1", True), ("run-2", False), ("run-3", True)
    ]  # fmt: skip
    assert all(mark in marks for mark in ("step 0", "model a 0", "step 2", "model b 0"))
    assert "model c 0" not in marks


def test_what_was_recorded_and_not_told_is_told_by_the_next_process(tmp_path: Path) -> None:
    run_program(tmp_path, "offline", [1])
    run_program(tmp_path, "disabled", [2])  # one that was not tracked at all
    run_program(tmp_path, "offline", [3, 4], end="untold")
    run_program(tmp_path, "offline", [])
    assert told(tmp_path / "run-7") == both(1, 2, 3, 4)


def test_tensorboard_has_each_step_of_two_processes_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    first = run_program(tmp_path, "disabled+", [1, 2], end="killed")
    second = run_program(tmp_path, "disabled+", [2, 3])
    assert first.stderr == second.stderr == ""
    assert second.stdout == "run ended; wandb imported: False\n"
    files = sorted((tmp_path / "run-7" / "tensorboard").glob("events.*"))
    events = [event for file in files for event in EventFileLoader(str(file)).Load()]
    lr = [(e.step, v.tensor.float_val[0]) for e in events for v in e.summary.value if v.tag == "train_optim/lr"]
    assert lr == [(step, pytest.approx(1e-5)) for step in (1, 2, 3)]
    means = [e.step for e in events for v in e.summary.value if v.tag == "val_rollouts/global_rewards"]
    assert means == [1, 2, 3]


def test_disabled_imports_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    done = run_program(tmp_path, "disabled", [1], WANDB_API_KEY=SECRET)
    assert done.stdout == "run ended; wandb imported: False\n"
    assert done.stderr == ""
    assert [path.name for path in (tmp_path / "run-7").iterdir() if path.is_dir()] == []


def test_a_server_that_is_not_there_is_said_once_and_the_run_is_tracked_offline(tmp_path: Path) -> None:
    impatient = "import alignment.wandb_writer; alignment.wandb_writer.INIT_SECONDS = 2.0"
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": SECRET}
    done = run_program(tmp_path, "auto", [1, 2], first=impatient, **environment)
    assert done.stdout == "run ended; wandb imported: True\n"
    assert done.stderr.startswith("W&B: CommError: ") and done.stderr.endswith("; the run is tracked offline\n")
    assert done.stderr.count("\n") == 1 and SECRET not in done.stderr
    assert told(tmp_path / "run-7") == both(1, 2)


def test_offline_files_hold_no_secret_and_no_command_line(tmp_path: Path) -> None:
    run_program(tmp_path, "offline", [1], WANDB_API_KEY=SECRET, AWS_SECRET_ACCESS_KEY=SECRET[::-1])
    written = b"".join(path.read_bytes() for path in (tmp_path / "run-7").rglob("*") if path.is_file())
    assert b"val_rollouts/global_rewards" in written
    for secret in (SECRET, SECRET[::-1]):
        assert secret.encode() not in written
    offline = next((tmp_path / "run-7" / "wandb").glob("offline-run-*"))
    assert not list(offline.glob("files/*"))  # no packages
    assert b"log_validation" not in next(offline.glob("run-*.wandb")).read_bytes()  # no command line


def test_online_without_a_key_does_not_ask_for_one(tmp_path: Path) -> None:
    done = run_program(tmp_path, "online", [1])
    assert done.stderr == (
        "W&B: wandb.mode is online but no API key is configured (set WANDB_API_KEY or run `wandb login`): offline\n"
    )
    assert len(read_runs(tmp_path / "run-7")) == 1


def test_a_folder_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / "run-7").mkdir()
    (tmp_path / "run-7" / "wandb").write_text("in the way")
    (tmp_path / "run-7" / "tensorboard").write_text("in the way")
    for mode, writer in (("offline", "W&B"), ("disabled+", "TensorBoard")):
        done = run_program(tmp_path, mode, [1, 2])
        assert done.stdout.startswith("run ended")
        assert done.stderr.count("\n") == 1 and f"the run goes on without {writer}" in done.stderr


@pytest.mark.parametrize(
    ("environment", "netrc_text", "found"),
    [
        ({}, None, False),
        ({"WANDB_API_KEY": SECRET}, None, True),
        ({}, f"machine api.wandb.ai login user password {SECRET}\n", True),
        ({}, f"machine example.org login user password {SECRET}\n", False),
        ({"WANDB_BASE_URL": "https://example.org/x"}, f"machine example.org login user password {SECRET}\n", True),
        ({}, f"machine api.wandb.ai {SECRET}\n", False),
    ],
)
def test_where_a_key_is_looked_for(
    environment: dict[str, str],
    netrc_text: str | None,
    found: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc_text is not None:
        (tmp_path / "netrc").write_text(netrc_text)
    assert _has_credentials() is found
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err


def test_files_that_are_not_as_they_should_be_stop_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "logged.txt").write_bytes(b"\xff")
    own: dict[str, Any] = {"mode": "disabled", "project": "p", "sample_prompts": 0, "config": {}}
    with tracked(run, **own, tensorboard=True) as tracker:
        tracker.log_models()
    assert "UnicodeDecodeError" in capsys.readouterr().err
    (tmp_path / "tensorboard" / "logged.txt").unlink()
    run.append_metrics({"kind": "step", "step": 1, "reward_mean": 0.5})  # of no more than that
    run.append_metrics({"kind": "step", "step": 2, "reward_mean": "much"})
    run.scorers.write_text("{}")
    with tracked(run, **own, tensorboard=True) as tracker:
        tracker.log_models()
    assert capsys.readouterr().err == (
        "tracking: TypeError: must be real number, not str\ntracking: KeyError: 'reward_model'\n"
    )
    assert (tmp_path / "tensorboard" / "logged.txt").read_text() == "step 1\n"


def test_an_error_of_the_run_passes_through(tmp_path: Path) -> None:
    own: dict[str, Any] = {"mode": "disabled", "project": "p", "sample_prompts": 0, "tensorboard": False, "config": {}}
    with pytest.raises(KeyError), tracked(RunFolder(tmp_path), **own):
        raise KeyError("of the body")
