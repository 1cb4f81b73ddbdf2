"""The dashboard as code: built without a network, and of numbers that a run logs."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import wandb

import infra.wandb
from alignment.tracked_metrics import HISTOGRAMS, METRICS, SAMPLES, is_known
from infra.wandb.__main__ import main
from infra.wandb.panels import SECTIONS

MEDIA = {*HISTOGRAMS, SAMPLES}


def parts(value: Any) -> list[dict[str, Any]]:
    """All objects within plain JSON values."""
    if isinstance(value, list):
        return [part for one in value for part in parts(one)]
    return [value, *parts(list(value.values()))] if isinstance(value, dict) else []


def test_one_command_writes_workspace_and_report_of_numbers_that_are_logged(tmp_path: Path, capsys: Any) -> None:
    assert main(["--project", "films", "--entity", "team", "--dry-run", str(tmp_path / "views.json")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'views.json'}: a workspace and a report of films\n"
    views = json.loads((tmp_path / "views.json").read_text())
    count = sum(len(section.charts) for section in SECTIONS)
    names = {metric.name for metric in METRICS}
    for view in (views["workspace"], views["report"]):
        panels = [part for part in parts(view) if part.get("viewType") in ("Run History Line Plot", "Media Browser")]
        assert len(panels) == count
        for config in (panel["config"] for panel in panels):
            if "mediaKeys" in config:
                assert set(config["mediaKeys"]) <= MEDIA
            elif config["metricRegex"]:
                families = re.fullmatch(r"\^\((.*)\)\.\+", config["metricRegex"])
                assert families
                assert {f"{family}*".replace("\\", "") for family in families[1].split("|")} <= names
            else:
                assert config["xAxis"] == "rs/step" and config["metrics"]
                assert all(is_known(name) and name in names for name in config["metrics"])


def test_it_says_what_it_lacks(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert main(["--project", "films"]) == 1
    assert capsys.readouterr().err == "W&B: no API key is configured: set WANDB_API_KEY or run `wandb login`\n"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    assert main(["--project", "films"]) == 1  # no such server
    assert capsys.readouterr().err.startswith("W&B: ")
    wandb.teardown()
    for name in [name for name in sys.modules if name.startswith(("wandb_workspaces", "infra.wandb.views"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.delattr(infra.wandb, "views", raising=False)
    assert main(["--project", "films"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("W&B: wandb-workspaces is missing (")
    assert said.endswith("): pip install -r requirements-wandb.txt\n")
