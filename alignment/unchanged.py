"""Whether what a run reads when it goes on is what it was: damage must end in a message, not in other numbers.

A checkpoint's manifest vouches for the prompts, the judge and the records before it, its own config for the run's.
Before the first checkpoint nothing does. What a run never reads again, rollouts of finished steps and manifests of old
checkpoints, is looked at by `python -m alignment.lineage RUN --verify` alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.config import Config, parse_config
from alignment.continuation import SERVING, differences, flat
from alignment.errors import AlignmentError, ConfigError, DataError
from alignment.preparation import NAMES
from alignment.provenance import metrics_digest
from alignment.run_folder import RunFolder
from alignment.scorers_file import checked_scorers
from alignment.types import JudgeRef, RewardModelRef
from models.checkpoints import finished, read_manifest, sha256_file

REMEDY = "put it back from a copy (a new run of the same config writes the same one), then resume the run"
_SERVING = {f"reward.{key}" for key in SERVING}


def read_run_config(run: RunFolder) -> Config:
    """The config of a run's folder. Raises DataError, which names the file."""
    try:
        return parse_config(run.config.read_text())
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise DataError(f"{run.config} cannot be read ({error}): {REMEDY}") from error


def check_scorers(run: RunFolder, reward: RewardModelRef, judge: JudgeRef) -> None:
    """Raise DataError where scorers.json is not what the run's tasks were told of its reward model and judge."""
    try:
        found = checked_scorers(run)
    except DataError as error:
        raise DataError(f"{run.scorers} cannot be read ({error}): {REMEDY}") from error
    ours = RewardModelRef(**found["reward_model"])
    theirs = JudgeRef(**{**found["judge"], "uri": run.local(found["judge"]["uri"])})
    if (ours, theirs) != (reward, judge):
        raise DataError(
            f"{run.scorers} is damaged or was changed: it names {ours} and {theirs}, and this run began with {reward} "
            f"and {judge}: {REMEDY}"
        )


def check_unchanged(config: Config, run: RunFolder, checkpoint: Path) -> None:
    """Raise DataError where the run's files are not those that `checkpoint`, from which it goes on, was made with."""
    manifest = read_manifest(checkpoint)
    is_own = manifest["run_id"] == run.path.name
    for path, digest in _vouched_for(run, manifest, is_own=is_own):
        if not path.is_file() or sha256_file(path) != digest:
            raise DataError(f"{path} is missing or damaged: its sha256 is not the one in {checkpoint}: {REMEDY}")
    _check_records(run, manifest, checkpoint)
    if is_own:
        _check_config(config, run, checkpoint)


def _vouched_for(run: RunFolder, manifest: Mapping[str, Any], *, is_own: bool) -> list[tuple[Path, str]]:
    """Files with their sha256. What another run mixed in is not this one's business."""
    prompts = manifest.get("data", {})
    names = [name for name in prompts if is_own or name.removesuffix(".jsonl") in NAMES]
    judge = manifest.get("judge", {}).get("files", {})
    return [
        *((run.prompts / name, prompts[name]) for name in names),
        *((run.path / "judge" / name, digest) for name, digest in judge.items()),
    ]


def _check_config(config: Config, run: RunFolder, checkpoint: Path) -> None:
    """How a reward model is served, and where, may be another each time."""
    theirs, ours = (
        {key: value for key, value in flat(one.model_dump(mode="json")).items() if key not in _SERVING}
        for one in (parse_config((checkpoint / "run_config.json").read_text()), config)
    )
    different = differences(theirs, ours)
    if different:
        raise DataError(f"{run.config} is not what {checkpoint} was made with: {', '.join(different)}: {REMEDY}")


def _check_records(run: RunFolder, manifest: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise DataError where metrics.jsonl says other things of the steps behind a checkpoint than when it was made."""
    if _vouches(run, manifest):
        return
    older = [folder for folder in finished(checkpoint.parent) if folder < checkpoint]
    whole = next((folder for folder in reversed(older) if _vouches(run, _manifest(folder))), None)
    raise DataError(
        f"{run.metrics} is not what it was when {checkpoint} was made: records are missing, damaged or changed. "
        + _remedy(checkpoint, older, whole)
    )


def _remedy(checkpoint: Path, older: Sequence[Path], whole: Path | None) -> str:
    if whole is None:
        return "Put it back from a copy, or start a new run"
    doomed = [str(folder) for folder in (*older, checkpoint) if folder > whole]
    return f"Those before {whole} are whole: remove {' and '.join(doomed)} and resume to go on from there"


def _vouches(run: RunFolder, manifest: Mapping[str, Any]) -> bool:
    """Whether the records up to a checkpoint are those that its manifest knows; one without a digest knows none."""
    digest = manifest.get("metrics_sha256")
    return digest is None or metrics_digest(run, manifest["step"]) == digest


def _manifest(folder: Path) -> Mapping[str, Any]:
    try:
        return read_manifest(folder)
    except AlignmentError:
        return {"metrics_sha256": "", "step": 0}
