"""Growth with ranks: each point is measured by ranks of its own, here on the tiny policy."""

import json
from pathlib import Path

import pytest

from alignment.embedded import policy_folder
from alignment.errors import WorkerError
from benchmarks import ranks_plot


def test_points_are_measured_by_so_many_ranks_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_plot, "LINES", {"update, ZeRO 2": 2})
    source, notes = Path(policy_folder("tiny", tmp_path / "cache")), []
    drawn = ranks_plot.draw(source, notes.append, ranks=(1, 2), folder=tmp_path)
    assert [path.name for path in drawn] == ["ranks_time.svg", "ranks_memory.svg"]
    for path in drawn:
        assert path.read_text().startswith("<svg")
        points = json.loads(path.with_suffix(".json").read_text())["lines"]["update, ZeRO 2"]
        assert [count for count, _ in points] == [1, 2] and all(value > 0 for _, value in points)
    assert len(notes) == 2


def test_a_point_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_plot, "ROOT", tmp_path)  # where nothing is that could be started
    with pytest.raises(WorkerError, match="matrix products on 1 ranks could not be measured"):
        ranks_plot.draw(tmp_path / "nothing", print, ranks=(1,), folder=tmp_path)
