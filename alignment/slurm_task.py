"""A step's task on a node of the cluster: how it ends in order, whoever wants it to end.

    its owner has ended (Ctrl-C, SIGTERM or kill -9 of Metaflow)   its standard input ends
    the time limit is near                                         NOTICE
    scancel, preemption                                            SIGTERM

All of them interrupt it as Ctrl-C would, once: the workers save, and their launcher waits for that.
"""

import os
import signal
from collections.abc import Mapping
from types import FrameType

from alignment.launch import GRACE_MARGIN_S
from alignment.lifeline import interrupt_with_stdin
from alignment.slurm_command import NOTICE

RECORDED = {
    "slurm_job_id": "SLURM_JOB_ID",
    "slurm_step_id": "SLURM_STEP_ID",
    "slurm_node": "SLURMD_NODENAME",
    "slurm_nodes": "SLURM_JOB_NODELIST",
    "slurm_partition": "SLURM_JOB_PARTITION",
    "slurm_cluster": "SLURM_CLUSTER_NAME",
}
"""Metadata of a task, and the environment variables that hold it there."""


def end_in_order(grace_s: float) -> None:
    """From now on, interrupt this task once when it shall end; by force a margin beyond `grace_s` later."""
    asked: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if not asked:  # a second one would interrupt the waiting for workers
            asked.append(number)
            raise KeyboardInterrupt(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM, NOTICE):
        signal.signal(number, interrupt)
    if os.getpgrp() != os.getpid():  # what is interrupted with this process is its own
        os.setpgid(0, 0)
    interrupt_with_stdin(grace_s + 2 * GRACE_MARGIN_S)


def recorded(environment: Mapping[str, str]) -> dict[str, str]:
    """Where this task runs, for its metadata."""
    return {name: environment[variable] for name, variable in RECORDED.items() if variable in environment}
