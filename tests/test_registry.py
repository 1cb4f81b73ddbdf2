"""The registry in a folder, and its parts on S3; whole runs that register are in tests/test_s3_flow.py."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from alignment.config import load_config
from alignment.embedded import policy_folder
from alignment.errors import ConfigError, ModelError, StorageConflict
from alignment.policy_source import find_policy, model_folder
from alignment.run_folder import RunFolder
from alignment.types import Checkpoint
from flow_runs import ROOT, SMOKE
from models.checkpoints import folder_digest
from models.promotions import promote_once
from models.registry import aliases, entries, fetch, find, located, main, names, promote, register, register_result
from models.registry_store import move_alias, place_of, read_alias
from s3_servers import new_bucket, use


@pytest.fixture(params=["folder", "moto"])
def root(request, tmp_path, monkeypatch):
    """A run root in a folder, and one under s3://."""
    if request.param == "folder":
        return str(tmp_path / "runs")
    use(request.getfixturevalue("moto_server"), monkeypatch)
    return f"{new_bucket()}/runs"


def add(root, number=1, name="policy"):
    return register(root, name, "policy", f"/models/{number}", f"{number}" * 64, "run-1", step=number)


def test_versions_count_up_and_the_same_model_is_one_entry(root):
    assert (names(root), entries(root, "policy")) == ([], [])
    first, second = add(root, 1), add(root, 2)
    assert (first.version, second.version, add(root, 1)) == (1, 2, first)
    assert add(root, 1, "other").version == 1
    assert names(root) == ["other", "policy"]
    assert entries(root, "policy") == [first, second]
    assert second.lineage == {"step": 2}


def test_a_name_means_its_newest_version_until_one_is_asked_for(root):
    first, second = add(root, 1), add(root, 2)
    assert find(root, "policy") == find(root, "policy@latest") == find(root, "policy:2") == second
    with pytest.raises(ConfigError, match=r"NAME \(policy@promoted\): the registry .* versions of policy: 1, 2"):
        find(root, "policy@promoted")
    assert promote(root, "policy:2") == (second, None)
    assert promote(root, "policy:1") == (first, 2)
    assert promote(root, "policy:1") == (first, 1)
    assert (find(root, "policy@promoted"), aliases(root, "policy")) == (first, {"latest": 2, "promoted": 1})
    assert located(root, "registry:policy@promoted", key="policy.model") == "/models/1"
    with pytest.raises(ConfigError, match=r"policy.model \(policy:9\): the registry"):
        located(root, "registry:policy:9", key="policy.model")
    with pytest.raises(ConfigError, match=r"NAME \(a/b\): expected NAME, NAME:VERSION or NAME@ALIAS"):
        find(root, "a/b")


def test_an_alias_may_have_another_name(root, capsys):
    first, second = add(root, 1), add(root, 2)
    promote(root, "policy:1", "stable")
    promote(root, "policy:2")
    assert aliases(root, "policy") == {"latest": 2, "promoted": 2, "stable": 1}
    assert (find(root, "policy@stable"), find(root, "policy@promoted")) == (first, second)
    assert main(["--root", root, "promote", "policy:2", "--alias", "stable"]) == 0
    assert capsys.readouterr().out == "policy@stable is policy:2, before policy:1\n"
    for alias in ("latest", "Stable"):
        with pytest.raises(ConfigError, match=rf"--alias \({alias}\): lower-case letters, and not latest"):
            promote(root, "policy:2", alias)


