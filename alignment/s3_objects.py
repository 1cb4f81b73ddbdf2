"""Small objects and lists of objects in S3. Files go through `alignment.s3_transfer`."""

import base64
import hashlib
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from alignment.errors import StorageConflict, StorageError
from alignment.s3 import Location, below, object_location, parse_uri
from alignment.s3_connection import ATTEMPTS, answered, pause_after, s3_client
from alignment.s3_errors import error_code, error_status, explained, is_absent, is_broken_connection

SHA256 = "sha256"
"""Key of the metadata that holds the object's sha256, hex."""
_HEX_SHA256 = re.compile("[0-9a-f]{64}")
LISTING_THREADS = 8
DELETED_AT_ONCE = 1000
"""The most keys that S3 deletes in one request."""


@dataclass(frozen=True)
class StoredObject:
    """An object: its size in bytes, and its sha256 (hex) where it was looked up and its writer left one."""

    uri: str
    size: int
    sha256: str | None
    etag: str = ""


def read_bytes(uri: str) -> tuple[bytes, str] | None:
    """Content and ETag of a small object, None where there is none. Raises StorageError."""
    for _ in range(ATTEMPTS):
        got = _get(uri)
        if got is None:
            return None
        data, etag, sha256 = got
        # A head that was cut off may lack the sha256 or state too small a size.
        if sha256 == hashlib.sha256(data).hexdigest() or (sha256 is None and got == _get(uri)):
            return data, etag
    raise StorageError(f"{uri}: its content is not what its sha256 says: it was damaged; write it again")


def _get(uri: str) -> tuple[bytes, str, str | None] | None:
    """Content, ETag and stated sha256 of an object; a stream that breaks off is read again from the start."""
    from botocore.exceptions import BotoCoreError, ClientError

    location = object_location(uri)
    with explained(uri):
        for attempt in range(1, ATTEMPTS + 1):
            try:
                answer = answered(
                    s3_client().get_object, "ETag", "ContentLength", Bucket=location.bucket, Key=location.key
                )
            except ClientError as error:
                if is_absent(error):
                    return None
                raise
            try:
                return answer["Body"].read(), bare(answer["ETag"]), _stated_sha256(answer)
            except BotoCoreError as error:
                if attempt == ATTEMPTS or not is_broken_connection(error):
                    raise
            pause_after(attempt)
    raise AssertionError("the loop returns or raises")


def write_bytes(uri: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
    """Write a small object with its sha256 and return its ETag.

    With `if_absent` only where there is none, with `if_match` only over the object of that ETag: otherwise
    StorageConflict. An answer may get lost and the request be sent again: then what is found there counts as written
    by this call if it is the same, so writers that must know which of them won write different data (as
    `alignment.s3_pointers` does). Raises StorageError.
    """
    from botocore.exceptions import ClientError

    location = object_location(uri)
    condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": bare(if_match)} if if_match is not None else {}
    with explained(uri):
        try:
            answer = answered(
                s3_client().put_object,
                "ETag",
                Bucket=location.bucket,
                Key=location.key,
                Body=data,
                ContentMD5=base64.b64encode(md5(data).digest()).decode(),
                Metadata={SHA256: hashlib.sha256(data).hexdigest()},
                **condition,
            )
        except ClientError as error:
            if not condition or not _did_not_hold(error):
                raise
            resent = error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
            found = read_bytes(uri) if resent else None
            if found is None or found[0] != data:
                raise StorageConflict(
                    f"{uri}: {'is there already' if if_absent else 'is no longer what was read'}; read it again"
                ) from error
            return found[1]
    return bare(answer["ETag"])


def stat_object(uri: str) -> StoredObject | None:
    """Size, sha256 and ETag of an object, None where there is none (or no bucket: see `require_bucket`).

    Raises StorageError.
    """
    for _ in range(ATTEMPTS):
        found = _head(uri)
        # An answer may lose the end of its head: that there is no sha256 is believed only when it was said twice.
        if found is None or found.sha256 is not None or found == _head(uri):
            return found
    raise StorageError(f"{uri}: its size or metadata differ each time they are asked for; is somebody writing it?")


def _head(uri: str) -> StoredObject | None:
    from botocore.exceptions import ClientError

    location = object_location(uri)
    with explained(uri):
        try:
            answer = answered(
                s3_client().head_object, "ETag", "ContentLength", Bucket=location.bucket, Key=location.key
            )
        except ClientError as error:
            if is_absent(error):
                return None
            raise
    return StoredObject(uri, answer["ContentLength"], _stated_sha256(answer), bare(answer["ETag"]))


def _stated_sha256(answer: Mapping[str, Any]) -> str | None:
    """The sha256 that an object's metadata state, None where they state none or other tools wrote something else."""
    stated = answer.get("Metadata", {}).get(SHA256, "")
    return stated if _HEX_SHA256.fullmatch(stated) else None


def list_objects(uri: str, *, sums: bool = False) -> list[StoredObject]:
    """The objects below the folder `uri` (or of the bucket), by name; what begins alike beside it is not.

    With `sums` each object's sha256 is looked up, a request each. Raises StorageError.
    """
    location = parse_uri(uri)
    prefix = f"{location.key}/" if location.key else ""
    with explained(uri):
        pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=location.bucket, Prefix=prefix)
        found = [
            StoredObject(Location(location.bucket, entry["Key"]).uri, entry["Size"], None, bare(entry["ETag"]))
            for page in pages
            for entry in page.get("Contents", [])
            if not entry["Key"].endswith("/")  # what consoles leave to show an empty folder
        ]
    return with_sums(found) if sums else found


