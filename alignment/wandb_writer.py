"""Weights & Biases: one W&B run per run, whose id is the run's, opened by as many processes as the run has.

W&B counts its own steps anew in each offline process, so all is drawn against `rs/step`. What has been logged is known
by marks (`<folder>/wandb/logged.txt`), and after a process that was killed by what is really there: W&B puts the
history on the disk every few seconds, and a killed process loses the last of it. Of an offline part its own file tells,
of a run that was online throughout the server does, by the number of rows that it holds.
"""

import contextlib
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from alignment.tracked_items import Alert, Histogram, Item, Record, StoredModel, Summary
from alignment.tracked_marks import Marks, Part
from alignment.tracked_metrics import FAMILIES, STEP
from alignment.wandb_files import history

Mode = Literal["auto", "online", "offline", "disabled"]

INIT_SECONDS = 30.0
"""Seconds that W&B's server may take to answer at the start."""
FINISH_SECONDS = 60.0
"""Seconds that the upload of what is left may take at the end; the data also lie on the disk."""
OFFLINE = "offline-run-"
"""How W&B begins the name of an offline run's folder."""


class WandbWriter:
    """Writes into the W&B run of this process, which is online or offline."""

    name = "W&B"

    def __init__(self, run: Any, folder: Path) -> None:
        part = Path(run.dir).parent.name
        self._run = run
        self._marks = Marks(folder / "logged.txt", lambda part: lost_marks(part, folder))
        # Rows that the server holds, where there are none but those: then the first ones of the run are there.
        whole = not part.startswith(OFFLINE) and not any(
            p.name.startswith(OFFLINE) or not p.name for p in self._marks.parts
        )
        self._held = run.starting_step if whole else None
        self._asked: set[str] = set()
        self._marks.begin(part)

    def has(self, item: Item) -> bool:
        """Whether the item was logged; records must be asked for in the run's order, from its first."""
        if isinstance(item, Record) and self._held is not None:
            again = item.mark in self._asked
            self._asked.add(item.mark)
            return again or len(self._asked) <= self._held
        return bool(item.mark) and item.mark in self._marks

    def write(self, item: Item) -> None:
        """Log the item."""
        match item:
            case Record():
                self._run.log({STEP: item.step, **item.points, **_media(item)})
            case Alert():
                self._run.alert(title=item.title, text=item.text)
            case Summary():
                self._run.summary.update(dict(item.values))
            case StoredModel():
                self._refer(item)
        if item.mark:
            self._marks.add(item.mark)

    def close(self, *, failed: bool) -> None:
        """Finish the W&B run. Raises where not all could be uploaded in time; it lies in the folder."""
        self._run.finish(exit_code=int(failed))
        self._marks.end()

    def _refer(self, model: StoredModel) -> None:
        """An artifact whose entries lead to where the files lie."""
        artifact, aliases = _artifact(model), list(model.aliases)
        if model.is_input:
            # What `use_artifact` calls, which then waits for the server without a limit, and refuses to work offline.
            self._run._log_artifact(artifact, aliases=aliases, is_user_created=True, use_after_commit=True)
        else:
            self._run.log_artifact(artifact, aliases=aliases)


def lost_marks(part: Part, folder: Path) -> set[str]:
    """What a killed process marked and may not have put on the disk: a model, which may well be told twice, and of an
    offline process each record that its file lacks.

    A part whose folder is gone was synced and removed: it keeps its records.
    """
    if part.has_ended:
        return set()
    models = {mark for mark in part.marks if mark.startswith("model ")}
    files = list((folder / part.name).glob("run-*.wandb")) if part.name.startswith(OFFLINE) else []
    if not files:
        return models
    there = {_mark(row) for row in history(files[0])}
    return models | {mark for mark in part.marks if mark.split()[0] in ("step", "validation") and mark not in there}


def _mark(row: Mapping[str, Any]) -> str:
    kind = "validation" if any(name.startswith("val_rollouts/") for name in row) else "step"
    return f"{kind} {row.get(STEP)}"


def _media(record: Record) -> dict[str, Any]:
    import wandb

    tables = {
        name: wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        for name, table in record.tables.items()
    }
    return tables | {name: _histogram(found) for name, found in record.histograms.items()}


def _histogram(found: Histogram) -> Any:
    import numpy as np
    import wandb

    return wandb.Histogram(np_histogram=(np.asarray(found.counts), np.asarray(found.edges)))


def _artifact(model: StoredModel) -> Any:
    import wandb

    artifact = wandb.Artifact(model.name, type=model.kind, metadata=dict(model.details))
    for name, file in model.files.items():
        for entry in artifact.add_reference(file.uri, name=name, checksum=False):
            entry.digest, entry.size = file.sha256, file.bytes
    return artifact


def open_wandb(
    run_id: str, mode: Literal["online", "offline"], project: str, config: Mapping[str, Any], folder: Path
) -> WandbWriter:
    """The W&B run `run_id` in `<folder>/wandb`, begun or gone on with. Raises whatever W&B does.

    Beside the stream and the config it sends the host's name and W&B's system metrics: no command line, no packages, no
    code.
    """
    import wandb

    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    wandb.setup(wandb.Settings(silent=True))  # the log-in speaks before the run's own settings hold
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,
        x_save_requirements=False,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
    )
    run = wandb.init(
        id=run_id,
        name=run_id,
        project=project,
        config=dict(config),
        dir=str(folder),
        resume="allow",
        mode=mode,
        settings=settings,
    )
    run.define_metric(STEP)
    for family in FAMILIES:
        run.define_metric(f"{family}/*", step_metric=STEP)
    return WandbWriter(run, folder / "wandb")


def forget_failed_start() -> None:
    """Ends W&B's service process, which otherwise holds the run id of the failed start as in use."""
    with contextlib.suppress(Exception):  # what it could say has been said
        import wandb

        wandb.teardown()


def has_credentials() -> bool:
    """Whether W&B would find a key for its server without asking. Reads no more than that. Raises OSError, and
    NetrcParseError for a netrc file that cannot be read."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return path.is_file() and netrc.netrc(path).authenticators(host) is not None
