"""On PYTHONPATH, this stands in for a wall clock that jumps: Python's `time.time` adds the seconds that a file holds.

JUMPING_CLOCK names the file. Processes that are not Python's keep the machine's clock, as does the monotonic one. So
does grpc, which hands what it reads to a library in C that compares it with the machine's.
"""

import os
import sys
import time


def put_in_front(path: str) -> None:
    """From now on this process reads the clock with that file's offset."""
    real, real_ns = time.time, time.time_ns

    def offset_s() -> int:
        with open(path) as file:
            return int(file.read())

    def jumping() -> float:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return real() if caller.partition(".")[0] == "grpc" else real() + offset_s()

    time.time = jumping
    time.time_ns = lambda: real_ns() + offset_s() * 10**9


if "JUMPING_CLOCK" in os.environ:
    put_in_front(os.environ["JUMPING_CLOCK"])
