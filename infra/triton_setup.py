"""What tritonserver needs on disk, in its command line and in its environment before it can start.

The wheel `nvidia-pytriton` carries the server, the python backend and its stubs in places where the server
does not look; `prepare` lays them out in a scratch folder, beside a view of the repository.
"""

import importlib.metadata
import os
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


@dataclass(frozen=True)
class Ports:
    """Loopback ports of one server."""

    grpc: int
    http: int
    metrics: int


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
            "(to reward.repository, by default runs/triton_repo)"
        )
    return found


def _exported(folder: Path, version: str | None) -> list[str]:
    return [
        entry.name
        for entry in folder.iterdir()
        if entry.name.isdigit() and (entry / "weights").is_dir() and version in (None, "", entry.name)
    ]


def prepare(
    scratch: Path, models: dict[str, list[str]], repository: Path, ports: Ports, prefix: str, threads: int | None
) -> tuple[list[str], dict[str, str]]:
    """Lay out the backend and the view; returns tritonserver's command and environment."""
    server, libraries = _wheel()
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
    view = scratch / "repository"
    for name, versions in models.items():
        _link_model(view / name, repository.resolve() / name, versions)
    key = secrets.token_hex(16)
    closed = "shared-memory,model-config,model-repository,trace,logging"
    command = [
        str(server / "bin" / "tritonserver"),
        f"--model-repository={view}",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        f"--backend-directory={scratch / 'backends'}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        *(f"--{kind}-address=127.0.0.1" for kind in ("grpc", "http", "metrics")),
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
    environment["LD_LIBRARY_PATH"] = f"{sysconfig.get_config_var('LIBDIR')}{os.pathsep}{libraries}"
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return command, environment


def _link_model(view: Path, model: Path, versions: list[str]) -> None:
    """Links to a model's config and versions. model.py is copied: the stub leaves a __pycache__ beside it."""
    view.mkdir(parents=True)
    (view / "config.pbtxt").symlink_to(model / "config.pbtxt")
    for version in versions:
        (view / version).mkdir()
        for entry in (model / version).iterdir():
            if entry.name == "model.py":
                shutil.copyfile(entry, view / version / entry.name)
            else:
                (view / version / entry.name).symlink_to(entry)


def _wheel() -> tuple[Path, Path]:
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
    return server, Path(str(wheel.locate_file("nvidia_pytriton.libs")))
