"""Checkpoints: a Hugging Face folder plus optimizer state, a manifest with sha256 sums, and DONE written last.

    step-000010/
      model.safetensors config.json tokenizer…   loadable by transformers as it is
      optimizer/rank-00000.safetensors           AdamW moments (and fp32 masters under ZeRO), one file a rank
      run_config.json                            the resolved config
      manifest.json                              step, ranks, files with sha256 and size, provenance
      DONE                                       sha256 of the manifest

A folder is written beside its place and renamed: one that has no DONE never was a checkpoint. It never changes
afterwards; which checkpoint is the best is told by the run's validations, not by it. Nothing is pickled: reading
a checkpoint executes nothing. A checkpoint that fails its check is refused, never passed over in silence: the
error names the file, the reason, and the newest one that is whole.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alignment.atomic_files import disk_errors, settle_files, sync_folder, write_text
from alignment.errors import CheckpointError, DiskError
from alignment.foreign_json import parse_json
from alignment.types import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""Version of the layout above; another one is refused."""

MOST_STEPS = 10**9
"""Beyond what any run has: a folder's name has room for as many."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Step = Annotated[int, Field(ge=0, lt=MOST_STEPS)]
FileName = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=255)]


class FileEntry(BaseModel):
    """What a manifest says of a file."""

    model_config = ConfigDict(strict=True)

    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]


class ManifestShape(BaseModel):
    """What readers rely on in a manifest, which may come from anywhere; it holds more (see `alignment.provenance`)."""

    model_config = ConfigDict(strict=True)

    format: Literal[1]
    step: Step
    ranks: Annotated[int, Field(ge=1)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    run_id: str
    parent: dict[str, Any]
    weights_sha256: Sha256
    files: dict[FileName, FileEntry]


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of an RS step lives."""
    return checkpoints / f"step-{step:06d}"


def staging_folder(checkpoints: Path, step: int) -> Path:
    """Where a checkpoint is put together before it gets its name."""
    return checkpoints / f".step-{step:06d}.partial"


@contextlib.contextmanager
def removed_if_failed(staging: Path) -> Iterator[None]:
    """Removes a staged folder when the body fails: half a checkpoint on a full disk helps nobody."""
    try:
        yield
    except (DiskError, CheckpointError):
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_optimizer_state(staging: Path, rank: int, state: "Mapping[str, Tensor]") -> None:
    """One rank's optimizer tensors. Raises DiskError."""
    from safetensors.torch import save_file

    path = staging / "optimizer" / f"rank-{rank:05d}.safetensors"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)


def read_optimizer_state(checkpoint: Path, rank: int) -> "dict[str, Tensor]":
    """One rank's optimizer tensors. Raises CheckpointError where the file is missing or damaged."""
    from safetensors.torch import load_file

    path = checkpoint / "optimizer" / f"rank-{rank:05d}.safetensors"
    try:
        state: dict[str, Tensor] = load_file(path)
    except Exception as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return state


def seal(checkpoints: Path, step: int, *, config: Mapping[str, Any], details: Mapping[str, Any]) -> Checkpoint:
    """Give a staged folder its manifest, DONE and name; returns its reference.

    `details` go into the manifest: ranks, zero_stage, run_id, parent and more. Raises DiskError.
    """
    staging, final = staging_folder(checkpoints, step), checkpoint_folder(checkpoints, step)
    with disk_errors(final):
        (staging / "run_config.json").write_text(json.dumps(config, indent=2))
        files = sorted(p for p in staging.rglob("*") if p.is_file())
        # The disk writes while cores add up: each would wait for the other otherwise.
        with ThreadPoolExecutor(max_workers=4) as pool:
            settled = pool.submit(settle_files, staging)
            digests = dict(zip(files, pool.map(sha256_file, files), strict=True))
            settled.result()
        sums = {str(p.relative_to(staging)): {"sha256": digests[p], "bytes": p.stat().st_size} for p in files}
        manifest = {"format": FORMAT, "step": step, "weights_sha256": _weights_digest(sums), "files": sums, **details}
        text = json.dumps(manifest, indent=2)
        write_text(staging / "manifest.json", text)
        write_text(staging / "DONE", hashlib.sha256(text.encode()).hexdigest())
        staging.rename(final)
        sync_folder(checkpoints)
    return _reference(final, manifest)


