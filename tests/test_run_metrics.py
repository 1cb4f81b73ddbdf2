"""A run's progress as Prometheus reads it: after each event by hand, and in the file."""

from pathlib import Path

from alignment.run_folder import RunFolder
from alignment.run_metrics import METRICS, RunProgress, after, end_progress, progress_file, write_progress

STEP = {
    "kind": "step",
    "step": 3,
    "seconds": {"rollouts": 12.0, "scoring": 1.5, "update": 8.0},
    "reward_mean": 0.25,
    "selected_reward_mean": None,
}


def test_steps_validations_and_the_start_are_progress_and_nothing_else_is() -> None:
    begun = RunProgress(2, 8, at=100.0)
    assert after(begun, {"kind": "phase", "step": 3}, 107.0) is begun
    assert after(begun, {"kind": "note", "text": "…"}, 107.0) is begun
    assert after(begun, {"kind": "ready"}, 110.0) == RunProgress(2, 8, at=110.0)
    stepped = after(begun, STEP, 140.0)
    assert stepped == RunProgress(3, 8, at=140.0, step_seconds=21.5, reward_mean=0.25)
    validated = after(stepped, {"kind": "validation", "step": 3, "reward_mean": 0.5}, 150.0)
    assert validated == RunProgress(3, 8, at=150.0, step_seconds=21.5, reward_mean=0.25)


def test_the_file_says_what_is_known_and_goes_with_the_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "17")
    end_progress(run)  # there is none yet
    write_progress(run, RunProgress(0, 8, at=100.5))
    text = progress_file(run).read_text()
    assert [line for line in text.splitlines() if line[0] != "#"] == [
        'rs_run_step{run="17"} 0',
        'rs_run_total_steps{run="17"} 8',
        'rs_run_progress_timestamp_seconds{run="17"} 100.5',
        'rs_run_step_seconds{run="17"} 0.0',
    ]
    write_progress(run, RunProgress(3, 8, 140.0, 21.5, 0.25, 1.5))
    told = [line.partition("{")[0] for line in progress_file(run).read_text().splitlines() if line[0] != "#"]
    assert told == list(METRICS)
    assert [path.name for path in progress_file(run).parent.iterdir()] == ["17.prom"]  # no temporary file is left
    end_progress(run)
    assert not progress_file(run).exists()
