"""One whole run, watched from outside: no secret is left anywhere, no port is open to others, nothing is unpickled."""

import base64
import contextlib
import gzip
import io
import re
import subprocess
import tarfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flow_runs import ROOT, Place
from reward_fixtures import descendants

pytestmark = pytest.mark.slow

PASSWORD = "planted-password-of-s3-3d9a"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEYPLANTED",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-of-aws-1f7e",
    "AWS_SESSION_TOKEN": "planted-token-of-aws-2b8c",
    "AWS_ENDPOINT_URL": f"http://user:{PASSWORD}@127.0.0.1:9",
    "WANDB_API_KEY": "01234567890abcdef01234567890planted4e0b1",
    "HF_TOKEN": "hf_plantedTokenOfTheHub5f1c",
    "HUGGING_FACE_HUB_TOKEN": "hf_plantedTokenOfTheHub6a2d",
}
PLANTED = [PASSWORD, *(value for name, value in SECRETS.items() if name != "AWS_ENDPOINT_URL")]
LISTENING = "0A"
"""A socket's state in /proc/net/tcp."""
LOOPBACK = re.compile(r"0100007F|0{24}01000000|0{16}FFFF00000100007F")
"""127.0.0.1, ::1 and ::ffff:127.0.0.1 as /proc/net/tcp and tcp6 write them."""


@dataclass
class Watched:
    """What a run showed while it ran, and what it said."""

    place: Place
    output: str = ""
    commands: set[str] = field(default_factory=set)
    listeners: dict[str, str] = field(default_factory=dict)
    """Address and port of each socket that listened, and the command of its process."""

    @property
    def triton_keys(self) -> set[str]:
        """The keys of the server's management protocols, each drawn at a start."""
        return {key for command in self.commands for key in re.findall(r"key=([0-9a-f]{32})", command)}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """A run of the smoke preset on two workers, W&B offline, whose environment holds secrets; then its code package."""
    place = Place(tmp_path_factory.mktemp("watched"))
    seen, log = Watched(place), place.path / "output.txt"
    command = place.command("rs_flow", "run", wandb__mode="offline", resources__cpu_workers=2)
    noting = {"PYTHONPATH": str(ROOT / "tests" / "unpickling"), "UNPICKLED": str(place.path / "unpickled.txt")}
    with open(log, "wb") as output:
        run = subprocess.Popen(
            command, cwd=place.path, env=place.environment(**SECRETS, **noting), stdout=output, stderr=output
        )
        while run.poll() is None:
            look({run.pid, *descendants_now(run.pid)}, seen)
            time.sleep(0.05)
    package = place.execute(place.command("rs_flow", "package", "save", str(place.path / "code.tgz")), **SECRETS)
    seen.output = log.read_text() + package.output
    assert run.returncode == 0 and package.status == 0, seen.output
    return seen


def descendants_now(pid: int) -> set[int]:
    try:
        return descendants(pid)
    except OSError:  # one of them has ended meanwhile
        return set()


def look(pids: set[int], seen: Watched) -> None:
    """Note the command lines of processes, and the sockets that they listen at."""
    open_sockets: dict[str, str] = {}
    for pid in pids:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:  # it has ended meanwhile
            continue
        seen.commands.add(command)
        open_sockets |= {link[8:-1]: command for link in links if link.startswith("socket:[")}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENING and words[9] in open_sockets:
                seen.listeners[words[1]] = open_sockets[words[9]]


def test_every_port_of_a_run_is_loopback_s(watched: Watched) -> None:
    assert any("tritonserver" in command for command in watched.listeners.values())  # else nothing was seen
    open_to_others = {a: c for a, c in watched.listeners.items() if not LOOPBACK.fullmatch(a.partition(":")[0])}
    assert open_to_others == {}


def test_no_secret_is_in_a_command_line_but_triton_s_own_key(watched: Watched) -> None:
    assert len(watched.commands) > 5
    for command in watched.commands:
        assert not [secret for secret in PLANTED if secret in command], command
        assert "key=" not in command or "tritonserver" in command.split()[0]


def test_no_secret_is_in_what_a_run_leaves_or_says(watched: Watched) -> None:
    """Run folder, exports, W&B's files, Metaflow's datastore and metadata, the code package, logs, output."""
    wanted = [form for secret in (*PLANTED, *watched.triton_keys) for form in forms(secret.encode())]
    assert watched.triton_keys and not [form for form in wanted if form in watched.output.encode()]
    count = 0
    for path in watched.place.path.rglob("*"):
        if path.is_file() and path.name != "unpickled.txt":
            count += 1
            for layer in layers(path.read_bytes()):
                assert not [form for form in wanted if form in layer], path
    assert count > 100


def forms(secret: bytes) -> Iterator[bytes]:
    """A secret as it is, and inside base64 wherever it may begin there."""
    yield secret
    for shift in range(3):
        yield base64.b64encode(b"\0" * shift + secret)[(0, 4, 4)[shift] : -4]


def layers(data: bytes) -> Iterator[bytes]:
    """A file's bytes, and what is compressed or packed in them."""
    yield data
    for unpack in (gzip.decompress, zlib.decompress):
        try:
            inner = unpack(data)
        except (OSError, EOFError, zlib.error):
            continue
        yield inner
        with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(inner)) as archive:
            yield from (archive.extractfile(member).read() for member in archive if member.isfile())


def test_the_search_would_find_a_secret(tmp_path: Path) -> None:
    hidden = base64.b64encode(b"ab" + PASSWORD.encode() + b"c")
    for data in (hidden, gzip.compress(hidden), zlib.compress(PASSWORD.encode())):
        assert any(form in layer for layer in layers(data) for form in forms(PASSWORD.encode()))


def test_a_run_s_own_code_unpickles_nothing(watched: Watched) -> None:
    """The ranks of a step exchange lists by torch.distributed, Metaflow reads its own artifacts: nothing else."""
    lines = (watched.place.path / "unpickled.txt").read_text().splitlines()
    assert lines  # of the two ranks, which exchange what they scored
    own = [line for line in lines if unpickled_by(line) in ("alignment", "models", "triton_repo", "infra")]
    assert own == []


def unpickled_by(line: str) -> str:
    """The folder of this repository whose code asked for an unpickling, "" for anybody else's.

    Frames are listed outermost first. What Metaflow or torch.distributed reads for itself is theirs, whoever called.
    """
    frames = [frame for frame in line.split()[1:] if not frame.startswith("<")]
    for frame in reversed(frames):
        if "/metaflow/" in frame or "/torch/distributed/" in frame or "/multiprocessing/" in frame:
            return ""
        if frame.startswith(f"{ROOT}/"):
            return Path(frame).relative_to(ROOT).parts[0]
    return ""
