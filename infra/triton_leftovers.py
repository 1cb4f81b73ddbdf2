"""What a server that was killed could not remove: its shared memory, its launcher's scratch folder, its temporary one.

The last is an empty /tmp/python_env_*, whatever TMPDIR says, which the python backend makes when a server starts.
Nothing in it tells whose it is: where several servers start at the same time, theirs stay.
"""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY, TEMPORARY = Path("/dev/shm"), Path("/tmp")


def owner() -> str:
    """This process, for the names of what it leaves behind: "<pid>_<pid namespace>".

    Containers may share /dev/shm or /tmp and not their pids.
    """
    return f"{os.getpid()}_{_namespace()}"


def sweep(shared_memory: Path, scratch: Path) -> None:
    """Remove what launchers named with `owner()` that do not run any more.

    Shared memory is named triton_<owner>_*, scratch folders are triton-<owner>-*.
    """
    leftovers = [p for p in shared_memory.glob("triton_*") if _is_left(p.name, "_")]
    leftovers += [p for p in scratch.glob("triton-*") if _is_left(p.name, "-")]
    for path in leftovers:
        # Another user's are not ours to remove, another launcher may sweep too, a server may still be ending.
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


class BackendFolder:
    """The temporary folder of a server: the only one that came between its start and its readiness, else unknown."""

    def __init__(self, folder: Path = TEMPORARY) -> None:
        self._folder = folder
        self._before: set[Path] = set()
        self._new: set[Path] = set()

    def server_starts(self) -> None:
        """Call this before the server is started."""
        self._before, self._new = self._all(), set()

    def server_is_ready(self) -> None:
        """Call this once the server answers."""
        self._new = self._all() - self._before

    def server_has_ended(self) -> None:
        """Remove the folder."""
        if len(self._new) == 1:
            with suppress(OSError):  # a server that was not killed has removed it
                self._new.pop().rmdir()

    def _all(self) -> set[Path]:
        return set(self._folder.glob("python_env_*"))


def _is_left(name: str, separator: str) -> bool:
    found = re.match(rf"triton{separator}(\d+)_{_namespace()}{separator}", name)
    return found is not None and not Path("/proc", found[1]).exists()


def _namespace() -> str:
    """The number of this process's pid namespace, from "pid:[4026531836]"."""
    return os.readlink("/proc/self/ns/pid").strip("pid:[]")
