"""Files to S3 and back: in parts, in parallel, going on where a killed transfer stopped, verified by sha256 both ways.

An upload reads the file once for its sha256 and each part's MD5, then sends the parts straight from the file, each
with its MD5, which the server compares with what arrives. The sha256 travels as the object's metadata. A download
(`alignment.s3_download`) compares the sha256 of what it wrote. boto3's own transfer does neither the one nor the other,
and begins anew after a kill.

An interrupted upload is found by its key. S3 does not tell the metadata of an upload that is not complete, so an
older version of the file may have begun it: parts count only where their MD5 is that of this file, and the finished
object's sha256 is looked up; if it is not this file's, all is sent again.
"""

import base64
import hashlib
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from alignment.errors import DataError, StorageError
from alignment.s3 import Location, object_location
from alignment.s3_connection import answered, s3_client
from alignment.s3_download import download_file as download_file
from alignment.s3_download import read_exactly
from alignment.s3_errors import error_code, explained
from alignment.s3_objects import SHA256, bare, md5, stat_object
from alignment.s3_threads import in_parallel, serialised
from alignment.s3_unfinished import abort_upload, unfinished_uploads

PART_BYTES = 8 << 20
"""Size of a part, of all but the last; more where a file would need more than 10,000 parts. Parts are read from disk
as they are sent, so that a transfer's memory is a few buffers a thread, whatever the sizes."""
MULTIPART_BYTES = 16 << 20
"""A file of at least this size is sent in parts."""
MOST_PARTS = 10_000
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Fingerprint:
    """What a file held when it was read: size in bytes, sha256 (hex), and the MD5 of each part of `part_bytes`."""

    size: int
    sha256: str
    part_bytes: int
    part_md5s: tuple[bytes, ...]


class UploadGone(Exception):
    """A multipart upload that was under way is no longer known to the server: completed or aborted elsewhere."""


def upload_file(path: Path, uri: str, *, on_bytes: Callable[[int], None] | None = None) -> str:
    """Send a file, unless the object holds it already, and return its sha256 (hex).

    If what is stored then has another size or sha256, or the file changed while it was sent, it is read again and sent
    from scratch, once. `on_bytes` is told the bytes of each part that is done, in whatever order. Raises StorageError,
    and DataError for a file that cannot be read.
    """
    from botocore.exceptions import ClientError

    report = serialised(on_bytes)
    location = object_location(uri)
    with explained(uri):
        for fresh in (False, True):
            fingerprint = read_fingerprint(path)
            if is_stored(uri, fingerprint):
                report(fingerprint.size)
                return fingerprint.sha256
            try:
                if fingerprint.size < MULTIPART_BYTES:
                    _send_whole(path, location, fingerprint, report)
                    return fingerprint.sha256  # MD5 and metadata came in the one request that was accepted
                _send_parts(path, location, fingerprint, report, fresh=fresh)
            except UploadGone:
                pass  # another writer of this key ended it; what is there now decides
            except ClientError as error:
                if fresh or error_code(error) != "BadDigest":
                    raise
            else:
                if is_stored(uri, fingerprint):
                    return fingerprint.sha256
    raise StorageError(
        f"{uri}: does not hold {path} after it was sent twice; is somebody else writing the one or other?"
    )


def read_fingerprint(path: Path) -> Fingerprint:
    """Read a file once, for all its checksums. Raises DataError."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            part_bytes = _part_bytes(size)
            whole, parts = hashlib.sha256(), []
            for start in range(0, max(size, 1), part_bytes):
                part = md5()
                for chunk in read_exactly(file, min(part_bytes, size - start)):
                    whole.update(chunk)
                    part.update(chunk)
                parts.append(part.digest())
    except (OSError, EOFError) as error:
        raise _unreadable(path, error) from error
    return Fingerprint(size, whole.hexdigest(), part_bytes, tuple(parts))


def is_stored(uri: str, fingerprint: Fingerprint) -> bool:
    """Whether the object at `uri` holds this very content, by its size and the sha256 in its metadata."""
    found = stat_object(uri)
    return found is not None and (found.size, found.sha256) == (fingerprint.size, fingerprint.sha256)


class FileSlice(io.RawIOBase):
    """`size` bytes of an open file from `start` on, as a file of its own: what boto3 reads, and rewinds to retry."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def __len__(self) -> int:
        return self._size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        wanted = left if size is None or size < 0 else min(size, left)
        data = os.pread(self._file.fileno(), wanted, self._start + self._at)
        if wanted and not data:
            raise DataError(f"{self._file.name}: became shorter while it was sent; send it again")
        self._at += len(data)
        return data


