"""The config of runs on Slurm: what a step's job asks for, and what goes with what.

A step that works (all but those that lay out a folder or say how it went) becomes a job, or a job step where the flow
itself runs in an allocation. GPUs, cores and memory are the step's `@resources`. `alignment.slurm_command` makes
Slurm's command of it, `docs/slurm.md` tells how to use it.
"""

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from alignment.config_sections import Clock, Section, clock_seconds

if TYPE_CHECKING:
    from alignment.config import Config

Word = Annotated[str, Field(min_length=1)]
NOTICE_MARGIN_S = 30.0
"""Beyond loop.stop_grace_s, for a task to end after its workers have saved."""
EARLY_S = 60.0
"""How much earlier than asked Slurm may send a notice."""


class SlurmSection(Section):
    enabled: bool = False
    """Whether steps run on Slurm, each as a job of its own; within an allocation (sbatch, salloc) as its job steps."""
    partition: Word | None = None
    """Partition of the jobs, or several with commas; null leaves it to the cluster."""
    account: Word | None = None
    """Account that the jobs are charged to; null leaves it to the cluster."""
    qos: Word | None = None
    """Quality of service of the jobs; null leaves it to the cluster."""
    constraint: Word | None = None
    """Features that a node must have, as in `a100&nvlink`; null takes any."""
    time: Clock | None = None
    """Time limit of a job, DD:HH:MM:SS; null leaves it to the partition. Before it, from loop.stop_grace_s + 90 s on,
    the step saves a checkpoint and, while it has retries, goes on in another job."""
    nodes: int = Field(1, ge=1)
    """Nodes of a colocated iteration, each with resources.gpu workers; more than one need reward.url and a run.root
    that all of them see."""
    retries: int = Field(2, ge=0, le=4)
    """Times that a step is repeated after its job was lost, preempted or out of time; not after an error that would
    only come again. Phases of the disaggregated executor have phases.<phase>.retries."""
    container: Literal["pyxis", "apptainer"] | None = None
    """What runs a step in a container: the Pyxis plugin of Slurm, or apptainer on the node; null is none."""
    image: Word | None = None
    """Image of the container; its `python` must have this project's packages (infra/docker/trainer.Dockerfile)."""
    mounts: tuple[Word, ...] = ()
    """Folders that the container sees besides the sources, the working folder and Metaflow's datastore: run.root and
    reward.repository too where they lie elsewhere. SOURCE or SOURCE:TARGET."""
    extra_args: tuple[Word, ...] = ()
    """Further options of a job of its own, as salloc knows them: `--exclusive`, `--reservation=NAME`."""


def check_slurm(config: "Config") -> None:
    """Raise ValueError where `slurm` does not go with the rest."""
    own = config.slurm
    if own.container and not own.image:
        raise ValueError(f"slurm.container ({own.container}) needs slurm.image: name one, or leave both out")
    if not own.container and (own.image or own.mounts):
        key = "image" if own.image else "mounts"
        raise ValueError(
            f"slurm.{key} ({own.image or ', '.join(own.mounts)}) is read with slurm.container only: set that to pyxis "
            f"or apptainer, or leave slurm.{key} out"
        )
    if own.nodes > 1:
        _check_nodes(config)
    if own.enabled and own.time:
        _check_time(own.time, config.loop.stop_grace_s)
    if own.enabled and config.kubernetes.image:
        raise ValueError(
            f"kubernetes.image ({config.kubernetes.image}) and slurm.enabled both say where steps run: leave one of "
            "them out"
        )
    if own.enabled and config.phases.run_with:
        raise ValueError(
            f"phases.run_with ({', '.join(config.phases.run_with)}) and slurm.enabled both say where phases run: leave "
            "one of them out"
        )
    if own.enabled and config.phases.update_nodes > 1:
        raise ValueError(
            f"phases.update_nodes ({config.phases.update_nodes}) with slurm.enabled: Metaflow would start all nodes "
            "of the update in one job of one node. Set phases.update_nodes=1, or train on slurm.nodes with "
            "loop.executor=colocated"
        )


def _check_time(time: str, grace_s: float) -> None:
    told_s = notice_s(grace_s) + EARLY_S
    if clock_seconds(time) <= told_s:
        raise ValueError(
            f"slurm.time ({time}) must be more than {told_s:g} s, loop.stop_grace_s ({grace_s:g}) + "
            f"{told_s - grace_s:g}: that long before its end a job may be told to save, and one told at once does no "
            "work. Raise the first, with room for the work, or lower the second"
        )


def _check_nodes(config: "Config") -> None:
    own = config.slurm
    if not own.enabled:
        raise ValueError(f"slurm.nodes ({own.nodes}) is read with slurm.enabled only: set that to true, or leave it 1")
    if config.loop.executor == "disaggregated":
        raise ValueError(
            f"slurm.nodes ({own.nodes}) are those of a colocated iteration: set it to 1, or loop.executor=colocated"
        )
    if config.reward.url is None:
        raise ValueError(
            f"slurm.nodes ({own.nodes}) needs reward.url, since a reward server that a step starts answers its own "
            "node alone: start one (infra/slurm/rs_hetjob.sbatch does), or set slurm.nodes=1"
        )
    if config.run.root.startswith("s3://"):
        raise ValueError(
            f"slurm.nodes ({own.nodes}) with run.root ({config.run.root}): the nodes write one checkpoint together, "
            "but under s3:// each has a copy of its own. Set slurm.nodes=1, or run.root to a folder that all nodes see"
        )
    if own.container:
        raise ValueError(
            f"slurm.nodes ({own.nodes}) with slurm.container ({own.container}): the step starts the other nodes with "
            "srun, which a container does not hold. Set slurm.nodes=1, or leave slurm.container out"
        )


def notice_s(grace_s: float) -> int:
    """Seconds before its time limit at which a job asks to be told, for workers that have `grace_s` to save."""
    return math.ceil(grace_s + NOTICE_MARGIN_S)


def slurm_time(clock: str) -> str:
    """DD:HH:MM:SS as Slurm writes it, D-HH:MM:SS."""
    days, hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return f"{days}-{hours:02}:{minutes:02}:{seconds:02}"
