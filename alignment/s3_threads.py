"""A few threads for what waits on the network."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

THREADS = 4
"""Parts of a file, or small files, in flight."""

Item = TypeVar("Item")


def in_parallel(act: Callable[[Item], object], items: Iterable[Item], threads: int = THREADS) -> None:
    """`act` on each item, by a few threads. The first error ends it: what has not begun is left out."""
    pool = ThreadPoolExecutor(threads)
    try:
        for done in as_completed([pool.submit(act, item) for item in items]):
            done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def serialised(report: Callable[[int], object] | None) -> Callable[[int], None]:
    """`report` for use by several threads, one at a time; None becomes a function that does nothing."""
    lock = threading.Lock()

    def locked(count: int) -> None:
        if report is not None:
            with lock:
                report(count)

    return locked