def with_sums(objects: Sequence[StoredObject]) -> list[StoredObject]:
    """The objects with their sha256, looked up by a request each, several at a time. Raises StorageError."""
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        return list(pool.map(_with_sum, objects))


def delete_objects(uris: Iterable[str]) -> None:
    """Delete objects; one that is not there is no error. Raises StorageError that names the first that stays."""
    by_bucket: dict[str, list[str]] = {}
    for uri in uris:
        location = object_location(uri)
        by_bucket.setdefault(location.bucket, []).append(location.key)
    for bucket, keys in by_bucket.items():
        for start in range(0, len(keys), DELETED_AT_ONCE):
            batch = keys[start : start + DELETED_AT_ONCE]
            with explained(Location(bucket, batch[0]).uri):
                answer = s3_client().delete_objects(
                    Bucket=bucket, Delete={"Objects": [{"Key": key} for key in batch], "Quiet": True}
                )
            for failed in answer.get("Errors", []):
                raise StorageError(
                    f"{Location(bucket, failed['Key']).uri}: cannot be deleted ({failed.get('Code')}); let these keys "
                    f"delete there (s3:DeleteObject)"
                )


def require_bucket(uri: str) -> None:
    """Raises StorageError where the bucket is not there, which a HEAD of an object does not tell."""
    with explained(uri):
        s3_client().list_objects_v2(Bucket=parse_uri(uri).bucket, MaxKeys=1)


def require_place(uri: str) -> None:
    """See that objects can be written, read and deleted below `uri`, and that conditions are kept.

    What is to be found out at a run's start, not at its first checkpoint. Raises StorageError.
    """
    probe = below(uri, f".probe-{uuid.uuid4().hex}")
    write_bytes(probe, b"first", if_absent=True)
    try:
        write_bytes(probe, b"second", if_absent=True)
    except StorageConflict:
        kept = True
    else:
        kept = False
    delete_objects([probe])
    if not kept:
        raise StorageError(
            f"{uri}: the server ignores If-None-Match, so that two runs could overwrite each other's pointers; use a "
            f"newer one (seen to work: Ceph 16)"
        )


def bare(etag: str | None) -> str:
    """An ETag without its quotes: Ceph 16 compares a PUT's If-Match, quotes included, with the bare one."""
    return (etag or "").strip('"')


def md5(data: bytes = b"") -> Any:
    """The checksum that Content-MD5 asks for: it guards against accidents, not against people."""
    return hashlib.md5(data, usedforsecurity=False)


def _did_not_hold(error: Any) -> bool:
    """Whether a conditional PUT lost: 412; 409 where another was writing; 404 where what was to match is gone."""
    return error_status(error) == 412 or error_code(error) == "ConditionalRequestConflict" or is_absent(error)


def _with_sum(stored: StoredObject) -> StoredObject:
    found = stat_object(stored.uri)
    return stored if found is None else replace(stored, sha256=found.sha256)
