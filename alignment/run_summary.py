"""What a run's files say of it, whether it is finished or not, and whichever version wrote them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import DataError
from alignment.run_folder import RunFolder
from alignment.run_state import RunState, run_state

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run. `steps` and `validations` are records of metrics.jsonl; `report` and `rows` are None until it is finished.

    `config` is the resolved one as it was written, so that keys may be missing that there are now. `checkpoint` names
    the one that was evaluated, before that the newest one.
    """

    run: str
    state: RunState
    config: Mapping[str, Any]
    steps: tuple[Record, ...]
    validations: tuple[Record, ...]
    report: Mapping[str, Any] | None
    rows: tuple[Record, ...] | None
    checkpoint: str | None

    @property
    def name(self) -> str:
        """The run's id."""
        return self.run.rstrip("/").rpartition("/")[2]

    @property
    def step(self) -> str:
        """RS steps that are done, of how many at the most: `3/8`."""
        most = found(self.config, "loop.max_steps")
        return f"{self.steps[-1]['step'] if self.steps else 0}/{'?' if most is None else most}"

    @property
    def reward(self) -> float | None:
        """Mean reward of all rollouts of the last RS step; None where the record has no number."""
        reward = self.steps[-1].get("reward_mean") if self.steps else None
        return reward if isinstance(reward, int | float) else None

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """What the report says of the policy; nothing for a run without one."""
        evaluation: Mapping[str, Any] = (self.report or {}).get("evaluation", {})
        return evaluation


def summarize(run: str, folder: RunFolder) -> RunSummary:
    """What the files in `folder` say of the run that `run` names. Raises DataError for one that is none, or damaged."""
    config = _json(folder.config)
    if not isinstance(config, dict) or "loop" not in config:
        raise DataError(f"{run} holds no run: its config.json is missing, or something else's")
    metrics, report = folder.read_metrics(), _json(folder.report_json)
    if report is not None and not isinstance(found(report, "evaluation"), Mapping):
        raise DataError(f"{folder.report_json} is no report: it was damaged; move the run's folder away")
    rows = _json(folder.path / "evaluation.json")
    uri = found(report or {}, "checkpoint.uri") or _newest(folder.checkpoints)
    return RunSummary(
        run=run,
        state=run_state(folder, report),
        config=config,
        steps=tuple(r for r in metrics if r.get("kind") == "step"),
        validations=tuple(r for r in metrics if r.get("kind") == "validation"),
        report=report,
        rows=None if report is None or rows is None else tuple(rows),
        checkpoint=uri.rpartition("/")[2] if uri else None,
    )


def found(values: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none, as in what an older version wrote."""
    at: Any = values
    for part in path.split("."):
        at = at.get(part) if isinstance(at, Mapping) else None
    return at


def interval(values: Mapping[str, Any], path: str) -> Sequence[float] | None:
    """The interval of what stands at a dotted path; None where there is none, or an end of it is no number."""
    ends = found(values, f"{path}_ci95")
    return ends if ends and None not in ends else None


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): it was damaged; move the run's folder away") from error


def _newest(checkpoints: Path) -> str | None:
    return max((str(done.parent) for done in checkpoints.glob("step-*/DONE")), default=None)
