"""moto as a stand-in for S3, over HTTP on loopback: of conditional writes and checksums it does what S3 does."""

from collections.abc import Iterator
from contextlib import contextmanager

BUCKET = "bucket"


@contextmanager
def moto(secret: str = "any") -> Iterator[dict[str, str]]:
    """A server in this process with one bucket; yields the environment that makes boto3 use it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket=BUCKET)
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()
