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
import ipaddress
import itertools
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from alignment.errors import AlignmentError, RewardServerError
from infra.triton_follow import Follower
from infra.triton_health import CANARY_S, answers, feel_pulse, living_children, loading_failure, ready_versions
from infra.triton_leftovers import SHARED_MEMORY, BackendFolder, owner, sweep
from infra.triton_setup import EXIT_TIMEOUT_S, Ports, Prepared, drop_deleted, free_ports, prepare, servable_versions

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
    """The last lines of a log, indented; for error messages."""
    if not path.is_file():
        return f"    ({path} does not exist)"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        text = file.read().decode("utf-8", errors="replace")
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])


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
    options = _parser().parse_args(arguments)
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
            repository = stack.enter_context(_repository(options))
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
        ports = _ports(options)
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


@contextmanager
def _repository(options: argparse.Namespace) -> Iterator[Path]:
    """The repository's folder; of one under s3:// a copy of what is to be served. Raises AlignmentError."""
    from alignment.s3 import is_s3

    if not is_s3(options.repository):
        yield Path(options.repository)
        return
    if options.follow:
        raise RewardServerError(
            f"--follow looks at a folder, and {options.repository} is none: serve it without, and start it again for "
            "newer versions"
        )
    from alignment.config_sections import RunSection
    from alignment.reward_repository import local_repository, served_versions

    uri = options.repository.rstrip("/")
    served = served_versions(uri, options.model, options.version)
    if not served:
        wanted = f"{options.model or 'any model'}{f' version {options.version}' if options.version else ''}"
        raise RewardServerError(
            f"no exported version of {wanted} in {uri}: `python flows/rs_flow.py run` exports one (to "
            "reward.repository); `python -m models.policy_export` exports a policy"
        )
    for name, version in options.also:
        if not served_versions(uri, name, version):
            raise RewardServerError(f"--also ({name}/{version}): {uri} has no such exported version")
    versions = [*served, *options.also]
    with local_repository(uri, versions, RunSection()) as folder:
        yield folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infra.triton", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repository", required=True, help="folder or s3:// prefix of exports (reward.repository)")
    parser.add_argument("--model", help="serve this model alone")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--version", help="serve this version alone")
    which.add_argument("--follow", action="store_true", help="serve versions that are exported later, too")
    also = "with --model, serve this version of this model too; may be repeated"
    parser.add_argument("--also", type=_model_version, action="append", default=[], metavar="NAME/VERSION", help=also)
    for kind in ("grpc", "http", "metrics"):
        parser.add_argument(f"--{kind}-port", type=_port, default=0, help="0 picks a free one")
    opened = "IPv4 address to listen at; 0.0.0.0 lets in whoever reaches this machine (default: 127.0.0.1)"
    parser.add_argument("--host", type=_address, default="127.0.0.1", help=opened)
    installed = "folder of an installed Triton, e.g. /opt/tritonserver; the wheel's server if left out"
    parser.add_argument("--tritonserver", type=Path, metavar="DIR", help=installed)
    parser.add_argument("--threads", type=int, help="torch threads of the model; all cores if left out")
    parser.add_argument("--log", type=Path, help="file for tritonserver's output; stderr if left out")
    parser.add_argument("--watch-stdin", action="store_true", help="end when stdin ends")
    return parser


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 0 to 65535")
    return int(text)


def _address(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no IPv4 address: give e.g. 127.0.0.1 or 0.0.0.0") from error


def _model_version(text: str) -> tuple[str, str]:
    name, _, version = text.partition("/")
    if not name or not version.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no version of a model: give e.g. reward_model/2")
    return name, version


def _ports(options: argparse.Namespace) -> Ports:
    """The ports asked for, free ones for 0. Raises RewardServerError for one that is taken."""
    asked = (options.grpc_port, options.http_port, options.metrics_port)
    for kind, port in zip(("grpc", "http", "metrics"), asked, strict=True):
        with socket.socket() as s:
            # Like a server: a port whose old connections linger is free.
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((options.host, port))
            except OSError as error:
                key = "reward.grpc_port or --grpc-port" if kind == "grpc" else f"--{kind}-port"
                raise RewardServerError(
                    f"port {port} on {options.host} is not free ({error.strerror}): set {key} to another, or to 0"
                ) from error
    grpc, http, metrics = (port or free for port, free in zip(asked, free_ports(3), strict=True))
    return Ports(grpc, http, metrics, options.host)


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
