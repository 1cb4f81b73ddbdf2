"""Serve exported models on this machine, with the Triton that the `nvidia-pytriton` wheel carries.

    python -m infra.triton --repository runs/triton_repo [--follow]

Serves on loopback until Ctrl-C; in a container `--host 0.0.0.0` opens it to the network, and `--tritonserver` names the
server of NVIDIA's image. Tritonserver sees a private view of the repository: links to the exported
versions alone, so that one version can be pinned and the bare template is never loaded. Its model control is
off, so nobody who reaches its ports can make it load code; with `--follow` it takes up what is exported later by
looking at the view, which this process alone writes (`infra/triton_follow.py`). The other management protocols
want a random key, which this machine's users can see in the process list and nobody else.

A model whose process dies or hangs never comes back by itself, while Triton goes on saying "ready"; this
supervisor notices and starts the server anew. With `--watch-stdin` everything ends when stdin does, that is when the
owner of the pipe ends, however it ends.
"""

import argparse
import ctypes
import itertools
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from alignment.errors import AlignmentError, RewardServerError
from infra.triton_follow import Follower
from infra.triton_health import CANARY_S, answers, feel_pulse, living_children, loading_failure, ready_versions
from infra.triton_leftovers import SHARED_MEMORY, BackendFolder, owner, sweep
from infra.triton_options import asked_ports, asked_repository, parser
from infra.triton_setup import EXIT_TIMEOUT_S, Ports, Prepared, drop_deleted, prepare, servable_versions

START_S = 600.0
"""Within this time a server has to get ready: one that lacks a model's versions would wait for ever."""
MAX_RESTARTS = 3
LONG_LIFE_S = 600.0
"""A server that lived this long is not failing over and over: restarts are counted anew."""
POLL_S = 0.25
PR_SET_PDEATHSIG = 1


