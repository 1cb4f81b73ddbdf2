"""What one reads of runs from outside: their folders, and small files of a run under s3://, without its copy."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from alignment.run_folder import RunFolder
from alignment.s3 import is_s3
from alignment.s3_objects import read_bytes

READ = ("config.json", "metrics.jsonl", "evaluation.json", "report.json")
"""What is read of a run."""


@contextlib.contextmanager
def files_of(run: str) -> Iterator[RunFolder]:
    """A folder with what is read of the run of this path or URI; of one under s3:// a copy. Raises StorageError."""
    if not is_s3(run):
        yield RunFolder(Path(run))
        return
    with tempfile.TemporaryDirectory() as place:
        for name in READ:
            found = read_bytes(f"{run}/{name}")
            if found is not None:
                (Path(place) / name).write_bytes(found[0])
        yield RunFolder(Path(place))
