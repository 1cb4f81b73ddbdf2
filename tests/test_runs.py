"""The list of runs: a state for each way in which a run may stand, told by its folder alone."""

import fcntl
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignment.errors import DataError, StoppedError
from alignment.run_folder import RunFolder, write_json
from alignment.run_state import NEXT_TASK_S, RunState, at_work, run_state
from alignment.runs import main, rows_of
from alignment.task import timed_task
from alignment.terminal import coloured
from flow_runs import ROOT
from test_compare import NOT_PROMOTED, begun, finished


def state(run: RunFolder) -> RunState:
    return run_state(run, None)


def test_a_task_at_work_is_seen_and_how_it_ended(tmp_path: Path) -> None:
    run = begun(tmp_path / "1")
    assert state(run) == RunState("unfinished")  # of an older version: nothing says who worked on it
    with timed_task(run, "start"):
        assert state(run) == RunState("running", "start")
        with at_work(run, "start"):  # the task again, which a scheduler thought lost
            assert state(run) == RunState("running", "start")
    assert state(run) == RunState("between tasks", "after start")
    assert run_state(run, None, now=time.time() + NEXT_TASK_S + 1) == RunState("interrupted", "after start")
    with pytest.raises(StoppedError), timed_task(run, "iterate"):
        raise StoppedError("its time was over")
    assert state(run) == RunState("interrupted", "in iterate")
    with pytest.raises(KeyboardInterrupt), timed_task(run, "evaluate"):
        raise KeyboardInterrupt
    assert state(run) == RunState("interrupted", "in evaluate")
    with pytest.raises(DataError), timed_task(run, "evaluate"):
        raise DataError("prompts.jsonl:3: not JSON\nand more")
    assert state(run) == RunState("failed", "in evaluate: DataError: prompts.jsonl:3: not JSON")


@pytest.mark.parametrize("said", [None, "", "[]", "{}"])
def test_a_task_that_has_not_said_its_name_is_at_work_all_the_same(said: str | None, tmp_path: Path) -> None:
    run = begun(tmp_path / "1")
    if said is not None:
        (run.path / ".task.json").write_text(said)  # of nobody: the file is written whole or not at all
    assert state(run) == RunState("unfinished")
    with open(run.path / ".task.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert state(run) == RunState("running")


def test_a_killed_task_is_interrupted(tmp_path: Path) -> None:
    run = begun(tmp_path / "1")
    code = "import sys; from pathlib import Path; from alignment.run_folder import RunFolder; "
    code += "from alignment.run_state import at_work; stack = at_work(RunFolder(Path(sys.argv[1])), 'iterate'); "
    code += "stack.__enter__(); print('at work', flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert child.stdout and child.stdout.readline() == "at work\n"
    assert state(run) == RunState("running", "iterate")
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert state(run) == RunState("interrupted", "in iterate")


def test_workers_that_outlive_their_task_are_seen(tmp_path: Path) -> None:
    run = begun(tmp_path / "1")
    with run.lock():
        assert state(run) == RunState("running", "saving")
    assert state(run) == RunState("unfinished")


def test_a_report_says_how_it_went(tmp_path: Path) -> None:
    run = begun(tmp_path / "1")
    promoted = NOT_PROMOTED | {"verdict": "promoted", "rolled_back": {"to_step": 3}}
    assert run_state(run, {}) == RunState("finished")
    assert run_state(run, {"promotion": NOT_PROMOTED}) == RunState("not promoted")
    assert str(run_state(run, {"promotion": promoted})) == "promoted: rolled back to RS step 3"
    with at_work(run, "evaluate"):  # somebody does it again
        assert run_state(run, {"promotion": promoted}) == RunState("running", "evaluate")


def test_runs_are_listed_newest_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun(tmp_path / "9", rewards=(0.5,))
    (run.checkpoints / "step-000001").mkdir()
    (run.checkpoints / "step-000001" / "DONE").touch()
    (run.checkpoints / "step-000002").mkdir()  # was being written
    finished(tmp_path / "10")
    begun(tmp_path / "11", rewards=())
    finished(tmp_path / "12").report_json.write_text("{")
    (tmp_path / "latest").symlink_to("12")
    (tmp_path / "13").symlink_to("12")  # a resume's id
    (tmp_path / "cache").mkdir()
    (run.path / ".task.json").write_text("{}")
    write_json(run.path / ".task.json", {"task": "iterate", "ended": None})
    (unreadable, *rest) = rows_of(tmp_path)
    assert unreadable[0] == "12" and unreadable[1].startswith("unreadable: ")
    assert rest == [
        ["11", "unfinished", "0/4", "", "", ""],
        ["10", "not promoted", "2/4", "0.500", "+0.500 (+0.250 to +0.750)", "step-000002"],
        ["9", "interrupted: in iterate", "1/4", "0.500", "", "step-000001"],
    ]
    assert main(["--root", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", lines[0]) == ["RUN", "STATE", "STEP", "REWARD", "GAIN", "CHECKPOINT"]
    assert re.split(r"\s{2,}", lines[3]) == rest[1]
    assert not any("\x1b" in line for line in lines)  # standard output is no terminal here


@pytest.mark.parametrize("report", ["[]", '{"evaluation": null}', '{"evaluation"'])
def test_a_damaged_report_leaves_the_other_runs_in_the_list(report: str, tmp_path: Path) -> None:
    finished(tmp_path / "1")
    finished(tmp_path / "2").report_json.write_text(report)
    (damaged, whole) = rows_of(tmp_path)
    assert damaged[1].startswith("unreadable: ") and "report.json" in damaged[1]
    assert whole[1] == "not promoted"


def test_no_runs_and_no_folder_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}: `python flows/rs_flow.py run` begins one\n"
    for root in (str(tmp_path / "none"), "s3://bucket/runs"):
        assert main(["--root", root]) == 1
        assert re.match(r"ConfigError: --root \(.*\) is no folder: ", capsys.readouterr().err)


class StandInForATerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert coloured("done", "green", StandInForATerminal()) == "\x1b[32mdone\x1b[0m"
    assert coloured("done", None, StandInForATerminal()) == "done"
    assert coloured("done", "green", io.StringIO()) == "done"
    monkeypatch.setenv("NO_COLOR", "")  # empty: as if it were not there
    assert coloured("done", "green", StandInForATerminal()) != "done"
    monkeypatch.setenv("NO_COLOR", "1")
    assert coloured("done", "green", StandInForATerminal()) == "done"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert coloured("done", "green", StandInForATerminal()) == "done"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_a_lock_that_may_not_be_opened_is_said(tmp_path: Path) -> None:
    run = begun(tmp_path / "1")
    with at_work(run, "start"):
        pass
    (run.path / ".task.lock").chmod(0o400)
    with pytest.raises(DataError, match="give yourself the right to open it for writing"):
        state(run)
