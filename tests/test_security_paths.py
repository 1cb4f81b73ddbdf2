"""Names in manifests, registries, configs and buckets, and links, cannot lead out of the folder that they belong to."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from alignment import lineage
from alignment.config import load_config
from alignment.continuation import link_tree
from alignment.errors import AlignmentError, CheckpointError, ConfigError, DataError, ModelError
from alignment.links import link_out
from alignment.run_checkpoints import fetch_checkpoint
from alignment.run_folder import RunFolder, check_id
from alignment.s3_connection import s3_client
from alignment.s3_folders import pull_folder, push_folder
from alignment.s3_objects import list_objects, write_bytes
from alignment.scorers_file import checked_scorers
from fuzz_run_targets import whole_run
from fuzz_targets import SMOKE
from models.checkpoints import verify
from models.registry import Entry, entries, fetch, find
from s3_servers import new_bucket, use

OUTWARD = ("../secret", "/etc/passwd", "a/../../secret", "..", ".")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A whole run of one RS step."""
    (tmp_path / "secret").write_text("for nobody else")
    return whole_run(tmp_path / "run")


def change_manifest(run: RunFolder, change: Callable[[dict[str, Any]], object]) -> Path:
    """The checkpoint after a change that whoever may write there can make: DONE belongs to the new manifest."""
    checkpoint = run.checkpoints / "step-000001"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    change(manifest)
    text = json.dumps(manifest)
    (checkpoint / "manifest.json").write_text(text)
    (checkpoint / "DONE").write_text(hashlib.sha256(text.encode()).hexdigest())
    return checkpoint


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd"])
def test_a_manifest_names_no_file_outside(run: RunFolder, name: str) -> None:
    entry = {"sha256": "0" * 64, "bytes": 1}
    checkpoint = change_manifest(run, lambda manifest: manifest["files"].update({name: entry}))
    with pytest.raises(CheckpointError, match=r"names .*, which lies outside the checkpoint"):
        verify(checkpoint)


def test_a_checkpoint_s_file_is_no_link_to_one_outside(run: RunFolder) -> None:
    weights = run.checkpoints / "step-000001" / "model.safetensors"
    shutil.move(weights, run.path / "elsewhere")
    weights.symlink_to(run.path / "elsewhere")
    with pytest.raises(CheckpointError, match="which lies outside the checkpoint"):
        verify(weights.parent)


def test_links_that_lead_to_each_other_and_endless_names_are_refused(run: RunFolder) -> None:
    weights = run.checkpoints / "step-000001" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(weights)
    with pytest.raises(CheckpointError, match="cannot be looked at"):
        verify(weights.parent)
    entry = {"sha256": "0" * 64, "bytes": 1}
    weights.unlink()
    checkpoint = change_manifest(run, lambda manifest: manifest.update(files={"ü" * 255: entry}))
    with pytest.raises(CheckpointError):
        verify(checkpoint)


@pytest.mark.parametrize("key", ["rollouts", "data", "judge"])
def test_the_lineage_looks_at_no_file_outside(run: RunFolder, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    digest = hashlib.sha256(b"for nobody else").hexdigest()  # who knows it would learn that the file is there

    def change(manifest: dict[str, Any]) -> None:
        (manifest["judge"]["files"] if key == "judge" else manifest[key])["../../secret"] = digest

    change_manifest(run, change)
    assert lineage.main([str(run.path), "--verify"]) == 1
    said = capsys.readouterr().out
    assert "was not written by this program" in said and "ok    " not in said


def test_the_lineage_s_chain_ends_where_it_turns_back(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    link = run.lineage / "step-000001.json"
    parent = {"step": 1, "manifest_sha256": hashlib.sha256(link.read_bytes()).hexdigest()}
    change_manifest(run, lambda manifest: manifest.update(parent=parent))
    assert lineage.main([str(run.path)]) == 1
    assert "which does not come before its child's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"), [("name", "../../x"), ("version", "1/../.."), ("version", "latest"), ("name", "")]
)
def test_a_run_s_reward_model_is_a_name_and_a_number(run: RunFolder, field: str, value: str) -> None:
    found = json.loads(run.scorers.read_text())
    found["reward_model"][field] = value
    run.scorers.write_text(json.dumps(found))
    with pytest.raises(DataError, match=r"scorers\.json: reward_model is .* which names no export"):
        checked_scorers(run)


@pytest.mark.parametrize("name", OUTWARD)
def test_a_run_id_names_a_folder_of_its_root(name: str) -> None:
    with pytest.raises(DataError, match="cannot name a folder"):
        check_id(name)


