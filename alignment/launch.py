"""Starting the workers of an iteration and listening to them.

`torch.distributed.run` starts one process per GPU, or `resources.cpu_workers` on the CPU, on this node alone or
on each node of a gang. They report as JSON lines on standard output; anything else that a library prints goes to
standard error.
"""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment import errors
from alignment.errors import AlignmentError, WorkerError
from alignment.one_node import LOOPBACK

SOURCE_ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds `alignment/`, `models/`, `infra/` and `triton_repo/`, in a checkout and in a code package."""

TAIL_LINES = 20
GRACE_MARGIN_S = 5.0
"""Beyond their own grace time, after which workers end themselves."""


@dataclass(frozen=True, slots=True)
class Gang:
    """This node's place among those on which workers run together: `rank` of `count`, which meet at the first one.

    `address` is the first node's, `port` one that is free there. `through` is a command that runs what follows it on
    all of them, where one process starts them all (`alignment.slurm_gang`).
    """

    rank: int
    count: int
    address: str
    port: int
    through: tuple[str, ...] = ()


def gang_port(name: str) -> int:
    """The port at which the nodes of a gang of this name meet: from 20000 to 29999, which Linux gives to no client.

    All nodes derive it, so that none has to ask; another name, another run's or attempt's, hardly ever has the same.
    """
    return 20_000 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10_000


def run_workers(
    module: str,
    arguments: Sequence[str],
    *,
    num_workers: int,
    on_event: Callable[[dict[str, Any]], None],
    check: Callable[[], None],
    grace_s: float = 0.0,
    gang: Gang | None = None,
) -> None:
    """Run `module` on `num_workers` ranks to its end. Raises the worker's own AlignmentError, or WorkerError.

    With a gang of several nodes that many ranks run on each of them; all of them call this, or one by `gang.through`.

    `check` is called every second and raises where the workers would wait in vain (a dead reward server).
    `grace_s` is how long workers may take to end when this process gives up on them, by Ctrl-C for instance.
    """
    command = [
        *(gang.through if gang else ()),
        *[sys.executable, "-m", *_launcher(gang), f"--shutdown-timeout={math.ceil(grace_s + GRACE_MARGIN_S)}"],
        *[f"--nproc-per-node={num_workers}", "-m", module, *arguments],
    ]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # never written to: it is the workers' lifeline
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**worker_environment(), **(LOOPBACK if gang and gang.address == "127.0.0.1" else {})},
        start_new_session=True,  # Ctrl-C reaches the step, which then ends the workers in order
    )
    reported: list[AlignmentError] = []
    stopped = False
    threading.Thread(target=_watch, args=(process, check, reported), daemon=True).start()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            event = _parse(line)
            if event is None:
                tail.append(line.rstrip())
            elif event["kind"] == "error":
                reported.append(getattr(errors, event["type"])(event["text"]))
            else:
                stopped = stopped or event["kind"] == "stopped"
                on_event(event)
        status = process.wait()
    finally:
        stop(process, grace_s)
    if reported:
        raise reported[0]
    if status and not stopped:  # a launcher that was told to end says so by its status
        print(*tail, sep="\n", file=sys.stderr)
        raise WorkerError(f"a worker ended with status {status}; its last lines are above. Resume continues the run")


def _launcher(gang: Gang | None) -> list[str]:
    """The module that starts this node's ranks, and what tells it of the other nodes."""
    if gang is None or gang.count == 1:
        return ["alignment.one_node"]
    meeting = ["--nnodes", str(gang.count), "--master-addr", gang.address, "--master-port", str(gang.port)]
    if gang.through:
        return ["alignment.slurm_node", *meeting]
    return ["alignment.gang_node", "--node-rank", str(gang.rank), *meeting]


def _watch(process: subprocess.Popen[str], check: Callable[[], None], reported: list[AlignmentError]) -> None:
    while process.poll() is None:
        try:
            check()
        except AlignmentError as error:
            reported.append(error)
            process.terminate()
            return
        time.sleep(1)


def worker_environment() -> dict[str, str]:
    """The environment of a child that imports this package, wherever it lies."""
    path = os.pathsep.join(filter(None, [str(SOURCE_ROOT), os.environ.get("PYTHONPATH")]))
    # One intra-op pool per worker is set by the worker itself; torchrun would otherwise warn and force 1.
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def stop(process: subprocess.Popen[Any], grace_s: float) -> None:
    """End a child and its session: by its lifeline, and by force once the grace time is over."""
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(grace_s + GRACE_MARGIN_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _parse(line: str) -> dict[str, Any] | None:
    if not line.startswith('{"kind"'):
        return None
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return event
