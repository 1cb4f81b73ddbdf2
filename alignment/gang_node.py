"""torch.distributed.run for the ranks of one node of a gang: the same command line, but it ends with its owner.

While it waits for other nodes it has no ranks that would see to that.
"""

import sys


def main() -> None:
    """The command line of torch.distributed.run."""
    from alignment.lifeline import end_with_stdin

    end_with_stdin()
    from torch.distributed.run import main as run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
