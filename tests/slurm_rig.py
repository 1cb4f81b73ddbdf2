"""A real Slurm on this machine: a controller and several nodes at one address, each with 8 GPUs that are stand-ins.

A GPU is a device node that swallows what is written to it: Slurm hands it out and takes it back, nothing can compute on
it. The daemons run in the foreground and end with the process that started them; jobs are cancelled before.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from daemon_ports import free_ports
from flow_runs import wait_for

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "salloc", "sbatch", "scontrol", "squeue", "setpriv")
INSTALL = "apt-get install --no-install-recommends slurm-wlm munge, or make test-clusters"
GPUS = 8
STARTING_S = 60
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/finished-jobs.log
GresTypes=gpu
KillWait=20
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""
PARTITIONS = """
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def why_not() -> str:
    """Why Slurm cannot be started here; "" where it can."""
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed: {INSTALL}"
    return "" if os.geteuid() == 0 else "the daemons and their device nodes need root"


@dataclass
class Slurm:
    """A cluster that is up; `nodes` are n1, n2, …"""

    folder: Path
    nodes: tuple[str, ...]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find it."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands says."""
        done = subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def queue(self, what: str = "%i") -> list[str]:
        """A line for each job that waits, runs or is ending, in the format of squeue."""
        return self.ask("squeue", "--noheader", "--format", what).split("\n")[:-1]

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "show", "job", "--oneliner", job_id)))

    def lose(self, node: str) -> None:
        """The node's daemon and whatever runs there are gone at once, and Slurm learns of it."""
        self.daemons.pop(node).kill()
        steps = [pid for pid in _processes() if f"SLURMD_NODENAME={node}" in _environment(pid)]
        for pid in [*_parents(steps), *steps]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def bring_back(self, node: str) -> None:
        """The node is there again, idle."""
        start_node(self, node)

        def is_idle() -> bool:
            state = self.ask("sinfo", "--noheader", "--partition", "gpu", "--nodes", node, "--format", "%t").strip()
            if state.startswith("down"):  # until the daemon has registered it stays so, whoever resumes it
                self.ask("scontrol", "update", f"nodename={node}", "state=resume")
            time.sleep(0.2)
            return state == "idle"

        wait_for(is_idle, STARTING_S, f"{node} idle")


@contextlib.contextmanager
def slurm(folder: Path, count: int = 3) -> Iterator[Slurm]:
    """A cluster of `count` nodes; its files are in `folder`, which must not exist yet."""
    for name in ("dev", "state", "spool", "munge"):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o700)
    nodes = tuple(f"n{i + 1}" for i in range(count))
    cluster, ports = Slurm(folder, nodes), free_ports(count + 1)
    _write_configs(cluster, ports)
    try:
        _start(cluster)
        yield cluster
        with contextlib.suppress(AssertionError):
            cluster.ask("scancel", "--user", "root")
            wait_for(lambda: not cluster.queue(), STARTING_S, "an empty queue")
    finally:
        for daemon in cluster.daemons.values():
            daemon.kill()
            daemon.wait()


def _write_configs(cluster: Slurm, ports: list[int]) -> None:
    folder, host = cluster.folder, socket.gethostname().partition(".")[0]
    for k in range(GPUS):
        os.mknod(folder / "dev" / f"nvidia{k}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    lines, gpus = [CONF.format(folder=folder, host=host, port=ports[0])], []
    for node, port in zip(cluster.nodes, ports[1:], strict=True):
        (folder / "spool" / node).mkdir()
        place = f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
        lines.append(f"{place} CPUs=16 RealMemory=8000 Gres=gpu:{GPUS} State=UNKNOWN")
        gpus.append(f"NodeName={node} Name=gpu File={folder}/dev/nvidia[0-{GPUS - 1}] Flags=nvidia_gpu_env")
    (folder / "slurm.conf").write_text("\n".join([*lines, PARTITIONS]))
    (folder / "gres.conf").write_text("\n".join(gpus) + "\n")


def _start(cluster: Slurm) -> None:
    munge = cluster.folder / "munge"
    files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
    _daemon(cluster, "munged", "munged", "--foreground", "--force", f"--socket={munge}/socket", *files)
    wait_for((munge / "socket").exists, STARTING_S, "munged")
    _daemon(cluster, "slurmctld", "slurmctld", "-D", "-f", str(cluster.folder / "slurm.conf"))
    for node in cluster.nodes:
        start_node(cluster, node)

    def all_idle() -> bool:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--states=idle", "--partition=gpu", "--format=%N"],
            env={**os.environ, **cluster.environment}, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout.split() == list(cluster.nodes)

    wait_for(all_idle, STARTING_S, f"{len(cluster.nodes)} idle nodes; logs are in {cluster.folder}")


def start_node(cluster: Slurm, node: str) -> None:
    """Start the daemon of a node."""
    _daemon(cluster, node, "slurmd", "-D", "-f", str(cluster.folder / "slurm.conf"), "-N", node)


def _daemon(cluster: Slurm, name: str, program: str, *arguments: str) -> None:
    """Start a program in the foreground; the kernel kills it when this process ends."""
    with open(cluster.folder / f"{name}.log", "ab") as log:
        cluster.daemons[name] = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", program, *arguments],
            env={**os.environ, **cluster.environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _environment(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "environ").read_bytes().decode(errors="replace").split("\0")
    return []


def _parents(pids: list[int]) -> list[int]:
    """The slurmstepd processes above them."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            parent = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
            if (Path("/proc") / str(parent) / "comm").read_text().strip() == "slurmstepd":
                found.add(parent)
    return sorted(found)
