"""The code package, which is all that a remote task has."""

import json
import sys
import tarfile
from pathlib import Path

import pytest

from alignment.config import load_config, parse_config
from flow_runs import SMOKE, Finished, Place

NEEDED = (
    "rs_flow.py", "rs_iteration_flow.py", "sft_flow.py", "sources.py", "placement.py",
    "alignment/stages.py", "alignment/report.html.jinja", "models/policy.py", "infra/triton.py",
    "triton_repo/reward_model/config.pbtxt", "triton_repo/reward_model/1/model.py", "configs/imdb_sentiment.yaml",
)  # fmt: skip
FEW_MB = 4_000_000


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """RSFlow's code package on the smoke preset, saved and unpacked into `code/`; runs go to `runs/`."""
    place = Place(tmp_path_factory.mktemp("package"))
    done = place.execute(place.command("rs_flow", "package", "save", str(place.path / "first.tgz")))
    assert done.status == 0, done.output
    with tarfile.open(place.path / "first.tgz") as archive:
        archive.extractall(place.path / "code", filter="data")
    return place


def in_pod(place: Place, *arguments: str) -> Finished:
    """A command as a pod gives it: in the unpacked package, the package's own Metaflow and config, no repository."""
    code = str(place.path / "code")
    pod = {
        "PYTHONPATH": f"{code}/.mf_code",
        "METAFLOW_EXTRACTED_ROOT": code,
        "METAFLOW_FLOW_CONFIG_VALUE": json.dumps({"config": "kv.config"}),
    }
    done = Place(place.path / "code").execute(
        [sys.executable, *arguments], **pod, METAFLOW_DATASTORE_SYSROOT_LOCAL=str(place.path)
    )
    assert done.status == 0, done.output
    return done


def members(package: Path) -> dict[str, int]:
    """Names and sizes of a package's files, Metaflow's own apart."""
    with tarfile.open(package) as archive:
        return {m.name: m.size for m in archive if not m.name.startswith(".mf_")}


def test_the_package_holds_the_code_and_no_weights(packed: Place) -> None:
    first = members(packed.path / "first.tgz")
    assert set(NEEDED) <= set(first)
    assert {Path(name).suffix for name in first} <= {".py", ".pbtxt", ".yaml", ".json", ".jinja"}
    assert sum(first.values()) < FEW_MB
    assert not any(name.startswith("tests/") or Path(name).name.startswith("test_") for name in first)


def test_the_package_carries_the_resolved_config(packed: Place) -> None:
    values = json.loads((packed.path / "code" / ".mf_meta" / "CONFIG").read_text())["user_configs"]["config"][0]
    expected = load_config(SMOKE, [f"run.root={packed.root}", "wandb.mode=disabled"])
    assert parse_config(json.dumps(values)) == expected


def test_a_step_runs_from_the_package_alone(packed: Place) -> None:
    in_pod(packed, "rs_flow.py", "--quiet", "init", "--run-id", "7", "--task-id", "parameters")
    where = ["--run-id", "7", "--task-id", "1", "--input-paths", "7/_parameters/parameters"]
    in_pod(packed, "rs_flow.py", "--quiet", "step", "start", *where)
    run = packed.root / "7"
    assert len((run / "prompts" / "train.jsonl").read_text().splitlines()) == 80
    assert parse_config((run / "config.json").read_text()).run.root == str(packed.root)
    loaded = in_pod(packed, "-c", "import metaflow, sources, alignment; print(metaflow.__file__, alignment.__file__)")
    assert all(path.startswith(str(packed.path / "code")) for path in loaded.output.split())


def test_the_inner_flow_is_packaged_whole_from_the_package(packed: Place) -> None:
    in_pod(packed, "rs_iteration_flow.py", "package", "save", str(packed.path / "second.tgz"))
    assert members(packed.path / "second.tgz") == members(packed.path / "first.tgz")
