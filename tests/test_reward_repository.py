"""Repositories under s3:// as servers find them, on moto; exports and serving are in tests/test_s3_flow.py."""

import hashlib
import json

import pytest

from alignment.config import load_config
from alignment.config_sections import RunSection
from alignment.errors import ModelError
from alignment.model_cache import cache_root
from alignment.policy_source import model_folder
from alignment.reward_repository import read_export
from alignment.s3_objects import write_bytes
from alignment.workspace import create
from flow_runs import SMOKE
from infra import triton
from s3_servers import new_bucket, use


@pytest.fixture
def bucket(moto_server, monkeypatch, tmp_path):
    monkeypatch.setenv("RS_CACHE", str(tmp_path / "cache"))
    use(moto_server, monkeypatch)
    return new_bucket()


def export(repository, weights=b"weights"):
    """A version that has what a reader of its card looks at."""
    digest = hashlib.sha256(weights).hexdigest()
    card = {"digest": digest, "name": "rm", "version": "1", "accuracy": None}
    write_bytes(f"{repository}/rm/config.pbtxt", b"x")
    write_bytes(f"{repository}/rm/1/weights/model.safetensors", weights)
    write_bytes(f"{repository}/rm/1/card.json", json.dumps(card).encode())
    return digest


def test_a_damaged_copy_in_the_cache_is_fetched_anew(bucket):
    digest = export(f"{bucket}/repo")
    assert read_export(f"{bucket}/repo", "rm", "1", RunSection()).digest == digest
    (copy,) = cache_root().rglob("model.safetensors")
    copy.write_bytes(b"damaged")
    assert read_export(f"{bucket}/repo", "rm", "1", RunSection()).digest == digest
    write_bytes(f"{bucket}/repo/rm/1/weights/model.safetensors", b"damaged there")
    next(cache_root().rglob("model.safetensors")).write_bytes(b"damaged")
    with pytest.raises(ModelError):
        read_export(f"{bucket}/repo", "rm", "1", RunSection())


def test_what_is_not_there_is_said_of_the_uri_and_the_option(bucket, capsys):
    assert triton.main(["--repository", f"{bucket}/none/"]) == 2
    assert f"no exported version of any model in {bucket}/none:" in capsys.readouterr().err
    export(f"{bucket}/repo")
    assert triton.main(["--repository", f"{bucket}/repo", "--model", "rm", "--also", "a/3"]) == 2
    assert f"--also (a/3): {bucket}/repo has no such exported version" in capsys.readouterr().err


def test_a_repository_is_the_same_with_a_slash_at_its_end(bucket):
    config = load_config(SMOKE, [f"reward.repository={bucket}/repo/"])
    assert config.reward_repository == f"{bucket}/repo"


def test_whoever_names_latest_as_a_model_is_told_the_run(bucket):
    config = load_config(SMOKE, [f"run.root={bucket}/runs"])
    create(config.run, config.run.root, "7", config.model_dump_json())
    with pytest.raises(ModelError, match=rf"{bucket}/runs/7/checkpoints/step-…"):
        model_folder(f"{bucket}/runs/latest", config.run, key="policy.model")
