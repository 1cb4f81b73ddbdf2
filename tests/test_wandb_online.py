"""W&B online, against a stand-in for its server: rows of several processes, a network that fails, artifacts."""

from pathlib import Path

import pytest

from test_tracking import both, run_program, told
from wandb_stand_in import WandbStandIn, wandb_stand_in


def rows(server: WandbStandIn) -> list[tuple[str, int]]:
    """Kind and RS step of each row that the server holds."""
    found = server.rows["run-7"]
    return [("step" if "train_optim/lr" in row else "validation", row["rs/step"]) for row in found]


def test_processes_and_resumes_are_one_run_with_each_step_once(tmp_path: Path) -> None:
    with wandb_stand_in() as server:
        first = run_program(tmp_path, "online", [1, 2], **server.environment)
        second = run_program(tmp_path, "auto", [2, 3], **server.environment)  # replays step 2
        assert first.stderr == second.stderr == ""
        assert list(server.rows) == ["run-7"]
        assert rows(server) == both(1, 2, 3)


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
