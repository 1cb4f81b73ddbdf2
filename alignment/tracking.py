"""Tracking: a run's records, alarms, results and models as one stream, which W&B and TensorBoard draw.

The stream is made from the run's own files, so that it has no gap: whoever opens it first catches up with what
metrics.jsonl holds and a writer has not, because its process was killed or could not write.

Tracking never stops a run: what fails is said once on standard error, and the run goes on without that writer.
"""

import contextlib
import netrc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.over_optimisation import Alarm
from alignment.run_folder import RunFolder
from alignment.tensorboard_writer import TensorboardWriter
from alignment.tracked_items import Alert, Item, Record, StoredModel, Summary, Writer
from alignment.tracked_metrics import SAMPLES, points
from alignment.tracked_models import checkpoints, reward_models
from alignment.tracked_samples import samples_table, step_histograms
from alignment.wandb_writer import Mode, WandbWriter, forget_failed_start, has_credentials, open_wandb


class Tracker:
    """Hands the run's items to its writers. Without any it does nothing.

    `sample_prompts`: prompts of which a table shows every response.
    """

    def __init__(self, run: RunFolder, writers: Sequence[Writer], sample_prompts: int) -> None:
        self._run, self._writers, self._sample_prompts = run, list(writers), sample_prompts

    def catch_up(self, until: int) -> None:
        """What metrics.jsonl holds of the run's own RS steps up to `until`: those beyond it are done again.

        Another run's, which came with `resume.from`, were told there.
        """
        with _said():
            for record in self._run.read_metrics() if self._writers else ():
                told = record.get("kind") in ("step", "validation") and "run_id" not in record
                if told and record["step"] <= until:
                    self._log(record)

    def log_step(self, record: Mapping[str, Any]) -> None:
        """A "step" record, and histograms of its rollouts."""
        self._log(record)

    def log_validation(self, record: Mapping[str, Any]) -> None:
        """A "validation" record, and responses of the RS step that it follows."""
        self._log(record)

    def log_models(self, names: Mapping[int, tuple[str, ...]] | None = None) -> None:
        """The reward models that the run uses, and its checkpoints; `names` are aliases of those of some RS steps."""
        with _said():
            for model in [*reward_models(self._run), *checkpoints(self._run, names or {})] if self._writers else ():
                self._write(model)

    def alert(self, alarm: Alarm) -> None:
        """An alarm, once."""
        title = f"RS step {alarm.step}: {alarm.who} does not follow the reward"
        self._write(Alert(f"alarm {alarm.step} {alarm.who}", title, alarm.text))

    def log_summary(self, report: Mapping[str, Any]) -> None:
        """The report's result, as `evaluation/win_rate` and so on."""
        keys = ("evaluation", "reward_model", "judge", "seconds", "checkpoint")
        values = {k: v for key in keys for k, v in _flat(key, report[key])}
        if "promotion" in report:
            values["promotion/verdict"] = report["promotion"]["verdict"]
        self._write(Summary(values))

    def close(self, *, failed: bool) -> None:
        """Close all writers."""
        for writer in self._writers:
            try:
                writer.close(failed=failed)
            except Exception as error:  # of many types, a time-out above all
                _say(writer.name, f"{_one_line(error)}; what was not written elsewhere is in {self._run.path}")

    def _log(self, record: Mapping[str, Any]) -> None:
        with _said():
            item = Record(record["kind"], record["step"], points(record))
            self._write(item, lambda: self._with_rollouts(item))

    def _with_rollouts(self, item: Record) -> Record:
        """The record with what the files of its RS step have to show."""
        path = self._run.rollouts_file(item.step)
        if item.kind == "step":
            return replace(item, histograms=step_histograms(path))
        table = samples_table(path, self._sample_prompts)
        return replace(item, tables={SAMPLES: table} if table else {})

    def _write(self, item: Item, whole: Callable[[], Item] | None = None) -> None:
        """Gives the item to each writer that has not got it; `whole` makes what is dear to make of it.

        The first failure of a writer is told and ends it, unless a model cannot be referred to.
        """
        for writer in tuple(self._writers):
            try:
                if not writer.has(item):
                    writer.write(whole() if whole else item)
            except Exception as error:  # of many types; none of them may stop a run
                if isinstance(item, StoredModel):
                    _say(writer.name, f"{_one_line(error)}; {item.name} does not stand there")
                    continue
                _say(writer.name, f"{_one_line(error)}; the run goes on without {writer.name}")
                self._writers.remove(writer)


