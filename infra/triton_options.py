"""The launcher's command line: its options, and the repository and the ports that they ask for."""

import argparse
import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignment.errors import RewardServerError
from infra.triton_setup import Ports, free_ports

ABOUT = "Serve exported models on this machine, with the Triton that the `nvidia-pytriton` wheel carries."


def parser() -> argparse.ArgumentParser:
    """The options of `python -m infra.triton`."""
    made = argparse.ArgumentParser(prog="python -m infra.triton", description=ABOUT)
    made.add_argument("--repository", required=True, help="folder or s3:// prefix of exports (reward.repository)")
    made.add_argument("--model", help="serve this model alone")
    which = made.add_mutually_exclusive_group()
    which.add_argument("--version", help="serve this version alone")
    which.add_argument("--follow", action="store_true", help="serve versions that are exported later, too")
    also = "with --model, serve this version of this model too; may be repeated"
    made.add_argument("--also", type=_model_version, action="append", default=[], metavar="NAME/VERSION", help=also)
    for kind in ("grpc", "http", "metrics"):
        made.add_argument(f"--{kind}-port", type=_port, default=0, help="0 picks a free one")
    opened = "IPv4 address to listen at; 0.0.0.0 lets in whoever reaches this machine (default: 127.0.0.1)"
    made.add_argument("--host", type=_address, default="127.0.0.1", help=opened)
    installed = "folder of an installed Triton, e.g. /opt/tritonserver; the wheel's server if left out"
    made.add_argument("--tritonserver", type=Path, metavar="DIR", help=installed)
    made.add_argument("--threads", type=int, help="torch threads of the model; all cores if left out")
    made.add_argument("--log", type=Path, help="file for tritonserver's output; stderr if left out")
    made.add_argument("--watch-stdin", action="store_true", help="end when stdin ends")
    return made


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


def asked_ports(options: argparse.Namespace) -> Ports:
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


@contextmanager
def asked_repository(options: argparse.Namespace) -> Iterator[Path]:
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
