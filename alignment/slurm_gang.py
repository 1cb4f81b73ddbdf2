"""Several nodes of a Slurm allocation for one task: its workers' launcher starts on each of them by one srun.

The task runs on one of the nodes. They meet at the first one, whose address Slurm knows, and each learns its rank from
Slurm (`alignment.slurm_node`).
"""

import os
import re
import subprocess
from collections.abc import Sequence

from alignment.config import Config
from alignment.errors import ConfigError, WorkerError
from alignment.launch import Gang, gang_port
from alignment.slurm_command import HET_GROUP


def allocated_gang(config: Config) -> Gang | None:
    """The nodes of this task's allocation as a gang that this process starts; None where it has one node alone."""
    count = config.slurm.nodes
    if count == 1:
        return None
    group = os.environ.get(HET_GROUP)
    component = f"_HET_GROUP_{group}" if group else ""  # else only this step's nodes stand there
    nodes = _lines("scontrol", "show", "hostnames", os.environ[f"SLURM_JOB_NODELIST{component}"])[:count]
    if len(nodes) < count:
        raise ConfigError(
            f"slurm.nodes ({count}): this allocation has {len(nodes)}: ask for as many (`--nodes` of the component "
            "that the steps run on), or set slurm.nodes to what it has"
        )
    name = f"{os.environ['SLURM_JOB_ID']}/{os.environ['SLURM_STEP_ID']}/{os.getpid()}"
    return Gang(0, count, node_address(nodes[0]), gang_port(name), through=_srun(config, nodes, group))


def node_address(node: str) -> str:
    """The address by which Slurm's daemons reach a node."""
    found = re.search(r"\bNodeAddr=(\S+)", "\n".join(_lines("scontrol", "show", "node", "--oneliner", node)))
    return found[1] if found else node


def _srun(config: Config, nodes: Sequence[str], group: str | None) -> tuple[str, ...]:
    """One task on each of the nodes, beside the one that calls this: they share what the job has."""
    own = config.resources
    gpus = f"--gres=gpu:{own.gpu}" if own.gpu else "--gres=none"
    return (
        *("srun", "--overlap", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1"),
        *(f"--nodelist={','.join(nodes)}", f"--cpus-per-task={own.cpu}", gpus),
        *((f"--het-group={group}",) if group else ()),
        *("--kill-on-bad-exit=1", "--export=ALL"),
    )


def _lines(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise WorkerError(f"{' '.join(command)}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout.splitlines()
