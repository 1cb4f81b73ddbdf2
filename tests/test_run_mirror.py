"""Copies of runs under s3:// when things go wrong at bad moments: two writers, readers beside them, lost answers.

On moto; a node is a workspace of its own. What tasks see of all this is in tests/test_workspace.py.
"""

import json
import shutil
import threading
from pathlib import Path

import pytest

import alignment.run_mirror as run_mirror
from alignment.config import load_config
from alignment.errors import AlignmentError, StorageConflict, StorageError
from alignment.s3_folders import pull_folder, push_files
from alignment.s3_objects import delete_objects, read_bytes, write_bytes
from alignment.workspace import opened
from flow_runs import SMOKE
from models.checkpoints import finished, last_checkpoint, seal, staging_folder
from s3_servers import new_bucket, use
from test_workspace import begin, checkpoint, there, wait_until


@pytest.fixture
def bucket(moto_server, monkeypatch):
    use(moto_server, monkeypatch)
    return new_bucket()


@pytest.fixture
def nodes(tmp_path, bucket):
    sets = [f"run.root={bucket}/runs", "loop.keep_last=1", "loop.keep_best=1", "loop.stop_grace_s=0.5"]
    return [load_config(SMOKE, [*sets, f"run.workspace={tmp_path / node}"]) for node in ("one", "two", "three")]


def weights(run):
    return {folder.name: (folder / "model.safetensors").read_text() for folder in finished(run.checkpoints)}


def in_thread(act):
    """`act` in a thread: returns it and the list that will hold its error."""
    errors = []

    def body():
        try:
            act()
        except AlignmentError as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, errors


def test_a_writer_that_lost_the_run_seals_nothing_any_more(nodes, monkeypatch):
    one, two, three = nodes
    path = begin(one)
    with opened(one, path) as run:
        checkpoint(run, 1)
    sending, goes_on, original = threading.Event(), threading.Event(), run_mirror.send_checkpoint

    def slow(uri, folder, **options):
        if "one" in folder.parts:
            sending.set()
            goes_on.wait(30)
        return original(uri, folder, **options)

    monkeypatch.setattr(run_mirror, "send_checkpoint", slow)

    def lost():
        with opened(one, path) as run:
            checkpoint(run, 2, "lost")

    thread, errors = in_thread(lost)
    sending.wait(30)
    with opened(two, path) as run:
        goes_on.set()
        thread.join()
        assert isinstance(errors[0], StorageConflict)
        assert "checkpoints/step-000002/DONE" not in there(path)
        checkpoint(run, 2, "two")
    with opened(three, path, writes=False) as run:
        assert weights(run) == {"step-000002": "two 2"}


def test_what_the_old_writer_sealed_before_the_takeover_is_seen_by_the_new_one(nodes, monkeypatch):
    one, two, _ = nodes
    path = begin(one)
    with opened(one, path) as run:
        checkpoint(run, 1)
    original = run_mirror.RunMirror._take_over

    def late(mirror, pointer):
        monkeypatch.setattr(run_mirror.RunMirror, "_take_over", original)
        mirror_of_one = run.remote._mirror
        checkpoint(run, 2, "one")
        mirror_of_one.push(early=True)
        original(mirror, pointer)

    monkeypatch.setattr(run_mirror.RunMirror, "_take_over", late)
    with opened(two, path) as other:
        assert weights(other)["step-000002"] == "one 2"
        checkpoint(other, 3, "two")
    assert "checkpoints/step-000003/DONE" in there(path)


def test_a_takeover_that_was_killed_in_between_is_done_again(nodes, monkeypatch):
    one, two, _ = nodes
    path = begin(one)
    with opened(two, path) as run:
        checkpoint(run, 1, "old")
    with opened(one, path) as run:
        checkpoint(run, 2, "one")
    with monkeypatch.context() as patch:
        patch.setattr(run_mirror.RunMirror, "_become", lambda self, names: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), opened(two, path):
            pass
    with opened(two, path) as run:
        assert weights(run) == {"step-000002": "one 2"}


