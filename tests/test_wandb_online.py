"""W&B online, against a stand-in for its server: rows of several processes, a network that fails, artifacts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.run_folder import RunFolder
from test_tracked_metrics import checkpoint
from test_tracking import both, run_program, told
from wandb_stand_in import WandbStandIn, wandb_stand_in


def rows(server: WandbStandIn) -> list[tuple[str, int]]:
    """Kind and RS step of each row that the server holds."""
    found = server.rows["run-7"]
    return [("step" if "train_optim/lr" in row else "validation", row["rs/step"]) for row in found]


def test_processes_and_resumes_are_one_run_with_each_step_once(tmp_path: Path) -> None:
    digests = with_models(tmp_path)
    with wandb_stand_in() as server:
        first = run_program(tmp_path, "online", [1, 2], **server.environment)
        second = run_program(tmp_path, "auto", [2, 3], **server.environment)  # replays step 2
        assert first.stderr == second.stderr == ""
    assert list(server.rows) == ["run-7"] and rows(server) == both(1, 2, 3)
    check_models(server, digests)


@pytest.mark.slow
def test_what_a_killed_process_had_not_sent_is_sent_by_the_next(tmp_path: Path) -> None:
    with wandb_stand_in() as server:
        run_program(tmp_path, "online", [1], **server.environment)
        server.rows_lost.set()
        run_program(tmp_path, "online", [2, 3], end="killed", **server.environment)
        server.rows_lost.clear()
        assert rows(server) == both(1)
        run_program(tmp_path, "online", [3, 4], **server.environment)
        assert rows(server) == both(1, 2, 3, 4)
        (tmp_path / "run-7" / "wandb" / "logged.txt").unlink()  # a node that is lost takes it along
        run_program(tmp_path, "online", [4, 5], **server.environment)
        assert rows(server) == both(1, 2, 3, 4, 5)


def test_a_connection_that_is_lost_stops_no_run(tmp_path: Path) -> None:
    hasty = "import alignment.wandb_writer; alignment.wandb_writer.FINISH_SECONDS = 3.0\n"
    with wandb_stand_in() as server:
        server.rows_lost.set()
        done = run_program(tmp_path, "online", [1, 2], first=hasty, **server.environment)
    assert done.stdout == "run ended; wandb imported: True\n"
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("W&B: ")
    assert "what was not written elsewhere is in" in done.stderr
    assert told(tmp_path / "run-7") == []  # an online run's folder: `wandb sync` sends it
    assert len(list((tmp_path / "run-7").glob("wandb/run-*/run-*.wandb"))) == 1


def with_models(folder: Path) -> dict[str, str]:
    """A run that has a checkpoint and uses a reward model; sha256 of each file that it refers to, by its name."""
    run = RunFolder(folder / "run-7")
    run.checkpoints.mkdir(parents=True)
    checkpoint(run, 2)
    version = folder / "repository" / "rm" / "1"
    version.mkdir(parents=True)
    (version / "card.json").write_text("{}")
    reward = {"name": "rm", "version": "1", "digest": "ab" * 32, "repository": str(version.parent.parent)}
    run.scorers.write_text(json.dumps({"reward_model": reward, "judge": {}}))
    files = json.loads((run.checkpoints / "step-000002" / "manifest.json").read_text())["files"]
    return {"card.json": "ab" * 32, **{name: file["sha256"] for name, file in files.items()}}


def check_models(server: WandbStandIn, digests: dict[str, str]) -> None:
    """The server has both models by reference, knows which one was used, and got no file of them."""
    kinds = [(one["artifactTypeName"], one["artifactCollectionName"]) for one in server.artifacts]
    assert ("reward_model", "reward-model-rm") in kinds and ("model", "policy-run-7") in kinds
    referred = {name: entry for manifest in server.manifests for name, entry in manifest["contents"].items()}
    assert {name: entry["digest"] for name, entry in referred.items()} == digests
    assert all(entry["ref"].startswith("file:///") for entry in referred.values())
    assert not {Path(upload).name for upload in server.uploads} & set(digests)
    assert len(server.used) == 1


@pytest.mark.slow
def test_offline_parts_are_synced_into_one_run(tmp_path: Path) -> None:
    digests = with_models(tmp_path)
    for steps in ([1, 2], [2, 3]):
        run_program(tmp_path, "offline", steps)
    parts = [str(part) for part in sorted((tmp_path / "run-7" / "wandb").glob("offline-run-*"))]
    with wandb_stand_in() as server:
        environment = {**os.environ, **server.environment, "HOME": str(tmp_path)}
        command = [sys.executable, "-m", "wandb", "sync", *parts]
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert list(server.rows) == ["run-7"] and rows(server) == both(1, 2, 3)
    check_models(server, digests)
