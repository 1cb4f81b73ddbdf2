"""Tracking: real W&B runs, offline, read back from the files that `wandb sync` would upload."""

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECRET = "0123456789abcdef0123456789abcdef01234567"  # the form of an API key; not one

PROGRAM = """
import json, sys
from pathlib import Path
from alignment.over_optimisation import Alarm
from alignment.tracking import tracked
folder, mode, steps = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
with tracked("run-7", mode=mode, project="p", config={"training": {"lr": 1e-5}}, folder=folder) as tracker:
    for step in steps:
        record = {"kind": "validation", "step": step, "reward_mean": 0.5, "judge_mean": None, "seconds": 2.0}
        tracker.log_validation(record)
        tracker.log_step({
            "kind": "step", "step": step, "reward_mean": 0.1 * step, "selected_reward_mean": 1.0,
            "response_length_mean": 20.0, "truncated_fraction": 0.0, "duplicate_fraction": 0.0, "num_rollouts": 64,
            "num_selected": 8, "response_tokens": 160, "loss": None if step == 2 else 3.0, "grad_norm": 1.0, "lr": 1e-5,
            "kl": 0.25,
            "seconds": {"rollouts": 3.0, "scoring": 1.0, "update": 2.0}, "tokens_per_second": 400.0,
            "prompt_ids": ["a"], "judge_mean": 0.25, "selected_judge_mean": 0.5,
            "scoring_server": {"mean_batch": 8.0, "real_over_padded": None},
        })
    tracker.alert(Alarm(2, "the judge stays behind"))
    report = {"evaluation": {"win_rate": 0.75, "win_rate_ci95": [0.6, 0.9], "base": {"reward_mean": 0.0}}}
    report |= {"reward_model": {"name": "rm"}, "judge": {}, "seconds": {"total": 9.0}, "checkpoint": {"step": 2}}
    tracker.log_summary(report)
print("run ended; wandb imported:", "wandb" in sys.modules)
"""


def run_program(
    folder: Path, mode: str, steps: list[int], first: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    env = clean | {"PYTHONPATH": str(ROOT), "NETRC": str(folder / "no-netrc"), "HOME": str(folder)} | environment
    command = [sys.executable, "-c", first + PROGRAM, str(folder), mode, json.dumps(steps)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)


def wandb_records(path: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb file: a LevelDB log of 32 KiB blocks behind a header of 7 bytes.

    A record is cut into chunks (crc32, length, type; type 1 is whole, 2 first, 3 middle, 4 last), and no
    chunk crosses the end of a block.
    """
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data.startswith(b":W&B")
    position, record = 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        checksum, length, kind = struct.unpack_from("<IHB", data, position) if left_in_block >= 7 else (0, 0, 0)
        if kind == 0:  # padding
            position += left_in_block
            continue
        chunk = data[position + 7 : position + 7 + length]
        assert checksum == zlib.crc32(bytes([kind]) + chunk)
        position, record = position + 7 + length, record + chunk
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """What each offline run of `folder` holds, oldest first."""
    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        content: dict[str, Any] = {"history": [], "summary": {}, "metrics": {}, "alerts": []}
        for record in wandb_records(path):
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
            elif kind == "metric":
                content["metrics"][record.metric.glob_name or record.metric.name] = record.metric.step_metric
        runs.append(content)
    return runs


def test_two_processes_are_one_run_and_no_step_is_doubled(tmp_path: Path) -> None:
    first = run_program(tmp_path, "offline", [1, 2])
    second = run_program(tmp_path, "auto", [2, 3])  # replays step 2; auto finds no key
    assert first.stdout == second.stdout == "run ended; wandb imported: True\n"
    assert first.stderr == second.stderr == ""
    runs = read_runs(tmp_path)
    assert [(r["id"], r["project"]) for r in runs] == [("run-7", "p")] * 2
    assert runs[0]["config"]["training"] == {"lr": 1e-5}
    rows = [row for r in runs for row in r["history"]]
    steps = [row["rs/step"] for row in rows if "train_optim/lr" in row]
    validations = [row["rs/step"] for row in rows if "val_rollouts/global_rewards" in row]
    assert steps == validations == [1, 2, 3]
    assert rows[0] == {"rs/step": 1, "val_rollouts/global_rewards": 0.5, "timers/validation_time": 2.0}
    assert rows[1] == {
        "rs/step": 1,
        "train_rollouts/global_rewards": 0.1,
        "train_rollouts/selected_rewards": 1.0,
        "train_rollouts/judge_mean": 0.25,
        "train_rollouts/selected_judge_mean": 0.5,
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


def test_disabled_imports_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    done = run_program(tmp_path, "disabled", [1], WANDB_API_KEY=SECRET)
    assert done.stdout == "run ended; wandb imported: False\n"
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_not_there_is_said_once_and_the_run_is_tracked_offline(tmp_path: Path) -> None:
    impatient = "import alignment.tracking; alignment.tracking.INIT_SECONDS = 2.0"
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": SECRET}
    done = run_program(tmp_path, "auto", [1, 2], first=impatient, **environment)
    assert done.stdout == "run ended; wandb imported: True\n"
    assert done.stderr.startswith("W&B: CommError: ") and done.stderr.endswith("; the run is tracked offline\n")
    assert done.stderr.count("\n") == 1 and SECRET not in done.stderr
    assert [row["rs/step"] for r in read_runs(tmp_path) for row in r["history"]] == [1, 1, 2, 2]


def test_online_without_a_key_does_not_ask_for_one(tmp_path: Path) -> None:
    done = run_program(tmp_path, "online", [1])
    assert done.stderr == (
        "W&B: wandb.mode is online but no API key is configured (set WANDB_API_KEY or run `wandb login`): offline\n"
    )
    assert len(read_runs(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("in the way")
    done = run_program(tmp_path, "offline", [1, 2])
    assert done.stdout.startswith("run ended")
    assert done.stderr.count("\n") == 1 and "the run goes on without W&B" in done.stderr


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
    from alignment.tracking import has_credentials

    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc_text is not None:
        (tmp_path / "netrc").write_text(netrc_text)
    assert has_credentials() is found
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err


def test_an_error_of_the_run_passes_through(tmp_path: Path) -> None:
    from alignment.tracking import tracked

    with pytest.raises(KeyError), tracked("1", mode="disabled", project="p", config={}, folder=tmp_path):
        raise KeyError("of the body")
