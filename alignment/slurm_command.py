"""What runs a step's task on Slurm: the words of a command, in front of the task's own.

    a job of its own       salloc JOB srun TASK [apptainer …] python flow.py step …
    within an allocation   srun TASK [apptainer …] python flow.py step …

salloc holds the nodes and srun runs the task on the first of them: with several nodes the task itself starts what runs
on all of them (`alignment.slurm_gang`). srun passes its standard input on, and salloc its own to srun, so that the task
sees when its owner has ended. `infra/slurm/attend.py` stands in front of it all.
"""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alignment.config_slurm import notice_s, slurm_time

HET_GROUP = "RS_HET_GROUP"
"""Environment variable: the component of a heterogeneous job on which steps run; else they run on the first."""
NOTICE = signal.SIGURG
"""What Slurm sends before the time limit. All processes of a task get it, and those that await nothing ignore it."""


@dataclass(frozen=True, slots=True)
class SlurmTask:
    """A step's task on Slurm; `None` and empty leave a thing to the cluster.

    `cpu`, `gpu` and `memory` (MB) are each node's. `time` is DD:HH:MM:SS; `grace_s` the seconds before its end at which
    the task is told. `sources` are the folders that a container must see, the working folder last.
    """

    name: str
    cpu: int
    gpu: int
    memory: int
    grace_s: float
    nodes: int = 1
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    container: str | None = None
    image: str | None = None
    mounts: Sequence[str] = ()
    extra_args: Sequence[str] = ()
    sources: Sequence[str] = ()


def command(task: SlurmTask, words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """`words`, a Python and its arguments, as the task's command on Slurm."""
    inside = "SLURM_JOB_ID" in environment
    in_front = step_words(task, environment.get(HET_GROUP)) if inside else [*job_words(task), *step_words(task)]
    if task.container is None:
        return [*in_front, *words]
    return [*in_front, *_container_words(task), "python", *words[1:]]  # the image's, whatever is installed here


def job_words(task: SlurmTask) -> list[str]:
    """salloc with what the job asks for."""
    asked = {
        "job-name": task.name,
        "nodes": task.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": task.cpu,
        "mem": f"{task.memory}M",
        "gres": f"gpu:{task.gpu}" if task.gpu else None,
        "partition": task.partition,
        "account": task.account,
        "qos": task.qos,
        "constraint": task.constraint,
        "time": slurm_time(task.time) if task.time else None,
        "signal": f"{int(NOTICE)}@{notice_s(task.grace_s)}",
    }
    return ["salloc", *(f"--{key}={value}" for key, value in asked.items() if value is not None), *task.extra_args]


def step_words(task: SlurmTask, het_group: str | None = None) -> list[str]:
    """srun with what the task asks for of its allocation: of one node, where it shall run itself."""
    words = ["srun", f"--job-name={task.name}", "--nodes=1", "--ntasks=1", f"--cpus-per-task={task.cpu}"]
    words += [f"--mem={task.memory}M", f"--gres=gpu:{task.gpu}" if task.gpu else "--gres=none"]
    words += [f"--het-group={het_group}"] if het_group else []
    # Output is passed on by lines, as it comes; a task that ends badly ends its step.
    words += ["--kill-on-bad-exit=1", "--export=ALL"]
    if task.container == "pyxis":
        mounts = ",".join(source if ":" in source else f"{source}:{source}" for source in _mounted(task))
        words += [f"--container-image={task.image}", f"--container-mounts={mounts}"]
        words += [f"--container-workdir={one}" for one in task.sources[-1:]]
    return words


def _container_words(task: SlurmTask) -> list[str]:
    if task.container != "apptainer":
        return []
    binds = [word for source in _mounted(task) for word in ("--bind", source)]
    place = [word for one in task.sources[-1:] for word in ("--pwd", one)]
    return ["apptainer", "exec", *(["--nv"] if task.gpu else []), *binds, *place, str(task.image)]


def _mounted(task: SlurmTask) -> list[str]:
    return [*dict.fromkeys([*task.sources, *task.mounts])]
