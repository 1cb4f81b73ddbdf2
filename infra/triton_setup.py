"""What tritonserver needs on disk, in its command line and in its environment before it can start.

The wheel `nvidia-pytriton` carries the server, the python backend and its stubs in places where the server
does not look; `prepare` lays them out in a scratch folder, beside a view of the repository. A server that is installed
as in NVIDIA's image needs no layout.
"""

import importlib.metadata
import os
import py_compile
import secrets
import shutil
import socket
import sys
import sysconfig
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from alignment.errors import RewardServerError

EXIT_TIMEOUT_S = 5
KEY_HEADER = "triton-grpc-protocol-key"
VERSION_FILES = ("model.py", "settings.json", "template.jinja", "card.json", "weights/*.safetensors")
"""Patterns of what a version consists of; one that lacks any is still being copied in, or out."""


@dataclass(frozen=True)
class Ports:
    """Ports of one server, and the address that it listens at: loopback, unless somebody asks for another."""

    grpc: int
    http: int
    metrics: int
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        """host:port of gRPC, for a client on this machine."""
        return f"{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.grpc}"


def free_ports(count: int) -> list[int]:
    """Different loopback ports that are free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def servable_versions(repository: Path, model: str | None = None, version: str | None = None) -> dict[str, list[str]]:
    """Model name to its exported versions. Raises RewardServerError where there is nothing to serve."""
    folders = sorted(p.parent for p in repository.glob("*/config.pbtxt") if model in (None, p.parent.name))
    found = {folder.name: sorted(_exported(folder, version), key=int) for folder in folders}
    found = {name: versions for name, versions in found.items() if versions}
    if not found:
        wanted = f"{model or 'any model'}{f' version {version}' if version else ''}"
        raise RewardServerError(
            f"no exported version of {wanted} in {repository}: `python flows/rs_flow.py run` exports one "
            "(to reward.repository, by default runs/triton_repo); `python -m models.policy_export` exports a policy"
        )
    return found


def _exported(folder: Path, version: str | None) -> list[str]:
    return [
        entry.name
        for entry in folder.iterdir()
        if entry.name.isascii() and entry.name.isdecimal() and version in (None, "", entry.name) and _is_whole(entry)
    ]


def _is_whole(version: Path) -> bool:
    return all(any(version.glob(pattern)) for pattern in VERSION_FILES)


@dataclass(frozen=True)
class Prepared:
    """What it takes to start a server, and to look after it."""

    command: list[str]
    environment: dict[str, str]
    view: Path
    """The folder that the server sees as its repository."""
    key: str
    """Opens the management protocols: gRPC's header is `KEY_HEADER`."""


def prepare(
    scratch: Path,
    models: dict[str, list[str]],
    repository: Path,
    ports: Ports,
    prefix: str,
    *,
    threads: int | None = None,
    follow: bool = False,
    tritonserver: Path | None = None,
) -> Prepared:
    """Lay out the backend and the view. With `follow` the server takes up what is added to the view later.

    `tritonserver` is the folder of an installed server, as NVIDIA's image has one; None takes the wheel's.
    Raises RewardServerError.
    """
    server, libraries = _wheel() if tritonserver is None else _installed(tritonserver)
    backends = scratch / "backends" if tritonserver is None else server / "backends"
    try:
        if tritonserver is None:
            _link_backend(scratch, server)
        view = scratch / "repository"
        for name, versions in models.items():
            (view / name).mkdir(parents=True)
            (view / name / "config.pbtxt").symlink_to(repository.resolve() / name / "config.pbtxt")
            for version in versions:
                link_version(view / name, repository.resolve() / name / version)
    except OSError as error:
        raise RewardServerError(
            f"{repository} cannot be laid out for tritonserver in {scratch} ({error}): mend that and start again"
        ) from error
    key = secrets.token_hex(16)
    closed = "shared-memory,model-config,model-repository,trace,logging"
    command = [
        str(server / "bin" / "tritonserver"),
        f"--model-repository={view}",
        # Either way the protocol that loads and unloads models answers nobody.
        *(("--model-control-mode=poll", "--repository-poll-secs=1") if follow else ("--model-control-mode=none",)),
        "--disable-auto-complete-config",
        # It stays and says which version failed and why, instead of leaving that to its log.
        "--exit-on-error=false",
        f"--backend-directory={backends}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        *(f"--{kind}-address={ports.host}" for kind in ("grpc", "http", "metrics")),
        f"--grpc-port={ports.grpc}",
        f"--http-port={ports.http}",
        f"--metrics-port={ports.metrics}",
        f"--grpc-restricted-protocol={closed}:key={key}",
        f"--http-restricted-api={closed}:key={key}",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        f"--allow-gpu-metrics={'true' if Path('/dev/nvidiactl').exists() else 'false'}",
    ]
    environment = dict(os.environ)
    # The stub finds this interpreter's packages through PATH, and must load this interpreter's libpython first.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment["LD_LIBRARY_PATH"] = f"{sysconfig.get_config_var('LIBDIR')}{os.pathsep}{libraries}".rstrip(os.pathsep)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return Prepared(command, environment, view, key)


