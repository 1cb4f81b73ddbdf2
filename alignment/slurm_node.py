"""torch.distributed.run for the ranks of one node of a Slurm allocation: the same command line, its rank apart.

Its standard input is the owner's, by way of srun. At its end it passes a request to stop on to the ranks and waits for
them: Slurm kills whatever outlives the first process that it started.
"""

import os
import signal
import sys


def main() -> None:
    """The command line of torch.distributed.run; --node-rank comes from Slurm."""
    from alignment.lifeline import act_with_stdin

    act_with_stdin(lambda: os.kill(os.getpid(), signal.SIGTERM))
    from torch.distributed.run import main as run

    run(["--node-rank", os.environ["SLURM_NODEID"], *sys.argv[1:]])


if __name__ == "__main__":
    main()
