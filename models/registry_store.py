"""Where a registry is written: small files below <root>/registry, of a folder or under s3://."""

import contextlib
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alignment.atomic_files import disk_errors, write_text
from alignment.errors import ModelError, StorageConflict
from alignment.links import link_out
from alignment.s3 import is_s3
from alignment.s3_objects import list_objects, read_bytes, write_bytes
from alignment.workspace import child


def place_of(root: str, *parts: str) -> str:
    """The path or URI of a registry's file."""
    return child(root, "registry", *parts)


def list_names(root: str) -> list[str]:
    """Names of all files of a registry, below its place."""
    place = place_of(root)
    if is_s3(place):
        return [stored.uri.removeprefix(f"{place}/") for stored in list_objects(f"{place}/")]
    return [str(path.relative_to(place)) for path in Path(place).rglob("*") if path.is_file()]


def read_file(place: str) -> bytes | None:
    """A file's bytes; None where there is none."""
    if is_s3(place):
        found = read_bytes(place)
        return found[0] if found else None
    return Path(place).read_bytes() if Path(place).is_file() else None


def write_new(place: str, data: bytes) -> None:
    """Write a file that must not be there yet. Raises StorageConflict where it is, DiskError, StorageError."""
    if is_s3(place):
        write_bytes(place, data, if_absent=True)
        return
    path = Path(place)
    staging = path.with_name(f".{path.name}-{uuid.uuid4().hex}")  # nobody else's: a link shares its bytes
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.write_bytes(data)
        try:
            os.link(staging, path)  # fails where the name is taken, and shows no half-written file
        except FileExistsError:
            raise StorageConflict(f"{path} is taken") from None
        finally:
            staging.unlink()


def read_alias(place: str) -> tuple[int | None, Any]:
    """The version that an alias means, None where it means none; and what its move has to show."""
    if is_s3(place):
        from alignment.s3_pointers import read_pointer

        pointer = read_pointer(place)
        return (_number(place, pointer.value), pointer.token) if pointer else (None, None)
    found = read_file(place)
    version = _number(place, found.decode(errors="replace")) if found else None
    return version, version


def _number(place: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ModelError(f"{place} is no alias of a registry: it says {text[:20]!r}; remove it, then promote again")
    return int(text)


def move_alias(place: str, version: int, token: Any) -> None:
    """Raises StorageConflict where the alias was moved since `token` was read."""
    if is_s3(place):
        from alignment.s3_pointers import move_pointer

        move_pointer(place, str(version), token)
        return
    with _locked(Path(place)):
        if read_alias(place)[1] != token:
            raise StorageConflict(f"{place} was moved by another process: look at it, then promote again")
        write_text(Path(place), str(version))


def copy_folder(uri: str, folder: Path, on_note: Callable[[str], None], *, last: Sequence[str]) -> None:
    """Copy a model's folder, files named `last` at the end. Raises ModelError where it is there no longer."""
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    if is_s3(uri) and list_objects(f"{uri}/"):
        from alignment.s3_folders import pull_folder

        pull_folder(uri, folder, last=last, on_note=on_note)
    elif not is_s3(uri) and Path(uri).is_dir():
        if link := link_out(Path(uri)):
            raise ModelError(f"{link} leads out of {uri}: what is registered must lie in its own folder")
        with disk_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(uri, folder)
    else:
        raise ModelError(f"{uri} is there no longer: what is registered was moved or removed")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
