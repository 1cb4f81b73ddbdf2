"""Between Metaflow and Slurm: passes on the end of Metaflow's interest in a task, whatever ends it.

    python attend.py GRACE_S FOLDER COMMAND …

Metaflow kills what it has started, and salloc and srun answer a request to end by killing the task at once. So they are
the children of a second process, in a session of its own, where neither Ctrl-C nor Metaflow's kill reaches it. It hangs
on a pipe of the first one, and their standard input is a pipe of its own. Once the first process is asked to end, or is
gone, the pipes end one after the other, srun passes that on, and the task ends in order (`alignment.slurm_task`). A job
that still waits for nodes is cancelled. After GRACE_S and a margin the job is ended by force.

srun's status is 0 also where the task's node was lost. So a task says that it ended well by a file in FOLDER, whose
name it finds in the environment (`DONE`); without it a 0 counts as a failure.

Metaflow hands configs over in a file of its own node: it is copied to FOLDER, which all nodes see, for as long as the
task runs. Standard library alone, so that it starts at once.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

MARGIN_S = 20.0
"""Beyond GRACE_S; the task ends itself by force 10 s after that."""
POLL_S = 0.1
ASKED = 130
"""Status of a command that was asked to end and then ended well: to Metaflow it is none that ended well."""
LOST = 1
"""Status where there is none of the task's own."""
CONFIG_FILE = "--local-config-file"
DONE = "RS_TASK_DONE"
"""Environment variable of the task: the file that it makes when it has ended well."""
SEEN_WITHIN_S = 3.0
"""Within this time a file that another node made is seen."""


def main() -> None:
    """Status of the command, by way of the second process."""
    grace_s, folder, command = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    theirs, ours = os.pipe()
    second = os.fork()
    if second == 0:
        os.setsid()
        os.close(ours)
        asked = _ending_of(theirs)
        os._exit(_run(command, folder, asked, grace_s + MARGIN_S))
    os.close(theirs)
    asked = _ending_of(sys.stdin.fileno())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.set())
    is_open = True
    while True:
        ended, status = os.waitpid(second, os.WNOHANG)
        if ended:
            sys.exit(os.waitstatus_to_exitcode(status))
        if asked.wait(POLL_S):
            if is_open:
                os.close(ours)
                is_open = False
            time.sleep(POLL_S)


def _run(command: list[str], folder: Path, asked: threading.Event, patience_s: float) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    stem = str(folder / f"task-{os.uname().nodename}-{os.getpid()}-{time.time_ns()}")
    done, copy = Path(f"{stem}.done"), _shared_config(Path(f"{stem}.json"), command)
    os.environ[DONE] = str(done)
    try:
        status = _attend(command, asked, patience_s) or (0 if _is_there(done) else LOST)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}; slurm.enabled needs Slurm's commands here", file=sys.stderr, flush=True)
        status = 127
    finally:
        done.unlink(missing_ok=True)
        if copy:
            copy.unlink(missing_ok=True)
    return 128 - status if status < 0 else status


def _attend(command: Sequence[str], asked: threading.Event, patience_s: float) -> int:
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        while process.poll() is None and not asked.wait(POLL_S):
            pass
        if process.poll() is not None:
            return process.returncode
        process.stdin.close()
        if _waits_for_nodes(process):
            process.send_signal(signal.SIGINT)
        for last_word in (signal.SIGTERM, signal.SIGKILL):
            until = time.monotonic() + patience_s
            while process.poll() is None and time.monotonic() < until:
                time.sleep(POLL_S)
            if process.poll() is None:
                process.send_signal(last_word)
        return process.wait() or ASKED


def _waits_for_nodes(process: subprocess.Popen[bytes]) -> bool:
    """Whether an interrupt cancels what is only asked for: salloc has no child yet. One to srun never ends its task."""
    if Path(process.args[0]).name != "salloc":
        return True
    try:
        return not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().strip()
    except OSError:  # it has just ended
        return False


def _ending_of(file: int) -> threading.Event:
    """Set once a pipe that nothing of interest comes from has ended."""
    ended = threading.Event()

    def watch() -> None:
        while os.read(file, 4096):
            pass
        ended.set()

    threading.Thread(target=watch, daemon=True).start()
    return ended


def _is_there(done: Path) -> bool:
    until = time.monotonic() + SEEN_WITHIN_S
    while not done.exists() and time.monotonic() < until:
        time.sleep(POLL_S)
    return done.exists()


def _shared_config(copy: Path, command: list[str]) -> Path | None:
    """The copy of Metaflow's file of configs, which `command` names from now on; None where it names none."""
    if CONFIG_FILE not in command:
        return None
    at = command.index(CONFIG_FILE) + 1
    shutil.copyfile(command[at], copy)
    command[at] = str(copy)
    return copy


if __name__ == "__main__":
    main()