def _send_whole(path: Path, location: Location, fingerprint: Fingerprint, report: Callable[[int], None]) -> None:
    with _opened(path) as file:
        s3_client().put_object(
            Bucket=location.bucket,
            Key=location.key,
            Body=FileSlice(file, 0, fingerprint.size),
            ContentMD5=base64.b64encode(fingerprint.part_md5s[0]).decode(),
            Metadata={SHA256: fingerprint.sha256},
        )
    report(fingerprint.size)


def _send_parts(
    path: Path, location: Location, fingerprint: Fingerprint, report: Callable[[int], None], *, fresh: bool
) -> None:
    """Send what an earlier upload of this key lacks, and complete it; with `fresh` nothing earlier is used."""
    upload_id, stored = _begun_upload(location, fingerprint, fresh=fresh)
    count = len(fingerprint.part_md5s)
    for number in stored:
        report(_part_size(fingerprint, number))

    with _opened(path) as file:

        def send(number: int) -> None:
            size = _part_size(fingerprint, number)
            answer = _known(
                s3_client().upload_part,
                "ETag",
                Bucket=location.bucket,
                Key=location.key,
                UploadId=upload_id,
                PartNumber=number,
                Body=FileSlice(file, (number - 1) * fingerprint.part_bytes, size),
                ContentMD5=base64.b64encode(fingerprint.part_md5s[number - 1]).decode(),
            )
            stored[number] = answer["ETag"]
            report(size)

        in_parallel(send, [number for number in range(1, count + 1) if number not in stored])
    _known(
        s3_client().complete_multipart_upload,
        Bucket=location.bucket,
        Key=location.key,
        UploadId=upload_id,
        MultipartUpload={"Parts": [{"PartNumber": number, "ETag": stored[number]} for number in range(1, count + 1)]},
    )


def _begun_upload(location: Location, fingerprint: Fingerprint, *, fresh: bool) -> tuple[str, dict[int, str]]:
    """The upload to go on with, and the ETags of its parts that are this file's, by number from 1.

    Of the unfinished uploads of this key the one with the most such parts is taken. The others are aborted, since
    their parts would be paid for until a bucket's life-cycle rule removes them: one key has one writer at a time.
    """
    begun = {
        upload_id: _parts(location, upload_id) for key, upload_id in unfinished_uploads(location) if key == location.key
    }
    matching = {upload_id: _matching(parts, fingerprint) for upload_id, parts in begun.items()}
    useful = {upload_id: parts for upload_id, parts in matching.items() if parts and not fresh}
    chosen = max(useful, key=lambda upload_id: len(useful[upload_id]), default=None)
    for upload_id in begun:
        if upload_id != chosen:
            abort_upload(location, upload_id)
    if chosen is not None:
        return chosen, useful[chosen]
    answer = answered(
        s3_client().create_multipart_upload,
        "UploadId",
        Bucket=location.bucket,
        Key=location.key,
        Metadata={SHA256: fingerprint.sha256},
    )
    return answer["UploadId"], {}


def _parts(location: Location, upload_id: str) -> dict[int, Mapping[str, Any]]:
    pages = (
        s3_client().get_paginator("list_parts").paginate(Bucket=location.bucket, Key=location.key, UploadId=upload_id)
    )
    try:
        return {part["PartNumber"]: part for page in pages for part in page.get("Parts", [])}
    except s3_client().exceptions.NoSuchUpload:
        return {}  # ended between the two requests


def _matching(parts: Mapping[int, Mapping[str, Any]], fingerprint: Fingerprint) -> dict[int, str]:
    """ETags of the parts that are this file's. Nothing matches where the store encrypts, as its ETags are no MD5s."""
    return {
        number: part["ETag"]
        for number, part in parts.items()
        if number <= len(fingerprint.part_md5s)
        and part["Size"] == _part_size(fingerprint, number)
        and bare(part["ETag"]) == fingerprint.part_md5s[number - 1].hex()
    }


def _known(request: Callable[..., Any], *fields: str, **arguments: Any) -> Any:
    """An answer about a multipart upload. Raises UploadGone where the server does not know it (any more)."""
    from botocore.exceptions import ClientError

    try:
        return answered(request, *fields, **arguments)
    except ClientError as error:
        if error_code(error) == "NoSuchUpload":
            raise UploadGone from error
        raise


def _part_bytes(size: int) -> int:
    if size < MULTIPART_BYTES:
        return MULTIPART_BYTES  # one part: it goes whole
    least = -(-size // MOST_PARTS)
    return max(PART_BYTES, -(-least // MEBIBYTE) * MEBIBYTE)


def _part_size(fingerprint: Fingerprint, number: int) -> int:
    return min(fingerprint.part_bytes, fingerprint.size - (number - 1) * fingerprint.part_bytes)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{path}: cannot be read: {reason}; was it moved or changed while it was sent?")
