"""On PYTHONPATH, this notes every class that unpickling names, in each process of a run, and which code asked for it.

UNPICKLED names the file that is appended to.
"""

import os
import sys
import traceback
from typing import Any


def hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "pickle.find_class":
        return
    frames = [frame.filename for frame in traceback.extract_stack(limit=60)]
    with open(os.environ["UNPICKLED"], "a") as file:
        file.write(f"{arguments[0]}.{arguments[1]} {' '.join(frames)}\n")


if "UNPICKLED" in os.environ:
    sys.addaudithook(hear)
