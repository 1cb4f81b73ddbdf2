"""The way to S3 and to whatever speaks its protocol: names, the client, and its errors as messages with a remedy.

Keys, region, profile and endpoint are those that boto3 itself reads (AWS_ACCESS_KEY_ID, AWS_PROFILE,
AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, ~/.aws/config). What is done with objects is in `s3_objects` (small ones, lists),
`s3_transfer` (files), `s3_folders` and `s3_pointers`.

Checksums are Content-MD5 for what is sent and sha256 in the object's metadata for what it holds. The CRC trailers that
boto3 adds by default are off: older gateways (seen: Ceph 16) ignore x-amz-checksum-* headers, and a wrong one passes.
"""

import contextlib
import ipaddress
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from alignment.errors import AlignmentError, ConfigError, StorageConflict, StorageError

SCHEME = "s3://"
ATTEMPTS = 7
"""Tries of one request: on a lost connection, a time-out, 500, 502, 503, 504 and throttling. The pauses grow from a
second at most to 32, half a minute together. boto3's newer retry modes give a client one budget for its whole life,
which a single outage with four threads uses up: from then on nothing would be tried again."""
STREAM_PAUSE_S = 0.5
"""Before an answer that broke off is asked for again, times the number of times that it did."""
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 60
CONNECTIONS = 32
"""Kept open by one client; beyond it connections are made and closed again."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]")
_USER = re.compile(r"://[^/@\s]*@")
"""A user's name and password in an address."""
_ABSENT = {"404", "NoSuchKey"}
_KEYS = (
    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) and that they belong to the server behind "
    "AWS_ENDPOINT_URL"
)
_EXPIRED = "log in anew (`aws sso login`) or take fresh temporary keys, AWS_SESSION_TOKEN included"
_CODES = {
    "InvalidAccessKeyId": ("the access key is not known there", _KEYS),
    "SignatureDoesNotMatch": ("the secret key does not belong to the access key", _KEYS),
    "AccessDenied": ("access denied", "let these keys do it in the bucket's policy, or use others"),
    "AllAccessDisabled": ("access denied", "let these keys do it in the bucket's policy, or use others"),
    "403": ("access denied", f"{_KEYS}, and that the bucket's policy lets them do it"),
    "ExpiredToken": ("the session token has expired", _EXPIRED),
    "InvalidToken": ("the session token is not valid", _EXPIRED),
    "RequestTimeTooSkewed": ("this machine's clock differs too much from the server's", "set it right (NTP)"),
    "RequestExpired": ("this machine's clock differs too much from the server's", "set it right (NTP)"),
    "NoSuchBucket": ("there is no such bucket", "create it (`aws s3 mb`), or correct its name or AWS_ENDPOINT_URL"),
    "NoSuchKey": ("there is no such object", "check the name"),
    "404": ("there is no such bucket or object", "check the name and AWS_ENDPOINT_URL"),
    "PermanentRedirect": ("the bucket is in another region", "set AWS_DEFAULT_REGION to the bucket's"),
    "AuthorizationHeaderMalformed": ("the bucket is in another region", "set AWS_DEFAULT_REGION to the bucket's"),
    "301": ("the bucket is in another region", "set AWS_DEFAULT_REGION to the bucket's"),
    "QuotaExceeded": ("the quota is used up", "delete what is not needed, or ask for a higher quota"),
    "BadDigest": ("what arrived was not what was sent, or the file changed meanwhile", "try again"),
    "SlowDown": ("the server is overloaded", "try again later"),
}
_TRANSIENT = "the server failed"


@dataclass(frozen=True)
class Location:
    """A bucket and a key in it; the key of a bucket's root is ""."""

    bucket: str
    key: str

    @property
    def uri(self) -> str:
        """`s3://bucket/key`."""
        return f"{SCHEME}{self.bucket}/{self.key}"


def is_s3(uri: str) -> bool:
    """Whether a name is an `s3://` one."""
    return uri.startswith(SCHEME)