@pytest.mark.parametrize("override", ["reward.name=../x", "reward.version=1/..", "reward_ensemble.members={../a: 1}"])
def test_a_config_names_models_by_plain_names(override: str) -> None:
    with pytest.raises(ConfigError, match="pattern"):
        load_config(SMOKE, [override])


def register(root: Path, entry: Entry) -> None:
    (root / "registry" / entry.name).mkdir(parents=True)
    (root / "registry" / entry.name / f"{entry.version}.json").write_text(json.dumps(asdict(entry)))


def entry_at(uri: str, kind: Any = "reward_model") -> Entry:
    return Entry("reward_model", 1, kind, uri, "0" * 64, "2026-01-01", "run", {})


@pytest.mark.parametrize("end", ["../..", "rm/..", "../1", "..", "rm/1/../..", "r m/1", "rm/x"])
def test_a_registered_uri_does_not_choose_where_a_copy_goes(tmp_path: Path, end: str) -> None:
    """Its last parts become folders of the copy, and what stands in a copy's place is removed first."""
    root, kept = tmp_path / "runs", tmp_path / "kept"
    for folder in (tmp_path / "models" / "rm" / "1", kept):
        folder.mkdir(parents=True)
    register(root, entry_at(f"{tmp_path}/models/{end}"))
    with pytest.raises(ModelError, match="is no entry of a registry"):
        fetch(str(root), "reward_model", kept / "copy")
    assert kept.is_dir() and root.is_dir()


@pytest.mark.parametrize("change", [{"version": 2}, {"name": "other"}, {"sha256": 5}, {"kind": "code"}])
def test_an_entry_is_of_its_place_and_its_shape(
    tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    register(tmp_path, entry_at("/models/rm/1"))
    path = tmp_path / "registry" / "reward_model" / "1.json"
    path.write_text(json.dumps(asdict(entry_at("/models/rm/1")) | change))
    with pytest.raises(ModelError, match="is no entry of a registry"):
        find(str(tmp_path), "reward_model")
    assert entries(str(tmp_path), "reward_model") == []
    assert "remove it" in capsys.readouterr().err


def test_what_is_fetched_brings_no_file_from_outside_its_folder(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "secret").write_text("for nobody else")
    (model / "config.json").symlink_to(tmp_path / "secret")
    register(tmp_path, replace(entry_at(str(model), kind="policy"), name="policy"))
    with pytest.raises(ModelError, match="leads out of"):
        fetch(str(tmp_path), "policy", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_run_that_goes_on_takes_over_no_file_from_outside_its_source(run: RunFolder, tmp_path: Path) -> None:
    (run.prompts / "train.jsonl").unlink()
    (run.prompts / "train.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out of"):
        link_tree(run.prompts, tmp_path / "new" / "prompts")
    assert not (tmp_path / "new").exists()


def test_links_inside_a_folder_may_stay(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("a")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "file")
    assert link_out(tmp_path) is None
    (tmp_path / "a" / "gone").symlink_to("nowhere")
    assert link_out(tmp_path) == tmp_path / "a" / "gone"


@pytest.fixture
def own_bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket on moto."""
    use(request.getfixturevalue("moto_server"), monkeypatch)
    return new_bucket()


def test_nothing_from_outside_a_folder_is_sent_to_a_bucket(own_bucket: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "secret").write_text("for nobody else")
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="leads out of"):
        push_folder(tmp_path / "run", f"{own_bucket}/run")
    assert list_objects(f"{own_bucket}/run") == []


def test_objects_whose_names_lead_out_are_not_fetched(own_bucket: str, tmp_path: Path) -> None:
    for name in ("../secret", "a/../../secret", "/etc/secret"):
        s3_client().put_object(Bucket=own_bucket.removeprefix("s3://"), Key=f"run/{name}", Body=b"x")
        with pytest.raises(AlignmentError, match=r"leads out of|empty part"):
            pull_folder(f"{own_bucket}/run", tmp_path / "copy")
        s3_client().delete_object(Bucket=own_bucket.removeprefix("s3://"), Key=f"run/{name}")
    assert not (tmp_path / "secret").exists()


def test_what_a_bucket_s_marker_says_is_no_path(own_bucket: str, tmp_path: Path) -> None:
    write_bytes(f"{own_bucket}/run/checkpoints/step-000001/DONE", b"/../../../x")
    with pytest.raises(CheckpointError, match="is not a finished checkpoint"):
        fetch_checkpoint(f"{own_bucket}/run", tmp_path / "checkpoints" / "step-000001", print)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_messages_do_not_steer_a_terminal() -> None:
    text = str(DataError("\x1b[2Ja\tb\u202ec\ud800\nd" + "x" * 100_000))
    assert text.startswith("\\x1b[2Ja\\tb\\u202ec\\ud800\nd") and len(text) < 9000
    assert os.fsencode(text)
