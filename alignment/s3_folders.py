"""Folders to S3 and back, so that whoever sees a folder's marker (DONE) sees all of the folder.

Small files go several at a time, large ones one after another in parallel parts. Files that are there already, by
size and sha256, are not sent again. Files named in `last` follow when all others are there; where something has changed
below a marker, the old marker goes first.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from alignment.atomic_files import disk_errors
from alignment.errors import DataError, StorageError
from alignment.links import link_out
from alignment.progress import TransferLines
from alignment.s3 import below, parse_uri
from alignment.s3_download import download_file, holds
from alignment.s3_objects import StoredObject, delete_objects, list_objects, with_sums
from alignment.s3_threads import THREADS, in_parallel, serialised
from alignment.s3_transfer import MULTIPART_BYTES, is_stored, read_fingerprint, upload_file

MARKERS = ("DONE",)
_TEMPORARY = re.compile(r"\..+-[0-9a-f]{32}|\..+\.partial")
"""Names of files that are being written: of `alignment.atomic_files` and of a download."""

Chosen = Callable[[str], bool]
"""Tells by its name, relative to the folder and with slashes, whether a file takes part."""


def push_folder(
    folder: Path,
    uri: str,
    *,
    last: Sequence[str] = MARKERS,
    only: Chosen | None = None,
    on_note: Callable[[str], None] | None = None,
) -> int:
    """Send a folder's files to below `uri` and return the bytes sent; what is there beside them stays.

    Links to files of the folder are followed, links to folders are not. `last` are file names, in whatever subfolder.
    Raises StorageError, and DataError for a file that cannot be read and for a link that leads out of the folder.
    """
    there = {entry.uri: entry.size for entry in list_objects(uri)}
    place = parse_uri(uri).uri
    names = [name for name in _names(folder) if only is None or only(name)]
    sizes = {name: _size(folder / name) for name in names}

    def differs(name: str) -> bool:
        target = below(place, name)
        return there.get(target) != sizes[name] or not is_stored(target, read_fingerprint(folder / name))

    others, markers = _split(names, last)
    new = _those(others, differs)
    if new:
        delete_objects(target for target in (below(place, name) for name in markers) if target in there)
    sent = {name: sizes[name] for name in new}
    lines = TransferLines(on_note or _silent, f"sending {folder.name}", sum(sent.values()))
    _transfer(sent, lambda name, done: upload_file(folder / name, below(place, name), on_bytes=done), lines.update)
    for name in markers:
        if new or differs(name):
            upload_file(folder / name, below(place, name))
            sent[name] = sizes[name]
    return sum(sent.values())


def pull_folder(
    uri: str,
    folder: Path,
    *,
    last: Sequence[str] = MARKERS,
    only: Chosen | None = None,
    on_note: Callable[[str], None] | None = None,
) -> int:
    """Fetch all objects below `uri` into a folder and return the bytes fetched; what is there beside them stays.

    Each file appears whole. An object whose name leads out of the folder is refused before anything is written. Raises
    StorageError, also where there is nothing, and DiskError.
    """
    listed = {_relative(entry, uri, folder): entry for entry in list_objects(uri)}
    if not listed:
        raise StorageError(f"{uri}: holds nothing; check the name")
    names = [name for name in listed if only is None or only(name)]
    stored = dict(zip(names, with_sums([listed[name] for name in names]), strict=True))
    others, markers = _split(names, last)
    new = _those(others, lambda name: not holds(folder / name, stored[name]))
    if new:
        for name in markers:
            with disk_errors(folder / name):
                (folder / name).unlink(missing_ok=True)
    sizes = {name: stored[name].size for name in new}
    lines = TransferLines(on_note or _silent, f"fetching {uri}", sum(sizes.values()))
    _transfer(sizes, lambda name, done: _fetch(stored[name], folder / name, done), lines.update)
    fetched = sum(sizes.values())
    for name in markers:
        if not holds(folder / name, stored[name]):
            _fetch(stored[name], folder / name, None)
            fetched += stored[name].size
    return fetched


def push_files(folder: Path, uri: str, names: Sequence[str]) -> None:
    """Send these files of a folder, by their names in it, as they are now; one that has gone meanwhile is left out.

    For folders in which others write: nothing else is looked at. Raises StorageError, DataError.
    """

    def send(name: str, done: Callable[[int], None] | None) -> None:
        try:
            upload_file(folder / name, below(uri, name), on_bytes=done)
        except DataError:
            if (folder / name).exists():
                raise

    sizes: dict[str, int] = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            sizes[name] = (folder / name).stat().st_size
    _transfer(sizes, send, lambda count: None)


def _fetch(stored: StoredObject, path: Path, on_bytes: Callable[[int], None] | None) -> None:
    # Not by the sum that was listed: a live writer may have replaced the object, and what is there now is verified too.
    download_file(stored.uri, path, on_bytes=on_bytes)


def _transfer(
    sizes: dict[str, int],
    one: Callable[[str, Callable[[int], None] | None], object],
    report: Callable[[int], None],
) -> None:
    """`one` on each name: small files side by side, then the large ones, whose parts go side by side."""
    done = serialised(report)
    in_parallel(lambda name: one(name, done), [name for name, size in sizes.items() if size < MULTIPART_BYTES])
    for name, size in sizes.items():
        if size >= MULTIPART_BYTES:
            one(name, done)


def _those(names: Sequence[str], true: Callable[[str], bool]) -> list[str]:
    """The names for which `true` says so, asked side by side; in their order."""
    with ThreadPoolExecutor(THREADS) as pool:
        return [name for name, chosen in zip(names, pool.map(true, names), strict=True) if chosen]


def _split(names: Sequence[str], last: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of ordinary files, and those of markers in the order of `last`."""
    markers = [name for marker in last for name in names if PurePosixPath(name).name == marker]
    return [name for name in names if name not in markers], markers


def _names(folder: Path) -> list[str]:
    """Names of the folder's files, relative and with slashes, sorted; not of those that are just being written."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; check the path")
    if link := link_out(folder):
        raise DataError(f"{link} leads out of {folder}: put a copy in its place, or remove it")
    files = (path for path in folder.rglob("*") if path.is_file() and not _TEMPORARY.fullmatch(path.name))
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _relative(entry: StoredObject, uri: str, folder: Path) -> str:
    """An object's name below `uri`. Raises StorageError for one that would be written outside of `folder`."""
    name = entry.uri.removeprefix(below(parse_uri(uri).uri, ""))
    parts = name.split("/")
    root = folder.resolve()
    if "" in parts:
        raise StorageError(f"{entry.uri}: its name has an empty part (//); delete that object, or fetch others alone")
    if any(part in (".", "..") or "\0" in part for part in parts) or not (root / name).parent.resolve().is_relative_to(
        root
    ):
        raise StorageError(f"{entry.uri}: its name leads out of {folder}; delete that object, or fetch others alone")
    return name


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; was it moved while it was sent?") from error


def _silent(line: str) -> None:
    pass
