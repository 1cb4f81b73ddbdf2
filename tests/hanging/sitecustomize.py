"""On PYTHONPATH, this stands in for a node that hangs: the first attempt at one shard stops in the middle of its step.

HANGING_SHARD names the shard by its index; the step hangs when it imports what samples.
"""

import itertools
import os
import sys
import time
from typing import Any


def hang(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "import" or arguments[0] != "alignment.rollout_engine":
        return
    options = dict(itertools.pairwise(sys.argv))
    if options.get("--split-index") == os.environ["HANGING_SHARD"] and options["--retry-count"] == "0":
        time.sleep(3600)


if "HANGING_SHARD" in os.environ:
    sys.addaudithook(hang)
