"""Names in S3 and in whatever speaks its protocol: `s3://bucket/key`.

What is done with objects is in `s3_objects` (small ones, lists), `s3_transfer` (files), `s3_folders` and `s3_pointers`;
`s3_connection` has the client, `s3_errors` what its errors mean.
"""

import re
from dataclasses import dataclass

from alignment.errors import ConfigError

SCHEME = "s3://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]")


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
