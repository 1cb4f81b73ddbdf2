"""Files written whole or not at all, and errors of the disk as messages with a remedy.

JSON has no NaN and no infinity: such a number is written as null, its key kept, so that every reader can
parse the file and sees that the value is missing.
"""

import contextlib
import errno
import json
import math
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from alignment.errors import DiskError

MOVE = "or go on elsewhere by a new run: --set resume.from=FOLDER_OF_THIS_RUN --set run.root=DIR"
REMEDIES = {
    errno.ENOSPC: f"free some space and resume the run, {MOVE}",
    errno.EDQUOT: f"your disk quota is used up: free some space and resume the run, {MOVE}",
    errno.EACCES: f"give yourself the right to write there and resume the run, {MOVE}",
    errno.EPERM: f"give yourself the right to write there and resume the run, {MOVE}",
    errno.EROFS: f"the disk is mounted read-only: mount it for writing and resume the run, {MOVE}",
}
_RUST_IO_ERROR = re.compile(r"\(os error (\d+)\)")


def write_json(path: Path, obj: Any) -> None:
    """Writes plain JSON values, indented, whole or not at all. Raises DiskError."""
    write_atomically(path, lambda file: file.write((json_text(obj, indent=2) + "\n").encode()))


def write_text(path: Path, text: str) -> None:
    """Writes a text file, UTF-8, whole or not at all. Raises DiskError."""
    write_atomically(path, lambda file: file.write(text.encode()))


def json_text(obj: Any, indent: int | None = None) -> str:
    """JSON as every parser reads it: NaN and infinities become null (see the module's docstring)."""
    return json.dumps(_finite(obj), indent=indent, allow_nan=False)


def _finite(obj: Any) -> Any:
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {key: _finite(value) for key, value in obj.items()}
    return [_finite(value) for value in obj] if isinstance(obj, list | tuple) else obj


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """`write` fills a temporary sibling, which then takes the place of `path`. Raises DiskError."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle_files(folder: Path) -> None:
    """Flush every file of a folder to disk, and give other users what the umask allows.

    transformers and safetensors write weights for their owner alone, which a server of another user cannot read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
            with open(path, "rb") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a system error of the body into a DiskError that names `path` and the remedy.

    safetensors and tokenizers report theirs in types of their own, with Rust's text: "… (os error 28)".
    """
    try:
        yield
    except Exception as error:
        rust = _RUST_IO_ERROR.search(str(error))
        if not isinstance(error, OSError) and rust is None:
            raise
        number = error.errno if isinstance(error, OSError) else int(rust[1]) if rust else None
        reason = os.strerror(number) if number else str(error)
        remedy = REMEDIES.get(number or 0, "check run.root and the disk behind it, then resume the run")
        raise DiskError(f"cannot write {path}: {reason}; {remedy}") from error