def serve(
    models: dict[str, list[str]],
    *,
    repository: Path,
    ports: Ports,
    threads: int | None,
    follow: bool,
    log: IO[bytes],
    should_stop: Callable[[float], bool],
    on_ready: Callable[[list[tuple[str, str]]], None],
    grace_s: float,
    tritonserver: Path | None = None,
) -> None:
    """Run tritonserver until `should_stop(wait_s)` says so; start it anew when its model's process is lost.

    With `follow`, versions that are exported meanwhile are served too. `grace_s` is how long requests in flight
    may take at the end. `tritonserver` is an installed server's folder; None takes the wheel's.
    Raises RewardServerError when it cannot be started, or was lost more than `MAX_RESTARTS` times in a row.
    """
    sweep(SHARED_MEMORY, Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=f"triton-{owner()}-") as scratch:
        prefix = f"triton_{owner()}_{secrets.token_hex(4)}"
        prepared = prepare(
            Path(scratch), models, repository, ports, prefix, threads=threads, follow=follow, tritonserver=tritonserver
        )
        follower = Follower(repository, list(models), prepared, ports.url) if follow else None
        backend_folder, restarts = BackendFolder(), 0

        def ready(served: list[tuple[str, str]]) -> None:
            backend_folder.server_is_ready()
            on_ready(served)

        while True:
            started = time.monotonic()
            backend_folder.server_starts()
            # PR_SET_PDEATHSIG covers a supervisor that is killed with -9: it cannot run its `finally`.
            process = subprocess.Popen(
                prepared.command,
                env=prepared.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
            was_lost, reason = False, "interrupted"
            try:
                was_lost, reason = _watch(process, prepared, list(models), ports, should_stop, ready, follower)
            finally:
                # A server that lost its model's process would wait for it in vain.
                _stop(process, prefix, grace_s=0 if was_lost and reason else grace_s)
                backend_folder.server_has_ended()
            if not reason:
                return
            restarts = restarts + 1 if time.monotonic() - started < LONG_LIFE_S else 1
            if not was_lost or restarts > MAX_RESTARTS:
                raise RewardServerError(f"the reward server failed: {reason}")
            print(f"{reason}; starting the server again", file=sys.stderr, flush=True)
            if follower is not None:
                follower.before_restart()
            for version in drop_deleted(prepared.view, repository):
                print(f"{version} is not in {repository} any more", file=sys.stderr, flush=True)


def log_tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, indented; for error messages. Triton's tables, of hundreds of columns, are left out."""
    if not path.is_file():
        return f"    ({path} does not exist)"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        text = file.read().decode("utf-8", errors="replace")
    told = [line for line in text.splitlines() if line.strip() and not line.startswith(("+--", "| "))]
    return "\n".join(f"    {line}" for line in told[-lines:])


def _die_with_parent() -> Callable[[], None]:
    """For the child, between fork and exec: ask the kernel for a SIGTERM when the parent goes."""
    # Looked up before the fork: after it, a lock of the loader may be held by a thread that is no more.
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _watch(
    process: subprocess.Popen[bytes],
    prepared: Prepared,
    models: list[str],
    ports: Ports,
    should_stop: Callable[[float], bool],
    on_ready: Callable[[list[tuple[str, str]]], None],
    follower: Follower | None,
) -> tuple[bool, str]:
    """Until the end: whether it was lost, which a new start may mend, and what ended it ("" when asked to stop).

    Raises RewardServerError when a version cannot be loaded.
    """
    ready, url, ended = False, ports.url, threading.Event()
    deadline = time.monotonic() + START_S
    hung: list[str] = []
    try:
        while not should_stop(POLL_S):
            if process.poll() is not None:
                return ready, f"tritonserver ended with code {process.returncode}"
            answered = not ready and all(answers(url, model, CANARY_S) for model in models)
            if answered and (served := ready_versions(url, prepared.key)):
                ready = True
                stubs = living_children(process.pid)
                for model in models:
                    threading.Thread(target=feel_pulse, args=(url, model, hung, ended), daemon=True).start()
                on_ready(served)
            if hung:
                return ready, hung[0]
            if not ready:
                lost = loading_failure(url, prepared.key, models)
                if lost:
                    return True, lost
                if time.monotonic() > deadline:
                    return ready, f"it did not get ready within {START_S:g} s"
                continue
            living = living_children(process.pid)
            if stubs - living and not (follower and follower.all_answer()):
                return ready, "the model's process has died"
            if follower:
                stubs = living
                follower.follow()
        return ready, ""
    finally:
        ended.set()


def _stop(process: subprocess.Popen[bytes], prefix: str, grace_s: float) -> None:
    """End the server, its stubs and its shared memory, by force if it has not gone after `grace_s` seconds."""
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # Its own session, hence its own group: stubs that outlived it.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 after a stop that was asked for, 1 when the server failed, 2 when there is nothing to serve."""
    options = parser().parse_args(arguments)
    stopping: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stopping.append(number)

    def should_stop(wait_s: float) -> bool:
        if not options.watch_stdin:
            time.sleep(wait_s)
        elif select.select([sys.stdin], [], [], wait_s)[0]:
            return bool(stopping) or not os.read(sys.stdin.fileno(), 4096)
        return bool(stopping)

    with ExitStack() as stack:
        try:
            repository = stack.enter_context(asked_repository(options))
            models = servable_versions(repository, options.model, options.version)
            for name, version in options.also:
                found = servable_versions(repository, name, version)[name]
                models[name] = sorted({*models.get(name, []), *found}, key=int)
        except AlignmentError as error:
            print(error, file=sys.stderr)
            return 2
        for number in (signal.SIGINT, signal.SIGTERM):  # from here on: a long download ends at once
            signal.signal(number, on_signal)
        return _serve(options, repository, models, should_stop)


def _serve(
    options: argparse.Namespace,
    repository: Path,
    models: dict[str, list[str]],
    should_stop: Callable[[float], bool],
) -> int:
    """0 after a stop that was asked for, 1 when the server failed."""
    try:
        ports = asked_ports(options)
        with ExitStack() as stack:
            log = stack.enter_context(options.log.open("ab")) if options.log else sys.stderr.buffer
            serve(
                models,
                repository=repository,
                ports=ports,
                threads=options.threads,
                follow=options.follow,
                log=log,
                should_stop=should_stop,
                on_ready=lambda served: _announce(served, ports, options.log),
                # The owner of the pipe is the only client, and it has ended: nothing is in flight.
                grace_s=0 if options.watch_stdin else EXIT_TIMEOUT_S + 5,
                tritonserver=options.tritonserver,
            )
    except AlignmentError as error:
        tail = f"; its last lines ({options.log}):\n{log_tail(options.log)}" if options.log else ""
        print(f"{error}{tail}", file=sys.stderr)
        return 1
    return 0


def _announce(served: list[tuple[str, str]], ports: Ports, log: Path | None) -> None:
    """Print what is served and where."""
    names = ", ".join(
        f"{name} (version {', '.join(version for _, version in versions)})"
        for name, versions in itertools.groupby(served, key=lambda entry: entry[0])
    )
    print(f"serving {names}; stop with Ctrl-C")
    print(f"  gRPC     {ports.host}:{ports.grpc}    (reward.url)")
    print(f"  HTTP     http://{ports.host}:{ports.http}")
    print(f"  metrics  http://{ports.host}:{ports.metrics}/metrics")
    print(f"  log      {log or 'stderr'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