def test_the_newest_copy_sends_its_own_where_another_was_sealed_under_its_name(nodes):
    one, *_ = nodes
    path = begin(one)
    with opened(one, path) as run:
        checkpoint(run, 1)
    write_bytes(f"{path}/checkpoints/step-000001/DONE", b"late")
    with opened(one, path):
        pass
    assert read_bytes(f"{path}/checkpoints/step-000001/DONE")[0] == (run.checkpoints / "step-000001/DONE").read_bytes()


def test_a_checkpoint_is_never_there_without_its_records(nodes, monkeypatch):
    one, *_ = nodes
    path = begin(one)
    original = run_mirror.RunMirror._send_files
    with opened(one, path) as run:
        mirror = run.remote._mirror

        def sealed_meanwhile(self, *, early):
            original(self, early=early)
            if not finished(run.checkpoints):
                checkpoint(run, 1)

        monkeypatch.setattr(run_mirror.RunMirror, "_send_files", sealed_meanwhile)
        mirror.push(early=True)
        assert "checkpoints/step-000001/DONE" not in there(path)
        mirror.push(early=True)
        assert "checkpoints/step-000001/DONE" in there(path)
        assert json.loads(read_bytes(f"{path}/metrics.jsonl")[0])["step"] == 1


def test_the_manifest_for_the_lineage_comes_with_its_checkpoint(nodes):
    one, *_ = nodes
    path = begin(one)
    with opened(one, path) as run:
        staging = staging_folder(run.checkpoints, 1)
        staging.mkdir(parents=True)
        (staging / "model.safetensors").write_text("w")
        details = {"ranks": 1, "zero_stage": 0, "run_id": "7", "parent": {}, "rollouts": {}}
        seal(run.checkpoints, 1, config={}, details=details)
        run.remote._mirror.push(early=True)
        manifest = (run.checkpoints / "step-000001" / "manifest.json").read_bytes()
        assert read_bytes(f"{path}/lineage/step-000001.json")[0] == manifest


def test_files_that_workers_move_meanwhile_disturb_no_sending(nodes):
    one, *_ = nodes
    path = begin(one)
    ended = threading.Event()
    with opened(one, path) as run:
        checkpoint(run, 1)

        def churn():
            while not ended.is_set():
                folder = run.checkpoints / ".step-000009.partial"
                (folder / "optimizer").mkdir(parents=True)
                (folder / "optimizer" / "a").write_text("x")
                shutil.rmtree(folder)

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for _ in range(300):
                assert "metrics.jsonl" in run.remote._mirror._files_here(early=True)
        finally:
            ended.set()
            thread.join()
        push_files(run.path, path, ["gone", "metrics.jsonl"])
    assert "gone" not in there(path) and "metrics.jsonl" in there(path)


def test_a_sending_that_fails_is_tried_again(nodes, monkeypatch, capsys):
    one, *_ = nodes
    path, original, failed = begin(one), run_mirror.push_files, threading.Event()

    def fails_once(*arguments):
        if failed.is_set():
            return original(*arguments)
        failed.set()
        raise StorageError("the server failed")

    with opened(one, path) as run:
        monkeypatch.setattr(run_mirror, "push_files", fails_once)
        checkpoint(run, 1)
        run.send()
        failed.wait(20)
        run.send()
        wait_until(lambda: read_bytes(f"{path}/checkpoints/step-000001/DONE"))
    assert "not all could be sent (StorageError: the server failed); tried again" in capsys.readouterr().err


def test_a_second_writer_of_a_node_is_refused_and_sends_nothing(nodes):
    one, *_ = nodes
    path = begin(one)
    with opened(one, path) as run:
        checkpoint(run, 1)
        with pytest.raises(AlignmentError, match=r"is being written by process \d+ on"), opened(one, path):
            raise AssertionError("not reached")
        assert "checkpoints/step-000001/DONE" not in there(path)
        with opened(one, path, writes=False) as reader:  # reads the newest copy as it is
            assert list(weights(reader)) == ["step-000001"]


