"""Runs under s3:// as tasks see them: copies on several nodes, one writer, nothing lost but what was not sent.

All on moto and on Ceph; a node is a workspace of its own.
"""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

from alignment.config import load_config
from alignment.continuation import find_source, first_id
from alignment.errors import ConfigError, DataError, StorageConflict
from alignment.run_folder import RunFolder
from alignment.s3_objects import list_objects, read_bytes, write_bytes
from alignment.workspace import create, find_run, local_root, opened
from flow_runs import SMOKE, wait_for
from models.checkpoints import finished, seal, staging_folder, verify


@pytest.fixture
def nodes(tmp_path, bucket):
    """Configs of two nodes, of a root in a bucket of its own."""
    sets = [f"run.root={bucket}/team/runs", "loop.keep_last=1", "loop.keep_best=1"]
    return [load_config(SMOKE, [*sets, f"run.workspace={tmp_path / node}"]) for node in ("one", "two")]


def begin(config, run_id="7"):
    plain = config.model_copy(update={"run": config.run.model_copy(update={"workspace": None})})
    return create(config.run, config.run.root, run_id, plain.model_dump_json())


def checkpoint(run, step, weights="w"):
    """A small checkpoint, sealed like any other, with a lineage entry and a record."""
    staging = staging_folder(run.checkpoints, step)
    (staging / "optimizer").mkdir(parents=True)
    (staging / "model.safetensors").write_text(f"{weights} {step}")
    (staging / "optimizer" / "rank-00000.safetensors").write_text("moments")
    details = {"ranks": 1, "zero_stage": 0, "run_id": run.path.name, "parent": {}}
    seal(run.checkpoints, step, config={}, details=details)
    run.append_metrics({"kind": "step", "step": step})


def there(uri):
    """Names of the objects below a URI."""
    return sorted(stored.uri.removeprefix(f"{uri}/") for stored in list_objects(uri + "/"))


def test_what_one_node_leaves_another_goes_on_with(nodes):
    one, two = nodes
    path = begin(one)
    assert path == f"{one.run.root}/7"
    with opened(one, path) as run:
        assert run.path == Path(one.run.workspace) / path.removeprefix("s3://")
        assert (run.uri, run.uri_of(run.path / "judge")) == (path, f"{path}/judge")
        checkpoint(run, 1)
    with opened(two, path) as run:
        assert [r["step"] for r in run.read_metrics()] == [1]
        assert [folder.name for folder in finished(run.checkpoints)] == ["step-000001"]
        assert verify(finished(run.checkpoints)[0]).step == 1
        checkpoint(run, 2)
    with opened(one, path) as run:
        assert [r["step"] for r in run.read_metrics()] == [1, 2]
    assert [name for name in there(f"{path}/checkpoints") if name.endswith("DONE")] == ["step-000002/DONE"]  # keep_last


def test_what_was_not_sent_stays_in_the_copy_that_wrote_last(nodes):
    one, two = nodes
    path = begin(one)
    with opened(one, path) as run:
        checkpoint(run, 1)
    checkpoint(RunFolder(run.path), 2)  # workers whose owner was killed saved their last step
    with opened(one, path) as run:
        assert [folder.name for folder in finished(run.checkpoints)] == ["step-000001", "step-000002"]
    with opened(two, path) as run:
        assert [folder.name for folder in finished(run.checkpoints)] == ["step-000002"]


def test_what_a_lost_node_had_not_sent_is_dropped_once_another_went_on(nodes):
    one, two = nodes
    path = begin(one)
    with opened(one, path) as run:
        checkpoint(run, 1)
    checkpoint(RunFolder(run.path), 2, "lost")
    (run.path / "report.json").write_text("lost")
    with opened(two, path) as run:
        checkpoint(run, 2)
    with opened(one, path) as run:
        assert (run.checkpoints / "step-000002" / "model.safetensors").read_text() == "w 2"
        assert not run.report_json.exists()


def test_a_checkpoint_and_its_record_are_sent_while_the_task_goes_on(nodes):
    one, _ = nodes
    path = begin(one)
    with opened(one, path) as run:
        checkpoint(run, 1)
        (run.path / "logs").mkdir()
        (run.path / "logs" / "triton.log").write_text("grows")
        run.send()
        wait_until(lambda: read_bytes(f"{path}/checkpoints/step-000001/DONE"))
        assert (json.loads(read_bytes(f"{path}/metrics.jsonl")[0]))["step"] == 1
        assert "logs/triton.log" not in there(path)
    assert "logs/triton.log" in there(path)


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt, signal.SIGTERM])
def test_what_a_task_leaves_is_sent_however_it_ends(nodes, end):
    one, two = nodes
    path, before = begin(one), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt if end is signal.SIGTERM else end), opened(one, path) as run:
        checkpoint(run, 1)
        if end is signal.SIGTERM:
            os.kill(os.getpid(), end)
        raise end
    assert signal.getsignal(signal.SIGTERM) is before
    with opened(two, path, writes=False) as run:
        assert len(finished(run.checkpoints)) == 1


def test_of_two_writers_the_earlier_one_ends_with_an_error_that_names_the_run(nodes):
    one, two = nodes
    path = begin(one)
    said = rf"{path} has been taken over by process \d+ on \S+: this task ends"
    with pytest.raises(StorageConflict, match=said), opened(one, path) as run:
        checkpoint(run, 1, "early")
        with opened(two, path) as other:
            checkpoint(other, 1)
    with opened(two, path) as run:
        assert (run.checkpoints / "step-000001" / "model.safetensors").read_text() == "w 1"