@contextlib.contextmanager
def tracked(
    run: RunFolder,
    *,
    mode: Mode,
    project: str,
    sample_prompts: int,
    tensorboard: bool,
    config: Mapping[str, Any],
    until: int = sys.maxsize,
) -> Iterator[Tracker]:
    """Opens the run's writers for the time of the body, and catches up with its records up to RS step `until`.

    W&B's `auto` is online where an API key is configured (WANDB_API_KEY or a netrc entry), else offline: then
    `wandb sync <run>/wandb/offline-run-*` uploads it later. If W&B does not answer, the run is tracked
    offline. `disabled` does not import wandb. Raises nothing of a writer's.
    """
    wandb_run = None if mode == "disabled" else _open_wandb(run.path, mode, project, config)
    tracker = Tracker(
        run, [w for w in (wandb_run, _open_tensorboard(run.path) if tensorboard else None) if w], sample_prompts
    )
    try:
        tracker.catch_up(until)
        yield tracker
    finally:
        tracker.close(failed=sys.exc_info()[0] is not None)


def _open_wandb(folder: Path, mode: Mode, project: str, config: Mapping[str, Any]) -> WandbWriter | None:
    """The W&B run, online or offline; None where even the latter fails."""
    online = mode in ("auto", "online") and _has_credentials()
    if mode == "online" and not online:
        _say(
            "W&B", "wandb.mode is online but no API key is configured (set WANDB_API_KEY or run `wandb login`): offline"
        )
    if online:
        try:
            return open_wandb(folder.name, "online", project, config, folder)
        except Exception as error:  # of many types: no network, a refused key, a quota
            _say("W&B", f"{_one_line(error)}; the run is tracked offline")
            forget_failed_start()
    try:
        return open_wandb(folder.name, "offline", project, config, folder)
    except Exception as error:  # of many types: no wandb, no disk
        _say("W&B", f"{_one_line(error)}; the run goes on without W&B")
        return None


def _open_tensorboard(folder: Path) -> TensorboardWriter | None:
    try:
        return TensorboardWriter(folder / "tensorboard")
    except ImportError:
        remedy = "pip install -r requirements-tensorboard.txt"
        _say("TensorBoard", f"tensorboard.enabled is true and the package is not installed ({remedy}): not written")
    except Exception as error:  # of many types: no disk, a protobuf of another version
        _say("TensorBoard", f"{_one_line(error)}; the run goes on without TensorBoard")
    return None


def _has_credentials() -> bool:
    try:
        return has_credentials()
    except (netrc.NetrcParseError, OSError, ValueError, RuntimeError) as error:  # also WANDB_BASE_URL, and no home
        _say("W&B", f"cannot read the netrc file ({type(error).__name__}): no API key taken from it")
        return False


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """An error of the run's files, or of what they hold, is said, and left to whoever needs them."""
    try:
        yield
    except Exception as error:  # of many types: a record of an older version, a manifest that lacks a key
        _say("tracking", _one_line(error))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Nested dicts as `a/b/c`; an interval as `…/low` and `…/high`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}/{key}", inner)
    elif isinstance(value, list | tuple):
        yield from zip((f"{prefix}/low", f"{prefix}/high"), value, strict=False)
    else:
        yield prefix, value


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _say(who: str, text: str) -> None:
    print(f"{who}: {text}", file=sys.stderr, flush=True)
