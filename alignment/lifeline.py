"""Processes that must not outlive their owner, kill -9 of the owner included.

A child holds the reading end of a pipe as its standard input and nothing is ever written to it: when the
owner is gone, for whatever reason, the read returns and the child ends itself. Grandchildren inherit the
pipe (torch.distributed.run hands its standard input on), so a whole tree hangs on one line.
"""

import os
import sys
import threading
import time

ORPHANED = 113
"""Exit status of a process that ended because its owner was gone."""


def end_with_stdin() -> None:
    """From now on, end this process as soon as its standard input reaches its end."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def end_with_parent(poll_s: float = 0.5) -> None:
    """From now on, end this process as soon as its parent is gone (for processes that did not get a pipe)."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_s)
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