def _link_backend(scratch: Path, server: Path) -> None:
    """Raises RewardServerError."""
    backend = scratch / "backends" / "python"
    backend.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (backend / name).symlink_to(server / "backends" / "python" / name)
    # The stub looks for its libraries beside itself, so it is copied, not linked.
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.is_file():
        raise RewardServerError(f"nvidia-pytriton has no stub for Python {python}: use Python 3.11")
    shutil.copy2(stub, backend)


def link_version(view: Path, version: Path) -> None:
    """Put an exported version into a model's folder of the view, as links, whole at once.

    The stub leaves a __pycache__ beside model.py, which a server that polls would take for a changed version and
    load again: so it is there from the first.
    Raises OSError, and leaves nothing, where the version is deleted meanwhile.
    """
    build = view.parent.parent / f"linking-{view.name}-{version.name}"
    build.mkdir()
    try:
        for entry in version.iterdir():
            (build / entry.name).symlink_to(entry)
        py_compile.compile(str(build / "model.py"), quiet=2)
        build.rename(view / version.name)
    finally:
        shutil.rmtree(build, ignore_errors=True)


def drop_deleted(view: Path, repository: Path) -> list[str]:
    """Take versions that are not in the repository any more out of the view; returns them as "model/version".

    Raises RewardServerError where none of a model is left.
    """
    versions = {link.parent for link in view.glob("*/[0-9]*/*") if link.is_symlink() and not link.exists()}
    for version in versions:
        shutil.rmtree(version)
    for model in sorted({version.parent for version in versions}):
        if not any(model.glob("[0-9]*")):
            raise RewardServerError(
                f"no version of {model.name} that was served is left in {repository}: export one and start again"
            )
    return sorted(str(version.relative_to(view)) for version in versions)


def _installed(server: Path) -> tuple[Path, str]:
    """An installed server's folder, and the libraries that its image looks for. Raises RewardServerError."""
    for part in (
        "bin/tritonserver",
        "backends/python/libtriton_python.so",
        "backends/python/triton_python_backend_stub",
    ):
        if not (server / part).is_file():
            raise RewardServerError(
                f"--tritonserver ({server}) holds no {part}: name the folder of an installed Triton with the python "
                "backend (/opt/tritonserver in NVIDIA's image), or leave it out to use the wheel's"
            )
    return server, os.environ.get("LD_LIBRARY_PATH", "")


def _wheel() -> tuple[Path, str]:
    """The wheel's tritonserver folder and its libraries. Raises RewardServerError."""
    try:
        wheel = importlib.metadata.distribution("nvidia-pytriton")
        numpy = importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError as error:
        raise RewardServerError(
            f"{error.name} is not installed: `pip install -r requirements.txt`, or set reward.url to a running Triton"
        ) from error
    if int(numpy.partition(".")[0]) >= 2:
        raise RewardServerError(
            f"numpy {numpy} crashes Triton's python backend at the first text: "
            "`pip install -r requirements.txt` brings numpy 1.26, or set reward.url to a running Triton"
        )
    server = Path(str(wheel.locate_file("pytriton/tritonserver")))
    return server, str(wheel.locate_file("nvidia_pytriton.libs"))
