"""Fixtures: a new bucket on moto and on Ceph, and a proxy with faults before either."""

from collections.abc import Iterator

import pytest

from ceph import ceph, why_not
from flaky_proxy import FlakyProxy
from s3_servers import S3Server, moto, new_bucket, use


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Server]:
    """A stand-in for S3."""
    with moto() as server:
        yield server


@pytest.fixture(scope="session")
def ceph_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server; tests that need one are skipped where it is not installed."""
    if why_not():
        pytest.skip(why_not())
    with ceph(tmp_path_factory.mktemp("ceph") / "files") as server:
        yield server


@pytest.fixture(params=["moto", "ceph"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://…` of a new bucket, on one server and then on the other; boto3 of this process uses it."""
    use(request.getfixturevalue(f"{request.param}_server"), monkeypatch)
    return new_bucket()


@pytest.fixture
def server_name(bucket: str, request: pytest.FixtureRequest) -> str:
    """The server of `bucket`: "moto" or "ceph"."""
    return request.node.callspec.params["bucket"]


@pytest.fixture
def flaky(server_name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    """A proxy before the server of `bucket`; boto3 of this process goes through it, with short pauses between tries."""
    from botocore import retryhandler

    from alignment import s3_connection

    monkeypatch.setattr(retryhandler, "delay_exponential", lambda base, growth_factor, attempts: 0.02)
    monkeypatch.setattr(s3_connection, "STREAM_PAUSE_S", 0.02)
    server: S3Server = request.getfixturevalue(f"{server_name}_server")
    with FlakyProxy(server.url) as proxy:
        use(server, monkeypatch, proxy.url)
        yield proxy
