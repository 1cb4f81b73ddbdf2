"""Between Metaflow and Slurm: passes on the end of Metaflow's interest in a task, whatever ends it.

    python attend.py GRACE_S FOLDER COMMAND …

Metaflow kills what it has started, and srun answers a request to end by killing the task at once. So salloc and srun
stand in a session of their own, where Ctrl-C does not reach them, and their standard input is a pipe that this process
holds: once it is asked to end, or is gone, the pipe ends, srun passes that on, and the task ends in order
(`alignment.slurm_task`). A single SIGINT cancels a job that still waits for nodes and disturbs no other. After GRACE_S
and a margin the job is ended by force.

Metaflow hands configs over in a file of its own node: it is copied to FOLDER, which all nodes see, for as long as the
task runs. Standard library alone, so that it starts at once.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

MARGIN_S = 20.0
"""Beyond the task's own end by force, 10 s after GRACE_S."""
POLL_S = 0.1
PR_SET_PDEATHSIG = 1
CONFIG_FILE = "--local-config-file"


def main() -> int:
    """Status of the command."""
    grace_s, folder, command = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.set())
    threading.Thread(target=_when_stdin_ends, args=(asked,), daemon=True).start()
    copy = _shared_config(folder, command)
    try:
        status = _attend(command, asked, grace_s + MARGIN_S)
    finally:
        if copy:
            copy.unlink(missing_ok=True)
    return status if status >= 0 else 128 - status


def _attend(command: list[str], asked: threading.Event, patience_s: float) -> int:
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        start_new_session=True,
        # A job that waits for nodes is cancelled when this process is killed.
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, int(signal.SIGINT)),
    )
    while process.poll() is None and not asked.wait(POLL_S):
        pass
    if process.poll() is None:
        process.stdin.close()
        process.send_signal(signal.SIGINT)
    for last_word in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + patience_s
        while process.poll() is None and time.monotonic() < until:
            time.sleep(POLL_S)
        if process.poll() is None:
            os.killpg(process.pid, last_word)
    return process.wait()


def _when_stdin_ends(asked: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    asked.set()


def _shared_config(folder: Path, command: list[str]) -> Path | None:
    """The copy of Metaflow's file of configs, which `command` names from now on; None where it names none."""
    if CONFIG_FILE not in command:
        return None
    at = command.index(CONFIG_FILE) + 1
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"config-{os.uname().nodename}-{os.getpid()}-{time.time_ns()}.json"
    shutil.copyfile(command[at], copy)
    command[at] = str(copy)
    return copy


if __name__ == "__main__":
    sys.exit(main())
