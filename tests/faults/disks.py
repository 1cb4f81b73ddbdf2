"""A small disk of a run's own, a real file system in memory, that is filled up and freed again."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

SIZE = "64m"
"""Room for the smoke preset's run many times over."""
TRIES = 20


def why_no_disk(folder: Path) -> str:
    """Why no file system can be mounted here; "" where one can."""
    place = folder / "probe"
    place.mkdir()
    refused = _mount(place)
    if not refused:
        _unmount(place)
    place.rmdir()
    return refused and (
        f"{refused}: run it as root, or by `unshare --user --map-root-user --mount`, which lets anybody mount"
    )


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of SIZE at `place`, for as long as the context lasts."""
    place.mkdir()
    refused = _mount(place)
    if refused:
        raise OSError(refused)
    try:
        yield place
    finally:
        _unmount(place)


def fill(disk: Path, left: int) -> str:
    """Fill the disk up to `left` bytes."""
    for _ in range(TRIES):  # the run may take some between the look and the filling, which then is refused
        found = os.statvfs(disk)
        size = max(1, found.f_bavail * found.f_frsize - left)
        with (disk / "filler").open("ab") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, size)
            return f"the disk has {left} bytes left"
    return "the disk was full before"


def free(disk: Path) -> None:
    """What was filled is free again."""
    (disk / "filler").unlink(missing_ok=True)


def _mount(place: Path) -> str:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)], capture_output=True)
    return done.stderr.decode().strip() if done.returncode else ""


def _unmount(place: Path) -> None:
    subprocess.run(["umount", "--lazy", str(place)], check=True)
