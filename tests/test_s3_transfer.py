"""Files and folders to S3 and back, on moto and on Ceph."""

import hashlib
import os
import threading
from pathlib import Path

import pytest

from alignment import s3_transfer
from alignment.errors import DataError, DiskError, StorageError
from alignment.progress import TransferLines
from alignment.s3 import parse_uri
from alignment.s3_connection import s3_client
from alignment.s3_download import partial_path
from alignment.s3_folders import pull_folder, push_folder
from alignment.s3_objects import SHA256, list_objects, read_bytes, stat_object, write_bytes
from alignment.s3_transfer import MULTIPART_BYTES, PART_BYTES, download_file, upload_file
from flaky_proxy import Fault, FlakyProxy
from s3_servers import object_metadata

LARGE = 3 * PART_BYTES + 1000
"""Bytes of a file that takes four parts."""


def large_file(path: Path, seed: int = 0, size: int = LARGE) -> Path:
    path.write_bytes(os.urandom(1 << 10) * (size >> 10) + bytes([seed]) * (size & 1023))
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size", [0, 1, MULTIPART_BYTES - 1, MULTIPART_BYTES, LARGE])
def test_a_file_comes_back_as_it_went(bucket: str, tmp_path: Path, size: int) -> None:
    path, uri = large_file(tmp_path / "file", size=size), f"{bucket}/a/file"
    sent: list[int] = []
    fetched: list[int] = []
    assert upload_file(path, uri, on_bytes=sent.append) == digest(path)
    assert object_metadata(uri)["Metadata"] == {SHA256: digest(path)}
    download_file(uri, tmp_path / "sub" / "back", sha256=digest(path), on_bytes=fetched.append)
    assert (tmp_path / "sub" / "back").read_bytes() == path.read_bytes()
    assert os.listdir(tmp_path / "sub") == ["back"]
    assert sum(sent) == sum(fetched) == size
    assert len(sent) == (1 if size < MULTIPART_BYTES else -(-size // PART_BYTES))


def test_what_is_there_is_neither_sent_nor_fetched_again(flaky: FlakyProxy, bucket: str, tmp_path: Path) -> None:
    path, uri = large_file(tmp_path / "file"), f"{bucket}/file"
    upload_file(path, uri)
    download_file(uri, tmp_path / "back")
    flaky.requests.clear()
    upload_file(path, uri)
    download_file(uri, tmp_path / "back")
    assert {method for method, _ in flaky.requests} == {"HEAD"}


def test_a_changed_file_replaces_the_object(bucket: str, tmp_path: Path) -> None:
    for seed in (1, 2):
        upload_file(large_file(tmp_path / "file", seed), f"{bucket}/file")
        download_file(f"{bucket}/file", tmp_path / "back")
        assert digest(tmp_path / "back") == digest(tmp_path / "file")


def begin_upload(path: Path, uri: str, numbers: list[int], sha256: str = "of another file") -> None:
    """What a killed upload leaves: some of the parts."""
    location, data = parse_uri(uri), path.read_bytes()
    begun = s3_client().create_multipart_upload(Bucket=location.bucket, Key=location.key, Metadata={SHA256: sha256})
    for number in numbers:
        s3_client().upload_part(
            Bucket=location.bucket,
            Key=location.key,
            UploadId=begun["UploadId"],
            PartNumber=number,
            Body=data[(number - 1) * PART_BYTES : number * PART_BYTES],
        )


def unfinished(uri: str) -> int:
    location = parse_uri(uri)
    return len(s3_client().list_multipart_uploads(Bucket=location.bucket, Prefix=location.key).get("Uploads", []))


def test_an_upload_goes_on_from_its_parts(flaky: FlakyProxy, bucket: str, tmp_path: Path) -> None:
    path, uri = large_file(tmp_path / "file"), f"{bucket}/file"
    begin_upload(path, uri, [1, 3], digest(path))
    begin_upload(path, uri, [1])
    flaky.requests.clear()
    reported: list[int] = []
    assert upload_file(path, uri, on_bytes=reported.append) == digest(path)
    assert flaky.count("PUT", "partNumber=") == 2 and sum(reported) == LARGE
    assert unfinished(uri) == 0
    download_file(uri, tmp_path / "back", sha256=digest(path))


def test_parts_of_another_file_are_not_taken(flaky: FlakyProxy, bucket: str, tmp_path: Path) -> None:
    path, uri = large_file(tmp_path / "file"), f"{bucket}/file"
    begin_upload(large_file(tmp_path / "older", seed=1), uri, [1, 2])
    begin_upload(path, f"{bucket}/file-beside", [1])
    flaky.requests.clear()
    upload_file(path, uri)
    assert flaky.count("PUT", "partNumber=") == 4
    assert (unfinished(uri), unfinished(f"{bucket}/file-beside")) == (1, 1)  # that beside it is found by prefix too
    download_file(uri, tmp_path / "back", sha256=digest(path))


def test_an_older_upload_whose_parts_all_match_does_not_leave_its_sha256(bucket: str, tmp_path: Path) -> None:
    path, uri = large_file(tmp_path / "file"), f"{bucket}/file"
    begin_upload(path, uri, [1, 2, 3], sha256="of a file that had another last part")
    upload_file(path, uri)
    assert stat_object(uri).sha256 == digest(path)
    download_file(uri, tmp_path / "back")


def test_an_upload_that_another_ends_begins_anew(
    bucket: str, server_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if server_name == "moto":
        pytest.skip("moto answers 500 for an upload that was aborted")
    path, uri = large_file(tmp_path / "file"), f"{bucket}/file"
    location, real, ended = parse_uri(uri), s3_transfer._begun_upload, []

    def begun_and_ended(*arguments: object, **options: object) -> object:
        upload_id, parts = real(*arguments, **options)
        if not ended:
            s3_client().abort_multipart_upload(Bucket=location.bucket, Key=location.key, UploadId=upload_id)
            ended.append(upload_id)
        return upload_id, parts

    monkeypatch.setattr(s3_transfer, "_begun_upload", begun_and_ended)
    upload_file(path, uri)
    assert ended and stat_object(uri).sha256 == digest(path)


def test_a_file_that_cannot_be_read_is_named(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}/none: cannot be read: No such file"):
        upload_file(tmp_path / "none", f"{bucket}/none")


def test_a_file_that_changes_while_it_is_sent_is_sent_as_it_is_then(
    flaky: FlakyProxy, bucket: str, server_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if server_name == "moto":
        pytest.skip("moto looks at no Content-MD5")
    path, uri = large_file(tmp_path / "file", seed=1), f"{bucket}/file"
    real, reads = s3_transfer.read_fingerprint, []

    def then_changed(path: Path) -> s3_transfer.Fingerprint:
        fingerprint = real(path)
        if not reads:
            large_file(path, seed=2)
        reads.append(fingerprint)
        return fingerprint

    monkeypatch.setattr(s3_transfer, "read_fingerprint", then_changed)
    assert upload_file(path, uri) == digest(path) == stat_object(uri).sha256
    assert len(reads) == 2


def test_a_download_goes_on_from_what_is_there(flaky: FlakyProxy, bucket: str, tmp_path: Path) -> None:
    path, uri = large_file(tmp_path / "file"), f"{bucket}/file"
    upload_file(path, uri)
    flaky.fail(Fault(status=500), times=1000, method="GET")
    with pytest.raises(StorageError, match="the server failed 7 times in a row"):
        download_file(uri, tmp_path / "back")
    left = {"first": partial_path(tmp_path / "back").exists(), "whole": (tmp_path / "back").exists()}
    assert left == {"first": True, "whole": False}
    third: list[str] = []

    def all_but_one(method: str, at: str) -> Fault | None:
        third.append(at)
        return Fault(status=500) if method == "GET" and len(third) > 3 else None

    flaky.decide = all_but_one
    with pytest.raises(StorageError):
        download_file(uri, tmp_path / "back")
    flaky.decide = lambda method, at: None
    flaky.requests.clear()
    download_file(uri, tmp_path / "back")
    assert flaky.count("GET") == 2  # two of four ranges were there
    assert digest(tmp_path / "back") == digest(path) and not partial_path(tmp_path / "back").exists()


@pytest.mark.parametrize(
    "left", [b"", b"of something else", bytes(LARGE + 5000), b"x" * LARGE + b"etag 1 2\nx\n"], ids=len
)
def test_a_partial_file_of_something_else_is_not_taken(bucket: str, tmp_path: Path, left: bytes) -> None:
    path, uri = large_file(tmp_path / "file"), f"{bucket}/file"
    upload_file(path, uri)
    partial_path(tmp_path / "back").write_bytes(left)
    download_file(uri, tmp_path / "back")
    assert digest(tmp_path / "back") == digest(path)


def test_damage_in_a_partial_file_is_found_and_cured(flaky: FlakyProxy, bucket: str, tmp_path: Path) -> None:
    path, uri = large_file(tmp_path / "file"), f"{bucket}/file"
    upload_file(path, uri)
    stored = stat_object(uri)
    journal = f"{stored.etag} {LARGE} {PART_BYTES}\n0\n1\n2\n"
    partial_path(tmp_path / "back").write_bytes(bytes(LARGE) + journal.encode())
    flaky.requests.clear()
    download_file(uri, tmp_path / "back")
    assert digest(tmp_path / "back") == digest(path)
    assert flaky.count("GET") == 1 + 4


def test_an_object_that_is_not_what_its_metadata_says_is_refused(bucket: str, tmp_path: Path) -> None:
    uri = f"{bucket}/file"
    location = parse_uri(uri)
    s3_client().put_object(Bucket=location.bucket, Key=location.key, Body=b"damaged", Metadata={SHA256: "0" * 64})
    with pytest.raises(StorageError, match=f"{uri}: what arrived has sha256 .*, not 0+, twice; it was damaged"):
        download_file(uri, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(StorageError, match=f"{uri}: has sha256 0+, not 1+: it was replaced"):
        download_file(uri, tmp_path / "back", sha256="1" * 64)
    with pytest.raises(StorageError, match="there is no such object; check the name"):
        download_file(f"{uri}-none", tmp_path / "back")


def test_an_object_of_other_tools_is_checked_against_the_callers_sha256(bucket: str, tmp_path: Path) -> None:
    uri = f"{bucket}/file"
    location = parse_uri(uri)
    s3_client().put_object(Bucket=location.bucket, Key=location.key, Body=b"plain")
    download_file(uri, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"plain"
    with pytest.raises(StorageError, match="twice; it was damaged"):
        download_file(uri, tmp_path / "other", sha256="1" * 64)


def test_an_object_that_is_replaced_while_it_is_fetched_arrives_as_one_or_the_other(
    flaky: FlakyProxy, bucket: str, tmp_path: Path
) -> None:
    path, uri = large_file(tmp_path / "file", seed=1), f"{bucket}/file"
    upload_file(path, uri)
    newer, gets, second = large_file(tmp_path / "newer", seed=2), [], threading.Event()

    def fail_from_the_second(method: str, at: str) -> Fault | None:
        gets.append(method)
        if gets.count("GET") < 2:
            return None
        second.set()
        return Fault(status=503)

    def replace() -> None:
        second.wait()
        flaky.decide = lambda method, at: None
        upload_file(newer, uri)

    flaky.decide = fail_from_the_second
    thread = threading.Thread(target=replace)
    thread.start()
    download_file(uri, tmp_path / "back")
    thread.join()
    assert digest(tmp_path / "back") in (digest(path), digest(newer))


def test_two_downloads_to_one_place_do_not_mix(flaky: FlakyProxy, bucket: str, tmp_path: Path) -> None:
    path, uri = large_file(tmp_path / "file"), f"{bucket}/file"
    upload_file(path, uri)
    flaky.requests.clear()
    threads = [threading.Thread(target=download_file, args=(uri, tmp_path / "back")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digest(tmp_path / "back") == digest(path)
    assert flaky.count("GET") == 4 and not partial_path(tmp_path / "back").exists()


def test_a_place_that_cannot_be_written_is_named(bucket: str, tmp_path: Path) -> None:
    write_bytes(f"{bucket}/file", b"x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError, match=f"cannot write {tmp_path}/file/back"):
        download_file(f"{bucket}/file", tmp_path / "file" / "back")


FILES = {"a.json": b"{}", "sub/b é.txt": b"b", "sub/DONE": b"inner", "DONE": b"outer", "empty": b""}


def test_a_folder_comes_back_as_it_went(bucket: str, tmp_path: Path) -> None:
    folder, uri = written(tmp_path / "folder", FILES), f"{bucket}/runs/one"
    large_file(folder / "weights")
    (folder / "link").symlink_to("a.json")
    written(folder, {".a.json-" + "0" * 32: b"being written", ".weights.partial": b"being fetched"})
    total = LARGE + sum(map(len, FILES.values())) + 2
    assert push_folder(folder, uri) == total
    assert push_folder(folder, uri) == 0
    back = tmp_path / "back"
    assert pull_folder(f"{uri}/", back) == total
    assert pull_folder(uri, back) == 0
    expected = {**FILES, "link": b"{}", "weights": (folder / "weights").read_bytes()}
    assert contents(back) == expected


def test_only_what_is_chosen_takes_part(bucket: str, tmp_path: Path) -> None:
    folder, uri = written(tmp_path / "folder", FILES), f"{bucket}/one"
    assert push_folder(folder, uri, only=lambda name: not name.startswith("sub/")) == 7
    assert [o.uri for o in list_objects(uri)] == [f"{uri}/DONE", f"{uri}/a.json", f"{uri}/empty"]
    assert pull_folder(uri, tmp_path / "back", only=lambda name: name.endswith(".json")) == 2
    assert contents(tmp_path / "back") == {"a.json": b"{}"}


def test_markers_are_sent_and_fetched_last(flaky: FlakyProxy, bucket: str, tmp_path: Path) -> None:
    folder, uri = written(tmp_path / "folder", {**FILES, "LATEST": b"x", "z": b"z"}), f"{bucket}/one"
    push_folder(folder, uri, last=("DONE", "LATEST"))
    puts = [at.rpartition("/")[2] for method, at in flaky.requests if method == "PUT"]
    assert sorted(puts[-3:-1]) == ["DONE", "DONE"] and puts[-1] == "LATEST"
    flaky.requests.clear()
    pull_folder(uri, tmp_path / "back", last=("DONE", "LATEST"))
    gets = [at.rpartition("/")[2] for method, at in flaky.requests if method == "GET" and "list-type" not in at]
    assert sorted(gets[-3:-1]) == ["DONE", "DONE"] and gets[-1] == "LATEST"


def test_a_folder_that_is_interrupted_has_no_marker(flaky: FlakyProxy, bucket: str, tmp_path: Path) -> None:
    folder, uri = written(tmp_path / "folder", FILES), f"{bucket}/one"
    push_folder(folder, uri)
    pull_folder(uri, tmp_path / "back")
    written(folder, {"a.json": b"[1]"})
    flaky.fail(Fault(status=500), times=1000, method="PUT", path="a.json")
    with pytest.raises(StorageError, match=f"{uri}/a.json: the server failed 7 times"):
        push_folder(folder, uri)
    assert read_bytes(f"{uri}/DONE") is None
    flaky.decide = lambda method, at: None
    push_folder(folder, uri)
    flaky.fail(Fault(status=500), times=1000, method="GET", path="a.json")
    with pytest.raises(StorageError, match=f"{uri}/a.json: the server failed 7 times"):
        pull_folder(uri, tmp_path / "back")
    assert not (tmp_path / "back" / "DONE").exists()
    flaky.decide = lambda method, at: None
    pull_folder(uri, tmp_path / "back")
    assert contents(tmp_path / "back") == {**FILES, "a.json": b"[1]"}


@pytest.mark.parametrize(
    "name, why",
    [
        ("../outside", "its name leads out of"),
        ("a/../../outside", "its name leads out of"),
        ("/outside", "its name has an empty part"),
        ("a//b", "its name has an empty part"),
        ("link/outside", "its name leads out of"),
    ],
)
def test_a_name_that_leads_out_of_the_folder_is_refused(bucket: str, tmp_path: Path, name: str, why: str) -> None:
    location = parse_uri(bucket)
    for key in (f"one/{name}", "one/fine"):
        s3_client().put_object(Bucket=location.bucket, Key=key, Body=b"x")
    back = tmp_path / "back"
    back.mkdir()
    (back / "link").symlink_to(tmp_path)
    with pytest.raises(StorageError, match=why):
        pull_folder(f"{bucket}/one", back)
    assert not (tmp_path / "outside").exists() and [path.name for path in back.iterdir()] == ["link"]


def test_nothing_there_is_no_empty_folder(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"{bucket}/one: holds nothing; check the name"):
        pull_folder(f"{bucket}/one", tmp_path / "back")
    with pytest.raises(DataError, match="no such folder"):
        push_folder(tmp_path / "none", bucket)


def test_lines_tell_rate_and_time_left() -> None:
    now, lines = [0.0], []
    shown = TransferLines(lines.append, "sending step-1", 40_000_000, lambda: now[0])
    for now[0] in (1.0, 10.0, 12.0, 20.0, 40.0):
        shown.update(8_000_000)
    assert lines == [
        "sending step-1: [####......] 16/40 MB | 1.6 MB/s | 15 s left",
        "sending step-1: [########..] 32/40 MB | 1.6 MB/s | 5 s left",
        "sending step-1: [##########] 40/40 MB | 1.0 MB/s",
    ]
