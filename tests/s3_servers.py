"""S3 servers for tests: moto as a stand-in, which every `make test` has, and Ceph where it is installed."""

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

VARIABLES = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_CONFIG_FILE", "AWS_MAX_ATTEMPTS")


@dataclass(frozen=True)
class S3Server:
    """Where a server is, and keys that it knows."""

    url: str
    access_key: str
    secret_key: str

    def environment(self, url: str | None = None) -> dict[str, str]:
        """What makes boto3 use it, by way of a proxy at `url` where one is given."""
        return {
            "AWS_ENDPOINT_URL": url or self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextlib.contextmanager
def moto() -> Iterator[S3Server]:
    """A stand-in for S3 in this process. It takes any keys, and looks at no checksum."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"http://{host}:{port}", "any", "any")
    finally:
        server.stop()


def use(server: S3Server, monkeypatch: pytest.MonkeyPatch, url: str | None = None) -> None:
    """Let this process's boto3 use a server."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment(url).items():
        monkeypatch.setenv(name, value)


def new_bucket() -> str:
    """`s3://…` of a new bucket on the server that is in use."""
    from alignment.s3_connection import s3_client

    name = f"tests-{uuid.uuid4().hex[:12]}"
    s3_client().create_bucket(Bucket=name)
    return f"s3://{name}"


def object_metadata(uri: str) -> dict[str, Any]:
    """What a HEAD says of an object."""
    from alignment.s3 import parse_uri
    from alignment.s3_connection import s3_client

    location = parse_uri(uri)
    return s3_client().head_object(Bucket=location.bucket, Key=location.key)
