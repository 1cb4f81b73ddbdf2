"""Ceph's S3 gateway on loopback for the length of a session: one monitor, one OSD in memory, one gateway.

A real S3 server, which checks signatures, Content-MD5 and conditions. All its files lie in one folder and all its ports
are free ones, so that several can run. It ends with the process that started it, whatever ends that one.
"""

import contextlib
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

from daemon_ports import free_ports
from s3_servers import S3Server

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "ceph", "ceph-authtool", "monmaptool", "radosgw-admin", "setpriv")
INSTALL = "apt-get install --no-install-recommends radosgw ceph-mon ceph-osd"
STARTING_S = 180
CONF = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}
public addr = 127.0.0.1
run dir = {folder}
log file = {folder}/$name.log
crash dir = {folder}
keyring = {folder}/keyring
admin socket =
auth cluster required = none
auth service required = none
auth client required = none
ms bind ipv6 = false
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail warn = 1
mon data avail crit = 1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 4294967296
[mon.a]
mon data = {folder}/mon
public addr = 127.0.0.1:{mon_port}
[osd.0]
osd data = {folder}/osd
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw enable usage log = false
rgw dns name = localhost
"""


def why_not() -> str:
    """Why Ceph cannot be started here; "" where it can."""
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(lacking)} not installed: {INSTALL}" if lacking else ""


@contextlib.contextmanager
def ceph(folder: Path) -> Iterator[S3Server]:
    """A gateway with one user; its files are in `folder`, which must not exist yet."""
    with contextlib.ExitStack() as daemons:
        port, gateway = _start(folder, daemons)
        url = f"http://127.0.0.1:{port}"
        _wait_for(url, gateway, folder)
        yield S3Server(url, "cephkey", "cephsecret")


def _start(folder: Path, daemons: contextlib.ExitStack) -> tuple[int, subprocess.Popen[bytes]]:
    """The gateway's port and process."""
    for name in ("mon", "osd"):
        (folder / name).mkdir(parents=True)
    fsid, osd, (mon_port, port) = str(uuid.uuid4()), str(uuid.uuid4()), free_ports(2)
    (folder / "ceph.conf").write_text(CONF.format(fsid=fsid, folder=folder, mon_port=mon_port, port=port))
    keyring, monmap = str(folder / "keyring"), str(folder / "monmap")
    _run(folder, "ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    everything = [part for service in ("mon", "osd") for part in ("--cap", service, "allow *")]
    _run(folder, "ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *everything)
    _run(folder, "monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{mon_port}]", monmap)
    _run(folder, "ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
    _daemon(folder, daemons, "ceph-mon", "-i", "a")
    _run(folder, "ceph", "osd", "new", osd)
    _run(folder, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
    _run(folder, "ceph", "osd", "crush", "add", "osd.0", "1", "root=default")
    _start_osd(folder, daemons)
    gateway = _daemon(folder, daemons, "radosgw", "-n", "client.rgw")
    keys = ["--access-key=cephkey", "--secret-key=cephsecret"]
    _run(folder, "radosgw-admin", "user", "create", "--uid=tests", "--display-name=tests", *keys)
    return port, gateway


def _start_osd(folder: Path, daemons: contextlib.ExitStack) -> None:
    """Start the OSD and wait for it. Now and then it ends at once: it asks the monitor before it knows the cluster."""
    log, give_up_at = folder / "osd.0.log", time.monotonic() + STARTING_S
    process = _daemon(folder, daemons, "ceph-osd", "-i", "0")
    while "state: booting -> active" not in (log.read_text(errors="replace") if log.exists() else ""):
        assert time.monotonic() < give_up_at, f"the OSD does not come up: see {log}"
        if process.poll() is not None:
            process = _daemon(folder, daemons, "ceph-osd", "-i", "0")
        time.sleep(0.2)


def _run(folder: Path, *command: str) -> None:
    done = subprocess.run(
        [command[0], "-c", str(folder / "ceph.conf"), *command[1:]] if _takes_conf(command[0]) else command,
        cwd=folder, text=True, capture_output=True, timeout=STARTING_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}"


def _takes_conf(program: str) -> bool:
    return program not in ("ceph-authtool", "monmaptool")


def _daemon(folder: Path, daemons: contextlib.ExitStack, program: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a program in the foreground; the kernel kills it when this process ends."""
    with open(folder / f"{program}.out", "wb") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", program, "-f", "-c", str(folder / "ceph.conf"), *arguments],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    daemons.callback(process.wait)
    daemons.callback(process.send_signal, signal.SIGKILL)
    return process


def _wait_for(url: str, gateway: subprocess.Popen[bytes], folder: Path) -> None:
    opener, give_up_at = urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic() + STARTING_S
    while True:
        # Else another server might answer at a port that the gateway did not get.
        assert gateway.poll() is None, f"the gateway has ended: see {folder}/*.log"
        try:
            opener.open(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError) as error:
            assert time.monotonic() < give_up_at, f"{url} does not answer: {error}; see {folder}/*.log"
            time.sleep(0.2)