def parse_uri(uri: str) -> Location:
    """Bucket and key of `s3://bucket/key`; an ending slash is dropped. Raises ConfigError."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not is_s3(uri) or not _BUCKET.fullmatch(bucket):
        raise ConfigError(
            f"{uri}: expected s3://bucket/key; a bucket's name has 3 to 63 lower-case letters, digits, dots and hyphens"
        )
    key = key.rstrip("/")
    if any(part in ("", ".", "..") for part in key.split("/")) and key:
        raise ConfigError(f"{uri}: the key has an empty part, `.` or `..`; write it without")
    return Location(bucket, key)


def below(uri: str, name: str) -> str:
    """The name of an object below `uri`, as a path is joined."""
    return f"{uri.rstrip('/')}/{name}"


def object_location(uri: str) -> Location:
    """The location of one object. Raises ConfigError for a bucket's root."""
    location = parse_uri(uri)
    if not location.key:
        raise ConfigError(f"{uri}: names a bucket; expected s3://bucket/key of one object")
    return location


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


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turns boto3's errors in the body into a StorageError: the name, the cause, the remedy, never a key.

    A condition that did not hold (412, and 409 while another writes) is a StorageConflict.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise _refusal(uri, error) from error
    except BotoCoreError as error:
        inner = error.kwargs.get("error") if hasattr(error, "kwargs") else None
        if isinstance(inner, AlignmentError):  # of the file that was being sent
            raise inner from error
        raise StorageError(f"{uri}: {_failure(error)}") from error


def error_code(error: Any) -> str:
    """S3's code of a ClientError; a HEAD has no body, so that its code is the status, as in "404"."""
    return str(error.response.get("Error", {}).get("Code", ""))


def error_status(error: Any) -> int:
    """The HTTP status of a ClientError."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_broken_connection(error: BaseException) -> bool:
    """Whether there is no connection, or it broke or stalled, so that trying again may help."""
    from botocore import exceptions as known

    broken = known.HTTPClientError | known.ConnectionError | known.IncompleteReadError
    return isinstance(error, broken) and not isinstance(error, known.SSLError)


def pause_after(failures: int) -> None:
    """Wait before an answer that broke off is asked for again: boto3 does so for requests, but not for their bodies."""
    time.sleep(STREAM_PAUSE_S * failures)


def is_absent(error: Any) -> bool:
    """Whether a ClientError says that the object is not there. (For a HEAD that may also mean the bucket.)"""
    return error_code(error) in _ABSENT


def _refusal(uri: str, error: Any) -> StorageError:
    code, status, operation = error_code(error), error_status(error), error.operation_name
    if status == 412 or code in ("PreconditionFailed", "ConditionalRequestConflict"):
        return StorageConflict(f"{uri}: written by somebody else meanwhile ({operation} → {status}); read it again")
    if code in _CODES:
        cause, remedy = _CODES[code]
    elif status >= 500 or status == 429:
        tries = error.response["ResponseMetadata"].get("RetryAttempts", 0) + 1
        cause, remedy = f"{_TRANSIENT} {tries} times in a row", "see its logs and try again later"
    else:
        cause, remedy = "refused", "check AWS_ENDPOINT_URL and the bucket's settings"
    return StorageError(f"{uri}: {cause} ({operation} → {status} {code} at {_endpoint()}); {remedy}")


def _failure(error: Any) -> str:
    """Cause and remedy of an error that is no answer of the server's. Matched by botocore's class."""
    from botocore import exceptions as known

    retry = f"tried {ATTEMPTS} times; check AWS_ENDPOINT_URL, the network and proxies, then try again"
    if isinstance(error, known.NoCredentialsError | known.PartialCredentialsError):
        return "no keys, or half of them, were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, known.ProfileNotFound):
        return "AWS_PROFILE names a profile that is not in ~/.aws/config; correct it"
    if isinstance(error, known.CredentialRetrievalError | known.SSOError):
        return f"the keys could not be fetched ({type(error).__name__}); {_EXPIRED}"
    if isinstance(error, known.SSLError):
        return f"no trusted TLS connection to {_endpoint()}; name the server's certificate in AWS_CA_BUNDLE"
    if isinstance(error, known.ConnectTimeoutError | known.ReadTimeoutError):
        return f"{_endpoint()} did not answer in time; {retry}"
    if is_broken_connection(error):
        return f"no connection to {_endpoint()}, or it broke ({type(error).__name__}); {retry}"
    message = _USER.sub("://", str(error))
    return f"{type(error).__name__}: {message}; check the AWS_* environment and ~/.aws/config"


def _endpoint() -> str:
    """The server's address without a user's name and password, for messages."""
    from botocore.exceptions import BotoCoreError

    try:
        parts = urlsplit(s3_client().meta.endpoint_url)
    except (BotoCoreError, ValueError, ConfigError):
        return "the server"
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}"