def test_what_a_writer_that_had_lost_the_run_sent_is_replaced_by_the_one_that_has_it(nodes, capsys):
    one, _ = nodes
    path = begin(one)
    with opened(one, path) as run:
        checkpoint(run, 1)
        write_bytes(f"{path}/checkpoints/step-000001/DONE", b"another manifest's sum")
        write_bytes(f"{path}/checkpoints/step-000001/theirs", b"x")
    assert read_bytes(f"{path}/checkpoints/step-000001/DONE")[0] == (run.checkpoints / "step-000001/DONE").read_bytes()
    assert "checkpoints/step-000001/theirs" not in there(path)
    assert "sent by a process that had lost the run: it is replaced" in capsys.readouterr().err


def test_the_same_checkpoint_twice_is_no_conflict(nodes):
    one, _ = nodes
    path = begin(one)
    with opened(one, path) as run:
        checkpoint(run, 1)
        run.send()
        wait_until(lambda: read_bytes(f"{path}/checkpoints/step-000001/DONE"))
        run.remote._mirror.sealed.clear()  # as after a kill between DONE and what was noted of it
    assert verify(run.checkpoints / "step-000001").step == 1


def test_pruned_checkpoints_go_in_s3_too_and_the_best_one_stays_without_being_fetched(nodes):
    one, two = nodes
    path = begin(one)
    with opened(one, path) as run:
        for step, reward in ((1, 0.1), (2, 0.9), (3, 0.2)):
            checkpoint(run, step)
            run.append_metrics({"kind": "validation", "step": step, "reward_mean": reward})
    kept = ["step-000002/DONE", "step-000003/DONE"]
    assert [name for name in there(f"{path}/checkpoints") if name.endswith("DONE")] == kept
    with opened(two, path) as run:
        assert [folder.name for folder in finished(run.checkpoints)] == ["step-000003"]
        checkpoint(run, 4)
    assert [n for n in there(f"{path}/checkpoints") if n.endswith("DONE")] == ["step-000002/DONE", "step-000004/DONE"]
    with opened(two, path, all_kept=True) as run:
        assert "step-000002" in [folder.name for folder in finished(run.checkpoints)]
    assert not [name for name in there(f"{path}/checkpoints") if name.startswith(("step-000001", "step-000003"))]


def test_a_damaged_copy_is_healed_by_removing_it(nodes):
    one, _ = nodes
    path = begin(one)
    with opened(one, path) as run:
        checkpoint(run, 1)
    for file in (run.checkpoints / "step-000001").rglob("*.safetensors"):
        file.unlink()
    shutil.rmtree(run.checkpoints / "step-000001")
    with opened(one, path) as run:
        assert verify(run.checkpoints / "step-000001").step == 1


def test_a_reader_sends_nothing_and_takes_nothing_over(nodes):
    one, two = nodes
    path = begin(one)
    with opened(one, path) as run:
        checkpoint(run, 1)
        run.send()
        wait_until(lambda: read_bytes(f"{path}/checkpoints/step-000001/DONE"))
        with opened(two, path, writes=False) as reader:
            assert reader.uri == path
            (reader.path / "mine").write_text("only here")
            reader.send()
        checkpoint(run, 2)
    assert "mine" not in there(path)


def test_a_conflict_of_the_sending_reaches_the_task(nodes, monkeypatch):
    one, _ = nodes
    path = begin(one)

    def refused(*_arguments, **_options):
        raise StorageConflict("no")

    with pytest.raises(StorageConflict, match="no"), opened(one, path) as run:
        monkeypatch.setattr("alignment.run_mirror.push_files", refused)
        checkpoint(run, 1)
        for _ in range(200):
            run.send()
            threading.Event().wait(0.05)


def test_who_wants_no_checkpoint_gets_the_other_files(nodes):
    one, two = nodes
    path = begin(one)
    with opened(one, path) as run:
        checkpoint(run, 1)
    with opened(two, path, writes=False, checkpoints=False) as run:
        assert [r["step"] for r in run.read_metrics()] == [1] and finished(run.checkpoints) == []


def test_begin_again_latest_and_the_names_of_runs(nodes, tmp_path):
    one, _ = nodes
    root, path = one.run.root, begin(one)
    assert begin(one) == path
    with pytest.raises(DataError, match=rf"{path} holds another run's files: set run.root to another prefix"):
        create(one.run, root, "7", '{"run": {}}')
    assert (
        find_run(root, "latest") == find_run("", f"{root}/latest") == find_run("", path) == find_run(root, "7") == path
    )
    begin(one, "8")
    assert find_run(root, "latest") == f"{root}/8"
    assert (find_run(root, "9"), find_run(str(tmp_path), "7")) == (None, None)
    resumed = one.model_copy(update={"resume": one.resume.model_copy(update={"from_": "7"})})
    assert find_source(resumed) == path
    with pytest.raises(ConfigError, match=rf"resume.from \(no\): no run of that id in {root}"):
        find_source(one.model_copy(update={"resume": one.resume.model_copy(update={"from_": "no"})}))
    assert first_id(root, "9", None) == "9"
    assert first_id(root, "9", "7") == first_id(root, "10", "9") == "7"  # the resume of a resume
    assert first_id(root, "12", "11") == "12"  # whose folder is somewhere else


def test_a_local_root_is_its_own_workspace(tmp_path):
    config = load_config(SMOKE, [f"run.root={tmp_path}", f"run.workspace={tmp_path / 'elsewhere'}"])
    assert local_root(config.run) == tmp_path
    with opened(config, create(config.run, str(tmp_path), "7", "{}")) as run:
        assert (run.path, run.uri, run.remote) == (tmp_path / "7", str(tmp_path / "7"), None)
        run.send()


def wait_until(condition, timeout_s=20.0):
    wait_for(condition, timeout_s, "the sending")
