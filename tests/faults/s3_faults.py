"""S3 for a campaign: moto as a stand-in for it, behind a proxy that answers 500, is silent, cuts and loses answers."""

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alignment.run_folder import RunFolder
from faults.plan import CUT, LOST
from flaky_proxy import Fault, FlakyProxy
from s3_servers import S3Server, moto

SILENT_S = 3.0
"""Longer than the owner of a run waits for an answer (`owner.py`)."""
BYTES = 400
"""Where connections are cut: within an answer's head, or in the body of all but the smallest requests."""


@dataclass(frozen=True)
class Bucket:
    """A bucket of its own on the campaign's server, and the proxy through which its run goes there."""

    uri: str
    proxy: FlakyProxy
    server: S3Server

    def environment(self) -> dict[str, str]:
        """What makes boto3 go through the proxy."""
        return self.server.environment(self.proxy.url)

    def requests(self) -> int:
        """How many there were so far."""
        return len(self.proxy.requests)

    def fail(self, how: str, times: int) -> str:
        """The next `times` requests have a fault."""
        fault = {
            "500": Fault(status=500),
            "503": Fault(status=503),
            "time-out": Fault(delay_s=SILENT_S),
            CUT: Fault(cut_up=BYTES, cut_down=BYTES),
            LOST: Fault(cut_down=0),
        }[how]
        self.proxy.fail(fault, times)
        return f"{how} for {times} requests after {self.requests()}"

    def fetch(self, uri: str, place: Path) -> RunFolder:
        """The run as S3 holds it, through no proxy."""
        from alignment.s3_folders import pull_folder

        before = {name: os.environ.get(name) for name in self.server.environment()}
        os.environ |= self.server.environment()
        try:
            pull_folder(uri, place)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        return RunFolder(place)


@contextlib.contextmanager
def bucket() -> Iterator[Bucket]:
    """A new bucket, its server and its proxy, for as long as the context lasts."""
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request

    with moto() as server, FlakyProxy(server.url) as proxy:
        name = f"faults-{uuid.uuid4().hex[:12]}"
        keys = {"aws_access_key_id": server.access_key, "aws_secret_access_key": server.secret_key}
        boto3.client("s3", endpoint_url=server.url, region_name="us-east-1", **keys).create_bucket(Bucket=name)
        yield Bucket(f"s3://{name}", proxy, server)