def read_manifest(folder: Path, *, name: str | None = None) -> dict[str, Any]:
    """The manifest of a finished checkpoint. Raises CheckpointError where it is missing or was changed.

    `name` is the checkpoint's where the folder has another: a copy's.
    """
    try:
        done, text = (folder / "DONE").read_text(), (folder / "manifest.json").read_text()
        if hashlib.sha256(text.encode()).hexdigest() != done.strip():
            raise CheckpointError(
                f"{folder / 'manifest.json'} does not match DONE: it was changed after it was written"
            )
        manifest = parse_json(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a finished checkpoint: {error}") from error
    return _checked(manifest, folder, name or folder.name)


def verify(folder: Path, *, name: str | None = None) -> Checkpoint:
    """A checkpoint whose every file matches its manifest. Raises CheckpointError naming the first that does not.

    `name` is the checkpoint's where the folder has another: a copy's.
    """
    manifest = read_manifest(folder, name=name)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not _lies_in(path, folder):
            raise CheckpointError(f"{folder / 'manifest.json'} names {name}, which lies outside the checkpoint")
        if not path.is_file() or path.stat().st_size != expected["bytes"] or sha256_file(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is missing or damaged: its size or sha256 is not the manifest's")
    unlisted = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - set(manifest["files"])
    if unlisted - {"manifest.json", "DONE"}:
        raise CheckpointError(f"{folder} holds files that its manifest does not list: {', '.join(sorted(unlisted))}")
    return _reference(folder, manifest)


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, is of a folder. Raises CheckpointError for one that no file system takes."""
    try:
        path.is_file()
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # a name that is too long; links that lead to each other
        raise CheckpointError(f"{path} cannot be looked at: {error}") from error


def finished(checkpoints: Path) -> list[Path]:
    """Folders of finished checkpoints, oldest first; unverified."""
    return sorted(p.parent for p in checkpoints.glob("step-*/DONE"))


def last_checkpoint(checkpoints: Path) -> Checkpoint | None:
    """The newest finished checkpoint, verified; None where there is none. Raises CheckpointError."""
    folders = finished(checkpoints)
    newest = max(checkpoints.glob("step-*"), default=None)
    # What pruning leaves behind is older than a finished one: this one has lost its DONE in some other way.
    if newest is not None and newest not in folders:
        folders.append(newest)
    return _verified(folders[-1], folders) if folders else None


def best_checkpoint(
    checkpoints: Path, validations: Mapping[int, float], failed: int | None = None
) -> Checkpoint | None:
    """The checkpoint with the highest validation reward, else the newest one, verified; None where there is none.

    `validations` maps RS steps to rewards. Checkpoints of the RS step `failed` and after it are passed over where
    there are any before.
    """
    folders = finished(checkpoints)
    good = before(folders, failed)
    best = _by_validation(good, validations) or (good[-1:] if failed is not None else [])
    return _verified(best[0], folders) if best else last_checkpoint(checkpoints)


def before(folders: Sequence[Path], failed: int | None) -> list[Path]:
    """Those of checkpoint folders, oldest first, that are of RS steps before `failed`; all where none failed."""
    return [f for f in folders if failed is None or f.name < checkpoint_folder(f.parent, failed).name]


def _verified(folder: Path, folders: Sequence[Path]) -> Checkpoint:
    with _offering_another(folder, folders):
        return verify(folder)


@contextlib.contextmanager
def _offering_another(folder: Path, folders: Sequence[Path]) -> Iterator[None]:
    """Adds to an error of `folder` the newest of the other `folders` that is whole."""
    try:
        yield
    except CheckpointError as error:
        whole = next((other for other in reversed(folders) if other != folder and _is_whole(other)), None)
        remedy = f"{whole} is whole: remove {folder} and resume to go on from there"
        raise CheckpointError(
            f"{error}. {remedy if whole else f'No other checkpoint of {folder.parent} is whole: start a new run'}"
        ) from error


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True


def newest_checkpoint(checkpoints: Path) -> Checkpoint | None:
    """The newest finished checkpoint as its manifest says, its files not read; None where there is none."""
    folders = finished(checkpoints)
    if not folders:
        return None
    with _offering_another(folders[-1], folders):
        return _reference(folders[-1], read_manifest(folders[-1]))


def prune(
    checkpoints: Path,
    *,
    keep_last: int,
    keep_best: int,
    validations: Mapping[int, float] | None = None,
    failed: int | None = None,
) -> list[Path]:
    """Remove all but the newest `keep_last` and the `keep_best` best by validation; returns what was removed.

    `validations` maps RS steps to rewards; `failed` as in `kept_folders`. Nothing is removed before the newest one has
    been verified: raises CheckpointError where it is not whole.
    """
    folders = finished(checkpoints)
    kept = kept_folders(folders, keep_last=keep_last, keep_best=keep_best, validations=validations, failed=failed)
    doomed = [folder for folder in folders if folder not in kept]
    if doomed:
        verify(folders[-1])
    for folder in doomed:
        (folder / "DONE").unlink()  # first, so that a half-removed folder is no checkpoint
        shutil.rmtree(folder)
    return doomed


def kept_folders(
    folders: Sequence[Path],
    *,
    keep_last: int,
    keep_best: int,
    validations: Mapping[int, float] | None = None,
    failed: int | None = None,
) -> set[Path]:
    """Of checkpoint folders, oldest first, those that `prune` keeps; their names are all that is looked at.

    What the RS step `failed` left is kept beside what the run would keep without it.
    """
    good = before(folders, failed)
    return {*good[-keep_last:], *_by_validation(good, validations or {})[:keep_best], *folders[len(good) :]}


def sweep(checkpoints: Path) -> None:
    """Remove what killed writers left: half-written folders, and half-removed ones older than the newest checkpoint."""
    whole = finished(checkpoints)
    torn = [p for p in checkpoints.glob("step-*") if whole and p not in whole and p < whole[-1]]
    for folder in [*checkpoints.glob(".step-*"), *torn]:
        shutil.rmtree(folder)


def sha256_file(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """Digest of the weights of any model folder, as `weights_sha256` of a manifest gives it; raises CheckpointError."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"{folder} holds no safetensors: save it with safe_serialization, as transformers does")
    return _weights_digest({path.name: {"sha256": sha256_file(path)} for path in weights})


def _checked(manifest: Any, folder: Path, name: str) -> dict[str, Any]:
    """The manifest if it has the shape that readers rely on. Raises CheckpointError."""
    path = folder / "manifest.json"
    try:
        shape = ManifestShape.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        key = " ".join(".".join(str(part) for part in first["loc"]).split())[:80]
        raise CheckpointError(f"{path} was not written by this program: {key}: {first['msg']}") from error
    if name != checkpoint_folder(folder.parent, shape.step).name:
        raise CheckpointError(f"{path} is of RS step {shape.step}, which is not the folder's: it was renamed")
    if _weights_digest(manifest["files"]) != shape.weights_sha256:
        raise CheckpointError(f"{path} was not written by this program: weights_sha256 is not that of its files")
    checked: dict[str, Any] = manifest
    return checked


def _reference(folder: Path, manifest: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(uri=str(folder), sha256=str(manifest["weights_sha256"]), step=int(manifest["step"]))


def _by_validation(folders: Sequence[Path], validations: Mapping[int, float]) -> list[Path]:
    """Validated checkpoints by falling reward, the earlier of equals first."""
    steps = {folder: int(match[1]) for folder in folders if (match := re.fullmatch(r"step-(\d+)", folder.name))}
    validated = [folder for folder, step in steps.items() if step in validations]
    return sorted(validated, key=lambda folder: -validations[steps[folder]])


def _weights_digest(sums: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest for the weights: the file's own sha256, or that of the list of shards."""
    weights = [v["sha256"] for name, v in sorted(sums.items()) if name.endswith(".safetensors") and "/" not in name]
    return str(weights[0]) if len(weights) == 1 else hashlib.sha256("\n".join(weights).encode()).hexdigest()