def test_a_checkpoint_that_is_removed_while_it_is_fetched_is_no_damaged_one(nodes, monkeypatch):
    one, two, _ = nodes
    path = begin(one)
    with opened(one, path) as run:
        checkpoint(run, 1)
    original = run_mirror.fetch_checkpoint

    def removed_meanwhile(uri, place, on_note):
        monkeypatch.setattr(run_mirror, "fetch_checkpoint", original)
        with pytest.MonkeyPatch.context() as patch:
            pulled = pull_folder

            def pull(source, folder, **options):
                delete_objects([f"{source}/DONE"])
                return pulled(source, folder, **options)

            patch.setattr("alignment.run_checkpoints.pull_folder", pull)
            return original(uri, place, on_note)

    monkeypatch.setattr(run_mirror, "fetch_checkpoint", removed_meanwhile)
    with opened(two, path, writes=False) as run:
        assert last_checkpoint(run.checkpoints) is None and not list(run.checkpoints.glob("*"))


def test_a_reader_keeps_what_it_reads_and_others_of_its_node_wait(nodes):
    one, two, _ = nodes
    path, notes, seen = begin(one), [], []

    def second():
        with opened(two, path, writes=False, on_note=notes.append) as run:
            seen.append(weights(run))

    with opened(one, path) as run:
        checkpoint(run, 1)
    with opened(two, path, writes=False) as first:
        with opened(two, path, writes=False) as same:  # nothing has changed: side by side
            assert weights(same) == weights(first)
        thread, _ = in_thread(second)
        thread.join()
        assert seen == [{"step-000001": "w 1"}] and notes == []
        with opened(one, path) as run:
            checkpoint(run, 2)
        thread, _ = in_thread(second)
        wait_until(lambda: any("waiting until that ends" in note for note in notes))
        assert weights(first) == {"step-000001": "w 1"}
        with pytest.raises(AlignmentError, match="this command works in it already"), opened(two, path, writes=False):
            raise AssertionError("not reached")
    thread.join()
    assert seen[1] == {"step-000002": "w 2"}


def test_two_that_open_a_copy_first_agree_on_its_name(nodes):
    one, *_ = nodes
    path = begin(one)

    def read():
        with opened(one, path, writes=False):
            pass

    threads = [in_thread(read) for _ in range(4)]
    for thread, errors in threads:
        thread.join()
        assert errors == []


def test_metrics_that_are_replaced_while_they_are_fetched_are_fetched_as_they_are_then(nodes, monkeypatch):
    one, two, _ = nodes
    path = begin(one)
    with opened(one, path) as run:
        checkpoint(run, 1)
    from alignment import s3_folders

    original = s3_folders._those

    def replaced(names, true):
        if "metrics.jsonl" in names:
            write_bytes(f"{path}/metrics.jsonl", b'{"kind": "step", "step": 5}\n')
        return original(names, true)

    monkeypatch.setattr(s3_folders, "_those", replaced)
    with opened(two, path, writes=False) as run:
        assert [r["step"] for r in run.read_metrics()] == [5]


def test_a_removed_checkpoint_leaves_no_unfinished_upload(nodes, tmp_path: Path):
    from alignment.run_checkpoints import remove_checkpoint
    from alignment.s3 import object_location
    from alignment.s3_connection import s3_client
    from alignment.s3_unfinished import unfinished_uploads

    one, *_ = nodes
    path = begin(one)
    at = object_location(f"{path}/checkpoints/step-000001/model.safetensors")
    s3_client().create_multipart_upload(Bucket=at.bucket, Key=at.key)
    assert len(unfinished_uploads(at)) == 1
    remove_checkpoint(path, "step-000001")
    assert unfinished_uploads(at) == []


def test_an_object_with_an_empty_part_in_its_name_is_named(bucket, tmp_path):
    from alignment.s3_connection import s3_client

    s3_client().put_object(Bucket=bucket.removeprefix("s3://"), Key="odd//x", Body=b"1")
    with pytest.raises(StorageError, match=r"odd//x: its name has an empty part \(//\)"):
        pull_folder(f"{bucket}/odd", tmp_path / "odd")
