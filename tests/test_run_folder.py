"""The run folder: real files, real kills, a real full disk."""

import errno
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from alignment.atomic_files import disk_errors, write_text
from alignment.config import Config
from alignment.continuation import first_id
from alignment.errors import AlignmentError, ConfigError, DataError, DiskError
from alignment.run_folder import RunFolder, create, write_json
from alignment.types import Decision, ScoredRollout

ROOT = Path(__file__).resolve().parent.parent


def scored_pair() -> tuple[list[ScoredRollout], list[Decision]]:
    scored = [
        ScoredRollout(
            prompt_id="p",
            rollout_index=i,
            prompt="Say é",
            response=f"naïve {i}\n\x00",
            finish_reason="length" if i else "stop",
            response_ids=(1, 2, 3),
            log_probs=(-0.5, -0.25, -1.0) if i else (),
            reward=0.1 + i,
            reward_model="rm",
            reward_model_version="4",
        )
        for i in range(2)
    ]
    return scored, [Decision("p", 0, False, "reward 0.1 ranks 2 of 2"), Decision("p", 1, True, "ranks 1 of 2")]


def in_python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """A process of its own that runs `code` in the source tree."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes, **options)


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_run_whose_config_was_written_before_there_were_some_keys_is_the_same_run(tmp_path: Path) -> None:
    now = Config(seed=1).model_dump_json()
    then = {name: value for name, value in json.loads(now).items() if name not in ("slurm", "kubernetes")}
    run = create(tmp_path / "runs", "7", json.dumps(then))
    assert create(tmp_path / "runs", "7", now) == run
    assert json.loads(run.config.read_text()) == json.loads(now)
    with pytest.raises(DataError, match="another run's files"):
        create(tmp_path / "runs", "7", Config(seed=2).model_dump_json())


def test_create_makes_the_folder_and_points_latest_at_it(tmp_path: Path) -> None:
    first = create(tmp_path / "runs", "7", '{"seed": 0}')
    assert json.loads(first.config.read_text()) == {"seed": 0}
    assert (tmp_path / "runs/latest").resolve() == first.path.resolve()
    assert os.readlink(tmp_path / "runs/latest") == "7"  # relative: the root may be moved
    second = create(tmp_path / "runs", "8", "{}")
    assert (tmp_path / "runs/latest").resolve() == second.path.resolve()
    first.append_metrics({"kind": "task", "name": "start", "seconds": 1.0})
    assert create(tmp_path / "runs", "7", '{"seed": 0}').read_metrics()  # a retried start loses nothing
    with pytest.raises(DataError, match="another run's files"):
        create(tmp_path / "runs", "7", '{"seed": 1}')
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["7", "8", "latest"]
    assert files_in(first.path) == {"config.json", "metrics.jsonl", ".metrics.lock"}


@pytest.mark.parametrize("run_id", ["", "latest", "..", "a/b", ".hidden", "a b"])
def test_a_run_id_must_name_a_folder(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(DataError, match=re.escape(repr(run_id))):
        create(tmp_path, run_id, "{}")


def test_an_object_store_is_refused_rather_than_made_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"run.root \(gs://bucket/runs\) must be a local folder or s3://bucket/prefix"
    ):
        create("gs://bucket/runs", "1", "{}")
    assert not list(tmp_path.iterdir())


def test_rollouts_have_the_columns_of_the_contract_and_the_log_probability(tmp_path: Path) -> None:
    folder = create(tmp_path, "1", "{}")
    path = folder.write_rollouts(3, *scored_pair())
    assert path == tmp_path / "1/rollouts/step-000003.parquet"
    schema = parquet.read_schema(path)
    assert folder.read_rollouts(3)[0]["log_prob"] is None  # of an answer that the policy did not draw
    first_half = ["step", "prompt_id", "prompt", "rollout_index", "response", "finish_reason"]
    second_half = ["num_tokens", "response_ids", "log_prob", "reward", "reward_model", "reward_model_version"]
    assert schema.names == first_half + second_half + ["selected", "reason"]
    assert [str(schema.field(n).type) for n in ("step", "reward", "selected")] == ["int64", "double", "bool"]
    assert folder.read_rollouts(3)[1] == {
        "step": 3,
        "prompt_id": "p",
        "prompt": "Say é",
        "rollout_index": 1,
        "response": "naïve 1\n\x00",
        "finish_reason": "length",
        "num_tokens": 3,
        "response_ids": [1, 2, 3],
        "log_prob": -1.75,
        "reward": 1.1,
        "reward_model": "rm",
        "reward_model_version": "4",
        "selected": True,
        "reason": "ranks 1 of 2",
    }
    folder.write_rollouts(3, [], [])
    assert folder.read_rollouts(3) == []
    assert os.listdir(folder.rollouts) == ["step-000003.parquet"]


def test_decisions_of_other_rollouts_are_refused(tmp_path: Path) -> None:
    scored, decisions = scored_pair()
    for wrong in (decisions[:1], decisions[::-1]):
        with pytest.raises(DataError, match="RS step 3"):
            RunFolder(tmp_path).write_rollouts(3, scored, wrong)


def test_rollouts_that_are_missing_damaged_or_not_text(tmp_path: Path) -> None:
    folder = create(tmp_path, "1", "{}")
    with pytest.raises(DataError, match=r"step-000009.parquet is not there"):
        folder.read_rollouts(9)
    folder.rollouts.mkdir()
    folder.rollouts_file(9).write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match=r"cannot read .*step-000009.parquet"):
        folder.read_rollouts(9)
    lone = ScoredRollout(prompt_id="p", rollout_index=0, response="\ud800", finish_reason="stop", reward=0.0)
    with pytest.raises(DataError, match="UTF-8"):
        folder.write_rollouts(1, [lone], [Decision("p", 0, True, "")])


def test_metrics_are_one_json_object_a_line_without_nan(tmp_path: Path) -> None:
    folder = create(tmp_path, "1", "{}")
    assert folder.read_metrics() == []
    folder.append_metrics({"kind": "step", "step": 1, "loss": math.nan, "seconds": {"update": math.inf}, "text": "é\n"})
    folder.append_metrics({"kind": "task", "name": "end", "ids": ("a",)})
    lines = folder.metrics.read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == folder.read_metrics()
    assert folder.read_metrics() == [
        {"kind": "step", "step": 1, "loss": None, "seconds": {"update": None}, "text": "é\n"},
        {"kind": "task", "name": "end", "ids": ["a"]},
    ]


def test_a_torn_last_line_is_cut_off_by_the_next_writer(tmp_path: Path) -> None:
    folder = create(tmp_path, "1", "{}")
    folder.append_metrics({"kind": "step", "step": 1})
    whole = folder.metrics.read_bytes()
    line = b'{"kind": "step", "step": 2, "text": "{}"}\n'
    for cut in range(len(line)):
        folder.metrics.write_bytes(whole + line[:cut])
        steps = [1, 2] if cut == len(line) - 1 else [1]  # without its newline alone the record is whole
        assert [r["step"] for r in folder.read_metrics()] == steps
        folder.append_metrics({"kind": "step", "step": 3})
        assert [json.loads(x)["step"] for x in folder.metrics.read_text().splitlines()] == [*steps, 3]
        folder.metrics.write_bytes(whole + line[:cut])
        folder.truncate_metrics(5)
        assert [json.loads(x)["step"] for x in folder.metrics.read_text().splitlines()] == steps


def test_truncate_forgets_later_steps_and_validations_only(tmp_path: Path) -> None:
    folder = create(tmp_path, "1", "{}")
    folder.truncate_metrics(0)  # before anything was written
    task = {"kind": "task", "name": "iterate", "seconds": 1.5, "step": 9}
    records = [
        {"kind": "validation", "step": 0, "reward_mean": None},
        {"kind": "step", "step": 1},
        {"kind": "step", "step": 2},
        task,
    ]
    for record in [*records, {"kind": "validation", "step": 2}]:
        folder.append_metrics(record)
    for _ in range(2):
        folder.truncate_metrics(1)
        assert folder.read_metrics() == [records[0], records[1], task]
    assert folder.validations() == {}


def test_validations_are_those_that_have_a_reward(tmp_path: Path) -> None:
    folder = create(tmp_path, "1", "{}")
    for step, reward in ((0, 0.5), (2, 1.5), (4, None)):
        folder.append_metrics({"kind": "validation", "step": step, "reward_mean": reward})
    assert folder.validations() == {0: 0.5, 2: 1.5}


@pytest.mark.parametrize("bad", ["{torn", "[1]"])
def test_a_bad_line_in_the_middle_is_named(tmp_path: Path, bad: str) -> None:
    folder = create(tmp_path, "1", "{}")
    folder.metrics.write_text(f'{{"kind": "task"}}\n{bad}\n{{"kind": "task"}}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2: "):
        folder.read_metrics()


def test_appending_and_rewriting_at_once_loses_no_record(tmp_path: Path) -> None:
    folder = create(tmp_path, "1", "{}")

    def append(name: str) -> None:
        for i in range(40):
            folder.append_metrics({"kind": "task", "name": name, "seconds": i})

    threads = [threading.Thread(target=append, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        folder.truncate_metrics(0)
    assert len(folder.read_metrics()) == 80


def test_a_writer_killed_at_any_moment_leaves_whole_files(tmp_path: Path) -> None:
    folder = create(tmp_path, "1", "{}")
    code = (
        "import sys; from pathlib import Path; from alignment.run_folder import RunFolder, write_json\n"
        "folder = RunFolder(Path(sys.argv[1])); n = 0\n"
        "while True:\n"
        "    write_json(folder.report_json, {'n': n, 'pad': 'x' * 200_000})\n"
        "    folder.append_metrics({'kind': 'step', 'step': n, 'pad': 'x' * 20_000}); n += 1\n"
        "    print(n, flush=True)\n"
    )
    for round_number in range(3):
        writer = in_python(code, folder.path)
        assert writer.stdout is not None
        for _ in range(3 + round_number):
            written = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert json.loads(folder.report_json.read_text())["n"] >= written - 1
        folder.truncate_metrics(written - 1)
        assert [r["step"] for r in folder.read_metrics()] == list(range(written))
        folder.truncate_metrics(-1)


def test_a_full_disk_is_named_with_its_remedy(tmp_path: Path) -> None:
    folder = create(tmp_path, "1", "{}")
    folder.metrics.symlink_to("/dev/full")
    with pytest.raises(DiskError, match=r"cannot write .*metrics.jsonl: No space left on device; free some space"):
        folder.append_metrics({"kind": "task"})


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiskError, match=r"report.json: File too large; check run.root"):
            write_json(path, {"a": "x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["report.json"]


def test_other_disk_errors_have_remedies(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="Permission denied; give yourself"), disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    (tmp_path / "runs").write_text("")
    with pytest.raises(DiskError, match=r"cannot write .*runs/1: Not a directory; check run.root"):
        create(tmp_path / "runs", "1", "{}")
    (tmp_path / "other/latest").mkdir(parents=True)
    with pytest.raises(DiskError, match="latest"):
        create(tmp_path / "other", "1", "{}")


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "report.html", "ä" * 1000)
    write_text(tmp_path / "report.html", "é")
    assert (tmp_path / "report.html").read_text() == "é"
    assert os.stat(tmp_path / "report.html").st_mode & 0o077 == 0o066 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_first_step_that_is_resumed_keeps_the_first_id(tmp_path: Path) -> None:
    assert first_id(tmp_path, "1", None) == "1"
    create(tmp_path, "1", "{}")
    for _ in range(2):  # a task may be tried again
        assert first_id(tmp_path, "2", "1") == "1"
    assert first_id(tmp_path, "3", "2") == "1"  # the resume of a resume
    assert (tmp_path / "3").resolve() == tmp_path / "1"
    assert first_id(tmp_path, "5", "4") == "5"  # whose folder is somewhere else


def test_two_processes_never_hold_one_run(tmp_path: Path) -> None:
    folder = create(tmp_path, "1", "{}")
    code = (
        "import sys; from pathlib import Path; from alignment.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lock():\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    holder = in_python(code, folder.path)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(AlignmentError, match=f"is being written by process {holder.pid} on "), folder.lock():
        pytest.fail("held twice")
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with folder.lock(), pytest.raises(AlignmentError, match=f"process {os.getpid()} on "), folder.lock():
        pytest.fail("held twice")
    with folder.lock():
        pass
