"""Checkpoints: written whole, verified by sums, pruned to the best and the newest; nothing hostile is followed."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.errors import CheckpointError, DiskError
from models import checkpoints as cp

ORIGIN = {"ranks": 1, "zero_stage": 0, "run_id": "7", "parent": {}}


def write(root: Path, step: int) -> Path:
    """A sealed checkpoint of one tiny tensor."""
    staging = cp.staging_folder(root, step)
    staging.mkdir(parents=True)
    save_file({"w": torch.full((3,), float(step))}, staging / "model.safetensors")
    cp.write_optimizer_state(staging, 0, {"0.exp_avg": torch.arange(6.0).view(2, 3).t()})
    cp.seal(root, step, config={"seed": 0}, details=ORIGIN)
    return cp.checkpoint_folder(root, step)


def reseal(folder: Path, manifest: dict) -> None:
    """A manifest as a forger would leave it: changed, with a DONE that matches."""
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    (folder / "DONE").write_text(hashlib.sha256(text.encode()).hexdigest())


def test_what_is_written_is_read_back(tmp_path):
    folder = write(tmp_path, 4)
    reference = cp.verify(folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (reference.uri, reference.step, reference.sha256) == (str(folder), 4, digest)
    assert (
        cp.last_checkpoint(tmp_path) == cp.best_checkpoint(tmp_path, {}) == cp.newest_checkpoint(tmp_path) == reference
    )
    assert load_file(folder / "model.safetensors")["w"].tolist() == [4.0, 4.0, 4.0]
    assert cp.read_optimizer_state(folder, 0)["0.exp_avg"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    manifest = cp.read_manifest(folder)
    assert set(manifest["files"]) == {"model.safetensors", "optimizer/rank-00000.safetensors", "run_config.json"}
    assert manifest["run_id"] == "7" and manifest["ranks"] == 1
    assert json.loads((folder / "run_config.json").read_text()) == {"seed": 0}
    assert [p.name for p in tmp_path.iterdir()] == ["step-000004"]  # no staging folder is left


def test_the_digest_of_shards_is_that_of_their_sums_in_order_of_name(tmp_path):
    staging = cp.staging_folder(tmp_path, 1)
    staging.mkdir()
    sums = []
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({name: torch.ones(1)}, staging / name)
        sums.append(hashlib.sha256((staging / name).read_bytes()).hexdigest())
    sealed = cp.seal(tmp_path, 1, config={}, details=ORIGIN)
    assert sealed.sha256 == hashlib.sha256("\n".join(sums).encode()).hexdigest()


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert (
        cp.last_checkpoint(tmp_path) is cp.best_checkpoint(tmp_path, {0: 1.0}) is cp.newest_checkpoint(tmp_path) is None
    )
    assert cp.prune(tmp_path / "missing", keep_last=1, keep_best=1) == []


def test_a_folder_without_done_never_was_a_checkpoint(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2) / "DONE").unlink()
    with pytest.raises(
        CheckpointError, match=r"step-000002 is not a finished checkpoint.*step-000001 is whole: remove"
    ):
        cp.last_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "step-000002")
    assert cp.last_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer/rank-00000.safetensors", "run_config.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_names_the_file_and_the_remedy(tmp_path, name, how):
    folder = write(tmp_path, 1)
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    if how != "remove":
        path.write_bytes(data if how == "flip" else data[:-1])
    with pytest.raises(CheckpointError) as caught:
        cp.last_checkpoint(tmp_path)
    said = f"{path} is missing or damaged: its size or sha256 is not the manifest's. "
    assert str(caught.value) == said + f"No other checkpoint of {tmp_path} is whole: start a new run"
    before = write(tmp_path, 0)
    with pytest.raises(CheckpointError) as caught:
        cp.last_checkpoint(tmp_path)
    assert str(caught.value) == said + f"{before} is whole: remove {folder} and resume to go on from there"


def test_an_edited_manifest_is_refused(tmp_path):
    folder = write(tmp_path, 1)
    manifest = cp.read_manifest(folder)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "step": 9}, indent=2))
    with pytest.raises(CheckpointError, match=r"manifest\.json does not match DONE: it was changed"):
        cp.newest_checkpoint(tmp_path)
    (folder / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not a finished checkpoint"):
        cp.verify(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "link/outside"])
def test_a_manifest_cannot_name_files_outside_of_its_folder(tmp_path, name):
    folder = write(tmp_path, 1)
    (tmp_path / "outside").write_text("")
    (folder / "link").symlink_to(tmp_path)
    manifest = cp.read_manifest(folder)
    empty = {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0}
    reseal(folder, {**manifest, "files": {name: empty, **manifest["files"]}})
    with pytest.raises(CheckpointError, match="lies outside the checkpoint"):
        cp.verify(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": True}, "step"),
        ({"step": -3}, "step"),
        ({"step": 9}, "of RS step 9, which is not the folder's"),
        ({"ranks": 0}, "ranks"),
        ({"zero_stage": None}, "zero_stage"),
        ({"format": 2}, "format"),
        ({"parent": None}, "parent"),
        ({"files": {"a": 1}}, "files"),
        ({"files": {"a": {"sha256": 7, "bytes": 1}}}, "files"),
        ({"files": {"a\0b": {"sha256": "0" * 64, "bytes": 1}}}, "files"),
        ({"files": {"a" * 5000: {"sha256": "0" * 64, "bytes": 1}}}, "files"),
        ({"weights_sha256": "0" * 64}, "weights_sha256"),
    ],
)
def test_a_forged_manifest_is_an_error_of_the_checkpoint(tmp_path, change, said):
    folder = write(tmp_path, 1)
    before = write(tmp_path, 0)
    reseal(folder, {**cp.read_manifest(folder), **change})
    for read in (cp.verify, lambda _: cp.last_checkpoint(tmp_path), lambda _: cp.newest_checkpoint(tmp_path)):
        with pytest.raises(CheckpointError, match="step-000001") as caught:
            read(folder)
        assert said in str(caught.value)
    assert f"{before} is whole: remove {folder}" in str(caught.value)


@pytest.mark.parametrize("text", ["{}", "[]", "[" * 100_000, '{"files": {}, "step": "x"}'])
def test_a_manifest_of_another_shape_is_an_error_of_the_checkpoint(tmp_path, text):
    folder = write(tmp_path, 1)
    (folder / "manifest.json").write_text(text)
    (folder / "DONE").write_text(hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(CheckpointError, match="step-000001"):
        cp.verify(folder)


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    validations = {0: 5.0, 1: 0.1, 2: 0.9, 4: 0.9, 5: 0.3}  # 3 was not validated, the base has no checkpoint
    for step in range(1, 6):
        write(tmp_path, step)
    assert cp.best_checkpoint(tmp_path, validations).step == 2  # the earlier of equals
    removed = cp.prune(tmp_path, keep_last=2, keep_best=1, validations=validations)
    assert [p.name for p in removed] == ["step-000001", "step-000003"]
    assert [p.name for p in cp.finished(tmp_path)] == ["step-000002", "step-000004", "step-000005"]
    assert cp.prune(tmp_path, keep_last=2, keep_best=1, validations=validations) == []
    assert (
        cp.prune(tmp_path, keep_last=1, keep_best=2, validations=validations) == []
    )  # 2 and 4 are the best two, 5 the newest
    assert [p.name for p in cp.prune(tmp_path, keep_last=1, keep_best=1, validations=validations)] == ["step-000004"]


def test_what_a_failed_step_left_is_kept_and_is_nobody_s_best(tmp_path):
    for step in range(1, 5):
        write(tmp_path, step)
    validations = {1: 0.9, 2: 0.1, 4: 5.0}
    best = [cp.best_checkpoint(tmp_path, validations, failed).step for failed in (None, 4, 1)]
    assert best == [4, 1, 4]  # before the first step there is none
    assert cp.best_checkpoint(tmp_path, {}, 4).step == 3  # where nothing was validated, the newest
    removed = cp.prune(tmp_path, keep_last=1, keep_best=1, validations=validations, failed=4)
    assert [p.name for p in removed] == ["step-000002"]  # 1 is the best, 3 the newest before, 4 what failed


def test_nothing_is_pruned_before_the_newest_is_known_to_be_whole(tmp_path):
    for step in (1, 2, 3):
        folder = write(tmp_path, step)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-000003/model\.safetensors is missing or damaged"):
        cp.prune(tmp_path, keep_last=1, keep_best=1)
    assert [p.name for p in cp.finished(tmp_path)] == ["step-000001", "step-000002", "step-000003"]


def test_what_killed_writers_left_is_swept_away(tmp_path):
    for step in (2, 4):
        write(tmp_path, step)
    cp.staging_folder(tmp_path, 6).mkdir()
    (write(tmp_path, 1) / "DONE").unlink()  # half removed by a prune that was killed
    cp.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000004"]
    (tmp_path / "step-000004" / "DONE").unlink()  # the newest: not what a prune leaves
    cp.sweep(tmp_path)
    assert (tmp_path / "step-000004").is_dir()


def test_where_nothing_was_validated_the_best_is_the_newest(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    assert cp.best_checkpoint(tmp_path, {}).step == 2


def test_optimizer_state_that_is_none(tmp_path):
    folder = write(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"cannot read .*rank-00001\.safetensors"):
        cp.read_optimizer_state(folder, 1)
    (folder / "optimizer" / "rank-00000.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match=r"cannot read .*rank-00000\.safetensors"):
        cp.read_optimizer_state(folder, 0)


def test_a_place_that_cannot_be_written_is_an_error_of_the_disk(tmp_path):
    staging = cp.staging_folder(tmp_path, 1)
    staging.mkdir()
    (staging / "optimizer").write_text("in the way")
    with pytest.raises(DiskError, match=r"optimizer/rank-00000\.safetensors"):
        cp.write_optimizer_state(staging, 0, {"a": torch.ones(1)})
    with pytest.raises(DiskError, match=r"step-000002.*then resume the run"):
        cp.seal(tmp_path, 2, config={}, details=ORIGIN)
