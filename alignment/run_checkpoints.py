"""Checkpoints of a run under s3://, each sent, fetched and removed as one thing.

DONE is sent last and removed first: what has one is whole. Manifests are compared, never names alone.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from alignment.atomic_files import disk_errors
from alignment.errors import CheckpointError, DataError, StorageConflict, StorageError
from alignment.s3_folders import pull_folder, push_folder
from alignment.s3_objects import delete_objects, list_objects, read_bytes, write_bytes
from alignment.s3_unfinished import abort_uploads

TRIES = 4
"""Of sending a checkpoint which somebody else writes too."""

Note = Callable[[str], None]


def whole_ones(names: Iterable[str]) -> set[str]:
    """Of the names of a run's objects, relative to it, those of its finished checkpoints."""
    parts = [name.split("/") for name in names]
    return {p[1] for p in parts if len(p) == 3 and p[0] == "checkpoints" and p[2] == "DONE"}


def is_same(run_uri: str, folder: Path) -> bool:
    """Whether S3 holds the checkpoint of a folder whole, and no other one of its name."""
    found, own = read_bytes(f"{run_uri}/checkpoints/{folder.name}/DONE"), folder / "DONE"
    return found is not None and own.is_file() and own.read_bytes() == found[0]


def send_checkpoint(run_uri: str, folder: Path, *, may_write: Callable[[], None], on_note: Note) -> bool:
    """Send a finished checkpoint and its manifest for the lineage; whether S3 holds it now, which a pruned one is not.

    `may_write` raises StorageConflict unless the run is this process's; it is asked right before DONE. What another
    process sent under this name is replaced then: it was written by one that had lost the run.
    Raises StorageConflict, StorageError.
    """
    uri = f"{run_uri}/checkpoints/{folder.name}"
    for _ in range(TRIES):
        try:
            done = (folder / "DONE").read_bytes()
            _send_files(run_uri, folder, done, may_write, on_note)
        except (FileNotFoundError, DataError):
            if (folder / "DONE").exists():
                raise
        may_write()
        if not (folder / "DONE").exists():  # pruned while it was sent: what came after it is whole
            remove_checkpoint(run_uri, folder.name)
            return False
        try:
            write_bytes(f"{uri}/DONE", done, if_absent=True)
            return True
        except StorageConflict:
            found = read_bytes(f"{uri}/DONE")
            if found is not None and found[0] == done:
                return True
    may_write()
    raise StorageConflict(f"{uri} is written by another process again and again: stop it, and resume")


def _send_files(run_uri: str, folder: Path, done: bytes, may_write: Callable[[], None], on_note: Note) -> None:
    """All but DONE, after what a writer left that was lost before it came to DONE, or after it had lost the run."""
    uri = f"{run_uri}/checkpoints/{folder.name}"
    found = read_bytes(f"{uri}/DONE")
    if found is not None and found[0] != done:
        may_write()
        on_note(f"{uri} was sent by a process that had lost the run: it is replaced")
        delete_objects([f"{uri}/DONE"])
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    left = [stored.uri for stored in list_objects(uri + "/") if stored.uri.removeprefix(f"{uri}/") not in files]
    delete_objects(left)
    push_folder(folder, uri, last=(), only=lambda name: name != "DONE", on_note=on_note)
    manifest = (folder / "manifest.json").read_bytes()
    if "rollouts" in json.loads(manifest):  # a run of RS steps: its lineage must not come after its checkpoint
        write_bytes(f"{run_uri}/lineage/{folder.name}.json", manifest)


def fetch_checkpoint(run_uri: str, place: Path, on_note: Note) -> bool:
    """Fetch a finished checkpoint unless its folder is there; false where it was removed or replaced meanwhile.

    It appears by a rename and whole, so that a killed fetch leaves none that looks damaged. Raises StorageError.
    """
    from models.checkpoints import read_manifest

    uri = f"{run_uri}/checkpoints/{place.name}"
    if place.exists():
        return True
    done = read_bytes(f"{uri}/DONE")
    if done is None:
        return False
    staging = place.with_name(f".{place.name}.fetched-{hashlib.sha256(done[0]).hexdigest()[:12]}")
    try:
        pull_folder(uri, staging, on_note=on_note)
        read_manifest(staging, name=place.name)
    except (StorageError, CheckpointError):
        if read_bytes(f"{uri}/DONE") == done:
            raise
        shutil.rmtree(staging, ignore_errors=True)
        return False
    with disk_errors(place):
        staging.rename(place)
    return True


def remove_checkpoint(run_uri: str, name: str) -> None:
    """DONE first, so that a half-removed folder is no checkpoint; unfinished uploads, which are paid for, too."""
    uri = f"{run_uri}/checkpoints/{name}"
    delete_objects([f"{uri}/DONE"])
    delete_objects([stored.uri for stored in list_objects(uri + "/")])
    abort_uploads(uri)
