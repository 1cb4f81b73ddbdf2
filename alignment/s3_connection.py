"""The boto3 client of this process, and requests whose answers are whole.

Keys, region, profile and endpoint are those that boto3 itself reads (AWS_ACCESS_KEY_ID, AWS_PROFILE,
AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, ~/.aws/config).

Checksums are Content-MD5 for what is sent and sha256 in the object's metadata for what it holds. The CRC trailers that
boto3 adds by default are off: older gateways (seen: Ceph 16) ignore x-amz-checksum-* headers, and a wrong one passes.
"""

import ipaddress
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from alignment.errors import ConfigError

ATTEMPTS = 7
"""Tries of one request: on a lost connection, a time-out, 500, 502, 503, 504 and throttling. The pauses grow from a
second at most to 32, half a minute together. boto3's newer retry modes give a client one budget for its whole life,
which a single outage with four threads uses up: from then on nothing would be tried again."""
STREAM_PAUSE_S = 0.5
"""Before an answer that broke off is asked for again, times the number of times that it did."""
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 60
CONNECTIONS = 32
"""Kept open by one client; beyond it connections are made and closed again."""


def s3_client() -> Any:
    """The boto3 client of this process for the environment as it is now. It may be used by several threads."""
    aws = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _client(os.getpid(), aws)


@lru_cache(maxsize=4)
def _client(pid: int, aws: tuple[tuple[str, str], ...]) -> Any:
    # By process, since connections must not be shared after a fork; by environment, since that chooses keys and server.
    import boto3
    from botocore.config import Config

    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        parts = urlsplit(os.environ.get(name, ""))
        if parts.geturl() and not (parts.scheme in ("http", "https") and parts.hostname):
            # Not its value, which may hold a password.
            raise ConfigError(f"{name} is no address of a server: expected http://HOST:PORT or https://HOST")
    session = boto3.Session()
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
        retries={"mode": "legacy", "total_max_attempts": ATTEMPTS},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = session.region_name or "us-east-1"  # what stores other than AWS's expect where none is named
    client = session.client("s3", region_name=region, config=config)
    if getproxies() and _is_loopback(client.meta.endpoint_url):
        client = session.client("s3", region_name=region, config=config.merge(Config(proxies={})))
    return client


def endpoint() -> str:
    """The server's address without a user's name and password, for messages."""
    from botocore.exceptions import BotoCoreError

    try:
        parts = urlsplit(s3_client().meta.endpoint_url)
    except (BotoCoreError, ValueError, ConfigError):
        return "the server"
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}"


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def answered(request: Callable[..., Any], *fields: str, **arguments: Any) -> Any:
    """A request's answer, which has these fields whole.

    Python's HTTP client takes an answer whose head was cut off for a whole one with fewer fields; it is asked for
    again. A cut in an ETag shows by its closing quote. boto3 counts its tries in an error's "RetryAttempts"; these are
    added there. Raises botocore's errors.
    """
    from botocore.exceptions import ClientError, ResponseStreamingError
    from botocore.parsers import ResponseParserError

    for tries in range(1, ATTEMPTS + 1):
        try:
            answer = request(**arguments)
        except ClientError as error:
            metadata = error.response["ResponseMetadata"]
            metadata["RetryAttempts"] = metadata.get("RetryAttempts", 0) + tries - 1
            raise
        except (ValueError, ResponseParserError):  # the cut fell into a date, or into XML of no stated length
            answer = {}
        if answer and _is_whole(answer, fields):
            return answer
        if "Body" in answer:
            answer["Body"].close()
        if hasattr(arguments.get("Body"), "seek"):
            arguments["Body"].seek(0)
        pause_after(tries)
    raise ResponseStreamingError(error=f"answers without {fields}")


def pause_after(failures: int) -> None:
    """Wait before an answer that broke off is asked for again: boto3 does so for requests, but not for their bodies."""
    time.sleep(STREAM_PAUSE_S * failures)


def _is_whole(answer: Mapping[str, Any], fields: Sequence[str]) -> bool:
    return all(field in answer for field in fields) and ("ETag" not in fields or answer["ETag"].endswith('"'))
