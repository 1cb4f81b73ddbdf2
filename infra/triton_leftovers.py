"""What a launcher that was killed could not remove: shared memory of its server, and its scratch folder.

Triton's own /tmp/python_env_* are left alone: nothing tells whose they are.
"""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


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


def _is_left(name: str, separator: str) -> bool:
    found = re.match(rf"triton{separator}(\d+)_{_namespace()}{separator}", name)
    return found is not None and not Path("/proc", found[1]).exists()


def _namespace() -> str:
    """The number of this process's pid namespace, from "pid:[4026531836]"."""
    return os.readlink("/proc/self/ns/pid").strip("pid:[]")
