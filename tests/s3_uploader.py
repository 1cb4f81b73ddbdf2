"""A process of its own that moves one file: `python s3_uploader.py upload|download URI PATH`; prints its memory in kB.

The first number is the peak before the transfer, with boto3 and its client loaded, the second the peak after it.
"""

import resource
import sys
from pathlib import Path

from alignment.s3_objects import stat_object
from alignment.s3_transfer import download_file, upload_file


def peak_kb() -> int:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    action, uri, path = sys.argv[1:]
    stat_object(uri)
    before = peak_kb()
    if action == "upload":
        upload_file(Path(path), uri)
    else:
        download_file(uri, Path(path))
    print(before, peak_kb())
