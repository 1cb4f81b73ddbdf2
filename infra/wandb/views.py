"""The charts as W&B's workspace and report. Building them asks no server; saving does.

`_to_model` of wandb-workspaces is private, the only way to see without a network what would be saved: its version is
pinned in requirements-wandb.txt.
"""

import json
import re
from typing import Any

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces

from alignment.tracked_metrics import STEP
from infra.wandb.panels import SECTIONS, Chart

TITLE = "Rejection sampling"


def workspace(entity: str, project: str) -> Any:
    """A view of all charts, section by section."""
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[
            workspaces.Section(name=section.title, panels=[_panel(chart) for chart in section.charts], is_open=True)
            for section in SECTIONS
        ],
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
    )


def report(entity: str, project: str) -> Any:
    """The same charts with a word on how to read them, over all runs of the project."""
    blocks: list[Any] = [reports.TableOfContents()]
    for section in SECTIONS:
        runs = reports.Runset()  # of the report's own project: naming one asks the server
        charts = reports.PanelGrid(runsets=[runs], panels=[_panel(chart) for chart in section.charts])
        blocks += [reports.H1(text=section.title), reports.P(text=section.text), charts]
    about = "Each number is explained in docs/dashboards.md; the verdict on a run is its report.html."
    return reports.Report(entity=entity, project=project, title=TITLE, description=about, blocks=blocks, width="fluid")


def specification(entity: str, project: str) -> dict[str, Any]:
    """What W&B would be given of both, as plain JSON values."""
    models = {"workspace": workspace(entity, project), "report": report(entity, project)}
    return {name: json.loads(one._to_model().model_dump_json(by_alias=True)) for name, one in models.items()}


def _panel(chart: Chart) -> Any:
    if chart.is_media:
        return reports.MediaBrowser(title=chart.title, media_keys=list(chart.names))
    if chart.families:
        families = "|".join(re.escape(family) for family in chart.families)
        return reports.LinePlot(title=chart.title, x=STEP, metric_regex=f"^({families}).+")
    return reports.LinePlot(title=chart.title, x=STEP, y=list(chart.names))
