"""The reward server that a task scores with: an external one, or a child of the task.

A local server is watched over a pipe: it ends when this process does, `kill -9` included. Artifacts hold the
model's repository, version and digest, never a URL.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from alignment.atomic_files import disk_errors
from alignment.errors import ConfigError, RewardServerError
from infra.triton import log_tail
from infra.triton_setup import EXIT_TIMEOUT_S, free_ports

SOURCE_ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "env:"
"""What a `reward.url` begins with that names an environment variable."""


@dataclass(frozen=True)
class RewardServer:
    """`url` is host:port of its gRPC. A local server also has a process, a log and a metrics URL."""

    url: str
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None
    metrics_url: str | None = None

    def check(self) -> None:
        """Raise RewardServerError with the log's last lines if a local server has ended."""
        if self.process is None or self.log is None or self.process.poll() is None:
            return
        raise RewardServerError(
            f"the local reward server ended with code {self.process.returncode}: mend what the end of its log names (a "
            "damaged file: put it back from a copy, or remove the version and export it again), then resume the run; "
            f"{self.log}:\n{log_tail(self.log)}"
        )


def external_url(url: str | None) -> str | None:
    """host:port of what `reward.url` names, which may be the variable that holds it. Raises ConfigError."""
    if url is None or not url.startswith(VARIABLE):
        return url
    name = url.removeprefix(VARIABLE)
    if name.isdecimal():  # the port of a host of that name
        return url
    found = os.environ.get(name, "")
    if ":" not in found:
        raise ConfigError(f"reward.url ({url}): {name} ({found!r}) must be set to host:port of Triton's gRPC endpoint")
    return found


@contextmanager
def reward_server(
    *,
    repository: Path,
    name: str,
    version: str,
    url: str | None,
    grpc_port: int,
    log: Path,
    threads: int | None = None,
    also: Sequence[str] = (),
) -> Iterator[RewardServer]:
    """The server at `url`, or one started here for as long as the context lasts.

    Returns at once, so that the server's start overlaps with the caller's: the client waits
    (`RewardClient(..., check=server.check).wait_ready(...)`). `grpc_port` 0 picks a free port; `threads` is
    torch threads of each served model; `also` names further models of the repository, as "name/version".
    """
    if url is not None:
        yield RewardServer(url)
        return
    free, metrics_port = free_ports(2)
    port = grpc_port or free
    with disk_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("ab")
    with output:
        process = subprocess.Popen(
            [*_command(repository, name, version, port, metrics_port, threads), *_also(also)],
            env={**os.environ, "PYTHONPATH": _python_path()},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            # Ctrl-C at the terminal goes to the task; the server ends with it, not before it.
            start_new_session=True,
        )
    try:
        yield RewardServer(f"127.0.0.1:{port}", process, log, f"http://127.0.0.1:{metrics_port}/metrics")
    finally:
        _stop(process)


def _command(repository: Path, name: str, version: str, port: int, metrics_port: int, threads: int | None) -> list[str]:
    command = [sys.executable, "-m", "infra.triton", "--watch-stdin", "--repository", str(repository), "--model", name]
    command += ["--grpc-port", str(port), "--metrics-port", str(metrics_port), "--version", version]
    return command if threads is None else [*command, "--threads", str(threads)]


def _also(models: Sequence[str]) -> list[str]:
    return [word for model in models for word in ("--also", model)]


def _python_path() -> str:
    """This source tree first: it may be a code package that was unpacked somewhere."""
    inherited = os.environ.get("PYTHONPATH")
    return f"{SOURCE_ROOT}{os.pathsep}{inherited}" if inherited else str(SOURCE_ROOT)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Close the pipe, which asks it to end; by force if it does not."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(EXIT_TIMEOUT_S + 10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
