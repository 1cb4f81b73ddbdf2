"""The GPUs of a node that tasks of a run share: how many there are, and one for each task.

Tasks that a cluster starts have been given theirs. On one node without a scheduler all of them see all GPUs, and each
would take the first.
"""

import fcntl
import os
import time
from pathlib import Path


def gpu_count() -> int:
    """The GPUs that torch sees here."""
    import torch

    return torch.cuda.device_count()


def take_gpu(folder: Path) -> None:
    """Leave this process one GPU of those it sees, which no other task of the run in `folder` has until this one ends.

    Call it before anything is put on a GPU. Waits where all are taken.
    """
    count = gpu_count()
    if count > 1:
        names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = names[hold_one(folder, count)]


def hold_one(folder: Path, count: int, poll_s: float = 1.0) -> int:
    """The first of `count` numbers that no other process holds by a lock in `folder`; until this process ends."""
    while True:
        for number in range(count):
            # Not closed: with the last process that has the file open, children among them, the lock goes.
            file = os.open(folder / f".gpu-{number}.lock", os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                continue
            return number
        time.sleep(poll_s)
