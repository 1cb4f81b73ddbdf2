"""Reads fuzzed inputs in a process of its own, under a limit of memory and watched in what it does; prints findings.

    python tests/fuzz_process.py --share 1 --seed 0 [--only NAME]

An input may be read, or end in one of the project's errors. Anything else is a finding: another exception, more memory
or time than any input is worth, a file touched outside of the input's folder, a process, a connection, an unpickling.
"""

import argparse
import base64
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS"):
    os.environ[name] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.dont_write_bytecode = True
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from alignment.errors import AlignmentError, ConfigError  # noqa: E402
from fuzz_model_targets import model_targets  # noqa: E402
from fuzz_run_targets import run_targets  # noqa: E402
from fuzz_targets import Target, config_targets, data_targets  # noqa: E402

MEMORY = 2 << 30
"""Bytes of address space beyond what the imports take."""
GROWTH_MB = 400
"""Peak of resident memory that an input may add."""
HANG_S = 60
"""Seconds after which an input hangs, on however busy a machine."""
FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen"),
    *("pickle.find_class", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen"),
)
WRITING = (
    *("os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.chmod", "os.truncate"),
    *("shutil.rmtree", "shutil.copytree"),
)


@dataclass
class Found:
    """What became of a target's inputs."""

    target: str
    inputs: int = 0
    read: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    growth_mb: int = 0
    findings: list[dict[str, str]] = field(default_factory=list)


class Watch:
    """An audit hook that notes what reading an input must not do. It cannot be taken off again, only told to rest."""

    def __init__(self, own: Path) -> None:
        self.own, self.is_on, self.seen = f"{own}/", False, list[str]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event in WRITING or (event == "open" and _is_writing(arguments)):
            paths = [os.fsdecode(one) for one in arguments if isinstance(one, str | bytes | os.PathLike)][:2]
            outside = [p for p in paths if os.path.isabs(p) and not os.path.realpath(p).startswith(self.own)]
            if (outside and event != "open") or (outside and outside[0] != "/dev/null"):
                self.seen.append(f"{event} {outside}")
        elif event in ("exec", "import", "compile") and self.own in repr(arguments)[:2000]:
            self.seen.append(f"{event} {arguments!r:.200}")


def _is_writing(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


class Hangs(BaseException):
    """Not one that a reader could catch."""


def _alarm(_number: int, _frame: FrameType | None) -> None:
    raise Hangs(f"more than {HANG_S} s")


def fuzz(target: Target, count: int, seed: int, place: Path, watch: Watch) -> Found:
    """Read `count` inputs of a target. Findings carry the input, in base64."""
    found = Found(target.name)
    folder = place / "inputs" / target.name.replace(" ", "-")
    folder.mkdir(parents=True)
    for index in range(count):
        data = target.make(random.Random(f"{seed}:{target.name}:{index}"))
        before, begun = _reset_peak(), time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        watch.is_on = True
        why = _outcome(target, data, folder, found)
        watch.is_on = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        growth = (_status("VmHWM") - before) // 1024
        found.inputs += 1
        found.slowest_s = max(found.slowest_s, round(time.monotonic() - begun, 2))
        found.growth_mb = max(found.growth_mb, growth)
        if growth > GROWTH_MB:
            why = why or f"it took {growth} MB"
        if watch.seen:
            why = why or f"it did {watch.seen}"
            watch.seen.clear()
        if why:
            found.findings.append(
                {"input": f"{seed}:{target.name}:{index}", "why": why, "data": base64.b64encode(data[:3000]).decode()}
            )
    return found


def _outcome(target: Target, data: bytes, folder: Path, found: Found) -> str:
    """ "" where the input was read or refused as it should be."""
    try:
        target.read(data, folder)
        found.read += 1
        return ""
    except AlignmentError as error:
        found.refused += 1
        text = str(error)
        is_list = isinstance(error, ConfigError)  # one line for each bad key
        if not text.replace("\n", "").isprintable() or len(text) > 9000 or ("\n" in text and not is_list):
            return f"a message that no terminal should show: {text[:300]!r}"
        return ""
    except BaseException:
        return traceback.format_exc()[-3000:]


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    """A number of kB from the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise KeyError(key)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of each target's inputs; 5 of each at the least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one target")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        place = Path(folder).resolve()
        made = [*data_targets(), *config_targets(), *run_targets(place), *model_targets(place)]
        targets = [target for target in made if options.only in (None, target.name)]
        limit = _status("VmSize") * 1024 + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        watch = Watch(place)
        for target in targets:
            found = fuzz(target, max(5, round(options.share * target.inputs)), options.seed, place, watch)
            print(json.dumps(asdict(found)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