def test_a_run_promotes_its_policy_once(root, monkeypatch):
    first, second = add(root, 1), add(root, 2)
    for _ in range(2):  # the second time it is resumed
        assert promote_once(root, first, "stable", "run-1") == "policy@stable is policy:1"
    assert promote_once(root, second, "stable", "run-2") == "policy@stable is policy:2, before policy:1"
    said = "policy@stable was moved by somebody else since this run promoted policy:1, and stays"
    assert promote_once(root, first, "stable", "run-1").startswith(said)  # resumed once more
    assert aliases(root, "policy") == {"latest": 2, "stable": 2} and names(root) == ["policy"]
    # Killed between its note and the move, it moves the alias when it is resumed, unless somebody else did.
    third = add(root, 3)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("models.promotions.move_alias", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        promote_once(root, third, "stable", "run-3")
    assert aliases(root, "policy")["stable"] == 2
    assert promote_once(root, third, "stable", "run-3") == "policy@stable is policy:3, before policy:2"


def test_of_two_that_promote_at_once_one_is_told(root):
    add(root, 1), add(root, 2), add(root, 3)
    promote(root, "policy:1")
    place = place_of(root, "policy", "aliases", "promoted")
    _, token = read_alias(place)
    promote(root, "policy:2")
    with pytest.raises(StorageConflict, match="moved"):
        move_alias(place, 3, token)
    assert find(root, "policy@promoted").version == 2


def test_all_that_register_at_once_get_versions_of_their_own(root):
    found = []
    threads = [threading.Thread(target=lambda i=i: found.append(add(root, i))) for i in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.version for entry in found) == [1, 2, 3, 4, 5, 6]
    assert {entry.uri for entry in entries(root, "policy")} == {f"/models/{i}" for i in range(1, 7)}


def test_an_entry_that_is_none_is_named_and_blocks_no_other(tmp_path, capsys):
    add(str(tmp_path), 1)
    second = add(str(tmp_path), 2)
    (tmp_path / "registry" / "policy" / "1.json").write_text("{}")
    assert entries(str(tmp_path), "policy") == [second] and add(str(tmp_path), 3).version == 3
    assert "policy/1.json is no entry of a registry" in capsys.readouterr().err
    with pytest.raises(ModelError, match=r"policy/1.json is no entry of a registry .*: remove it"):
        find(str(tmp_path), "policy:1")
    aliased = tmp_path / "registry" / "policy" / "aliases" / "promoted"
    aliased.parent.mkdir()
    aliased.write_text("x")
    with pytest.raises(ModelError, match=r"aliases/promoted is no alias of a registry: it says 'x'; remove it"):
        find(str(tmp_path), "policy@promoted")


def test_what_a_failed_fetch_left_is_in_no_other_model(tmp_path, capsys):
    root = str(tmp_path / "runs")
    for number, files in (
        (1, {"chat_template.jinja": "OLD", "model.safetensors": "a"}),
        (2, {"model.safetensors": "b"}),
    ):
        folder = tmp_path / f"model-{number}"
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        register(root, "policy", "policy", str(folder), folder_digest(folder) if number == 2 else "f" * 64, "run-1")
    with pytest.raises(ModelError, match="it is not that model"):
        fetch(root, "policy:1", tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))
    with pytest.raises(ModelError, match="it is not that model"):
        located(root, "registry:policy:1", key="policy.model")
    fetch(root, "policy:2", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert main(["--root", root, "fetch", "policy:2", "--to", str(tmp_path / "out" / "model.safetensors" / "x")]) == 1
    assert "DiskError: cannot write" in capsys.readouterr().err


def test_a_policy_is_fetched_verified_and_may_be_aligned(tmp_path, capsys):
    shutil.copytree(policy_folder("tiny", tmp_path / "cache"), tmp_path / "model")
    root, digest = str(tmp_path / "runs"), folder_digest(tmp_path / "model")
    register(root, "policy", "policy", str(tmp_path / "model"), digest, "run-1")
    assert main(["--root", root, "fetch", "policy", "--to", str(tmp_path / "copy")]) == 0
    assert capsys.readouterr().out == f"policy:1 is in {tmp_path / 'copy'}, sha256 {digest[:12]} as registered\n"
    assert folder_digest(tmp_path / "copy") == digest
    with pytest.raises(ConfigError, match=r"--to \(.*copy\) is there already"):
        fetch(root, "policy", tmp_path / "copy")
    config = load_config(SMOKE, [f"run.root={root}", "policy.model=registry:policy"])
    assert model_folder(config.policy.model, config.run, key="policy.model") == tmp_path / "model"
    assert find_policy("registry:policy", root=root, key="evaluation.model").checkpoint.sha256 == digest
    (tmp_path / "model" / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(ModelError, match=r"was registered: it is not that model"):
        fetch(root, "policy", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_model_whose_run_was_removed_is_said_to_be_gone(tmp_path, capsys):
    add(str(tmp_path))
    assert main(["--root", str(tmp_path), "fetch", "policy", "--to", str(tmp_path / "copy")]) == 1
    assert "ModelError: /models/1 is there no longer: what is registered was moved" in capsys.readouterr().err


def test_a_run_registers_what_it_evaluated_and_what_it_scored_with(tmp_path, capsys):
    config = load_config(SMOKE, [f"run.root={tmp_path}"])
    run = RunFolder(tmp_path / "7")
    reward = {"name": "helpful", "version": "2", "digest": "d", "repository": "/repository", "accuracy": 0.75}
    for _ in range(2):  # a resume does the same again
        register_result(config, str(run.path), reward, Checkpoint(f"{run.checkpoints}/step-000004", "e", 4))
    assert capsys.readouterr().out == "registered policy:1 and helpful:1\n" * 2
    (policy,), (model,) = entries(str(tmp_path), "policy"), entries(str(tmp_path), "helpful")
    assert (policy.uri, policy.sha256, policy.run_id) == (f"{run.checkpoints}/step-000004", "e", "7")
    assert policy.lineage["reward_model"] == {"name": "helpful", "version": "2", "digest": "d"}
    assert (model.kind, model.uri, model.lineage["accuracy"]) == ("reward_model", "/repository/helpful/2", 0.75)
    with pytest.raises(
        ConfigError, match=r"policy.model \(registry:helpful\): helpful:1 is a reward_model: name a policy"
    ):
        located(str(tmp_path), "registry:helpful", key="policy.model")
    external = {**reward, "repository": ""}
    register_result(config, str(run.path), external, Checkpoint("other", "f", 5))
    assert len(entries(str(tmp_path), "helpful")) == 1


def test_the_command_line_lists_shows_and_promotes(tmp_path, capsys):
    root = ["--root", str(tmp_path)]
    assert main([*root, "list"]) == 0
    assert capsys.readouterr().out == f"nothing is registered yet in {tmp_path}\n"
    add(str(tmp_path), 1), add(str(tmp_path), 2)
    assert main([*root, "promote", "policy:1"]) == 0
    assert main([*root, "promote", "policy:2"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "policy@promoted is policy:2, before policy:1"
    assert main([*root, "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].startswith("policy:1  policy, run run-1, ")
    assert listed[1].startswith("policy:2 @latest @promoted  policy, run run-1, ")
    assert main([*root, "show", "policy:1"]) == 0
    assert json.loads(capsys.readouterr().out)["uri"] == "/models/1"
    assert main([*root, "show", "nope"]) == 1
    assert capsys.readouterr().err.startswith("ConfigError: NAME (nope): the registry")


def test_help_loads_no_heavy_library():
    code = (
        "import sys, models.registry as r\n"
        "try: r.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'boto3', 'metaflow'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.stdout.endswith("set()\n"), done.stderr
    assert Path(ROOT, "models", "registry.py").is_file()
