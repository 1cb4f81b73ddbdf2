"""Names, small objects, conditions, pointers and errors, on moto and on Ceph."""

import hashlib
import os
import socket
import threading
from typing import Any

import pytest

from alignment import s3_connection
from alignment.errors import ConfigError, DataError, StorageConflict, StorageError
from alignment.s3 import is_s3, parse_uri
from alignment.s3_connection import s3_client
from alignment.s3_errors import explained
from alignment.s3_objects import (
    delete_objects,
    list_objects,
    read_bytes,
    require_bucket,
    require_place,
    stat_object,
    write_bytes,
)
from alignment.s3_pointers import Pointer, move_pointer, read_pointer
from s3_servers import S3Server, new_bucket, use

SECRET = "a-secret-that-no-message-may-hold"


def test_a_name_is_a_bucket_and_a_key() -> None:
    assert is_s3("s3://bucket/a") and not is_s3("bucket/a")
    location = parse_uri("s3://bucket/runs/one/")
    assert (location.bucket, location.key, location.uri) == ("bucket", "runs/one", "s3://bucket/runs/one")
    assert parse_uri("s3://bucket").key == parse_uri("s3://bucket/").key == ""


@pytest.mark.parametrize(
    "name", ["runs/one", "s3:/bucket/a", "s3://", "s3://B/a", "s3://no_good/a", "s3://bucket/a/../b"]
)
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected s3://bucket/key|write it without"):
        parse_uri(name)


def test_an_object_needs_a_key(bucket: str) -> None:
    with pytest.raises(ConfigError, match="expected s3://bucket/key of one object"):
        write_bytes(bucket, b"")


def test_small_objects_are_written_read_listed_and_deleted(bucket: str) -> None:
    etag = write_bytes(f"{bucket}/a/one", b"first")
    assert read_bytes(f"{bucket}/a/one") == (b"first", etag)
    assert read_bytes(f"{bucket}/a/none") is None and stat_object(f"{bucket}/a/none") is None
    write_bytes(f"{bucket}/a/b/two é+%", b"")
    write_bytes(f"{bucket}/ab", b"beside")
    digests = {data: hashlib.sha256(data).hexdigest() for data in (b"first", b"")}
    assert [(o.uri, o.size, o.sha256) for o in list_objects(f"{bucket}/a", sums=True)] == [
        (f"{bucket}/a/b/two é+%", 0, digests[b""]),
        (f"{bucket}/a/one", 5, digests[b"first"]),
    ]
    assert [o.uri.rpartition("/")[2] for o in list_objects(bucket)] == ["two é+%", "one", "ab"]
    delete_objects([f"{bucket}/a/one", f"{bucket}/a/none"])
    assert [o.uri.rpartition("/")[2] for o in list_objects(f"{bucket}/a/")] == ["two é+%"]


def test_a_long_list_has_all_its_pages(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        write_bytes(f"{bucket}/many/{number}", b"x")
    real = s3_client().list_objects_v2
    s3_client().meta.events.register(
        "provide-client-params.s3.ListObjectsV2", lambda params, **_: {**params, "MaxKeys": 3}, unique_id="small pages"
    )
    try:
        assert len(list_objects(f"{bucket}/many")) == 7
        assert real(Bucket=parse_uri(bucket).bucket)["IsTruncated"]
    finally:
        s3_client().meta.events.unregister("provide-client-params.s3.ListObjectsV2", unique_id="small pages")


def test_a_conditional_write_loses_where_its_condition_does_not_hold(bucket: str) -> None:
    uri = f"{bucket}/claim"
    first = write_bytes(uri, b"first", if_absent=True)
    with pytest.raises(StorageConflict, match=f"{uri}: is there already; read it again"):
        write_bytes(uri, b"first", if_absent=True)
    second = write_bytes(uri, b"second", if_match=first)
    with pytest.raises(StorageConflict, match="is no longer what was read"):
        write_bytes(uri, b"third", if_match=first)
    assert read_bytes(uri) == (b"second", second)
    with pytest.raises(StorageConflict):
        write_bytes(f"{bucket}/never", b"x", if_match=second)


def test_a_pointer_moves_only_from_where_it_was_seen(bucket: str) -> None:
    uri = f"{bucket}/runs/latest"
    assert read_pointer(uri) is None
    first = move_pointer(uri, "run-1", None)
    assert read_pointer(uri) == first == Pointer("run-1", first.token)
    with pytest.raises(StorageConflict, match="somebody else moved this pointer"):
        move_pointer(uri, "run-2", None)
    second = move_pointer(uri, "run-2", first.token)
    back = move_pointer(uri, "run-1", second.token)
    assert read_pointer(uri) == back
    with pytest.raises(StorageConflict):  # it says the same as when it was read, but was elsewhere in between
        move_pointer(uri, "run-3", first.token)
    write_bytes(uri, b"[1]")
    with pytest.raises(StorageError, match="is no pointer of this program's"):
        read_pointer(uri)


def test_of_several_movers_one_wins(ceph_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # moto's server looks at the condition and writes in two steps, so this is asked of the real one alone.
    use(ceph_server, monkeypatch)
    uri = f"{new_bucket()}/latest"
    token = None
    for _ in range(5):
        won: list[Pointer] = []
        lost: list[StorageConflict] = []
        start = threading.Barrier(6)

        def move(name: str, token: str | None = token) -> None:
            start.wait()  # noqa: B023
            try:
                won.append(move_pointer(uri, name, token))  # noqa: B023
            except StorageConflict as conflict:
                lost.append(conflict)  # noqa: B023

        threads = [threading.Thread(target=move, args=(f"run-{number}",)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 5)
        assert read_pointer(uri) == won[0]
        token = won[0].token


def test_a_place_is_tried_before_it_is_relied_on(bucket: str) -> None:
    require_place(f"{bucket}/runs")
    assert list_objects(bucket) == []
    require_bucket(bucket)


def test_a_server_that_ignores_conditions_is_refused(bucket: str) -> None:
    def without_condition(request: Any, **_: Any) -> None:
        del request.headers["If-None-Match"]

    s3_client().meta.events.register("before-sign.s3.PutObject", without_condition, unique_id="ignored")
    try:
        with pytest.raises(StorageError, match="the server ignores If-None-Match"):
            require_place(bucket)
    finally:
        s3_client().meta.events.unregister("before-sign.s3.PutObject", unique_id="ignored")


def test_a_missing_bucket_is_named(bucket: str) -> None:
    uri = "s3://there-is-no-such-bucket/a"
    for act in (read_bytes, list_objects, require_bucket, require_place, lambda uri: write_bytes(uri, b"")):
        with pytest.raises(StorageError, match=r"there-is-no-such-bucket/.*: there is no such bucket .*aws s3 mb"):
            act(uri)


def test_wrong_keys_are_told_apart_and_never_shown(ceph_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use(ceph_server, monkeypatch)
    uri = f"{new_bucket()}/a"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for act in (read_bytes, list_objects, lambda uri: write_bytes(uri, b"x")):
        with pytest.raises(StorageError, match=r"the secret key does not belong to the access key") as raised:
            act(uri)
        assert SECRET not in str(raised.value) and ceph_server.access_key not in str(raised.value)
    with pytest.raises(StorageError, match=r"access denied .*403.*AWS_ACCESS_KEY_ID"):
        stat_object(uri)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StorageError, match=r"the access key is not known there .*; check AWS_ACCESS_KEY_ID"):
        read_bytes(uri)


def test_missing_keys_are_told(
    moto_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    use(moto_server, monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path_factory.mktemp("aws") / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageError, match="no keys, or half of them, were found; set AWS_ACCESS_KEY_ID"):
        read_bytes("s3://bucket/a")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "half")
    with pytest.raises(StorageError, match="no keys, or half of them, were found"):
        read_bytes("s3://bucket/a")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match="AWS_PROFILE names a profile that is not in"):
        read_bytes("s3://bucket/a")


def test_no_network_is_told_with_the_address_and_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    use(S3Server(f"http://user:{SECRET}@127.0.0.1:{port}", "any", SECRET), monkeypatch)
    monkeypatch.setattr(s3_connection, "ATTEMPTS", 2)
    with pytest.raises(
        StorageError, match=rf"no connection to http://127.0.0.1:{port}.*check AWS_ENDPOINT_URL"
    ) as raised:
        read_bytes("s3://bucket/a")
    assert SECRET not in str(raised.value)


def test_a_clock_that_is_wrong_is_told(ceph_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use(ceph_server, monkeypatch)
    uri = f"{new_bucket()}/a"
    from botocore import auth

    real = auth.get_current_datetime
    monkeypatch.setattr(auth, "get_current_datetime", lambda **kind: real(**kind).replace(year=2001))
    with pytest.raises(StorageError, match=r"this machine's clock differs too much .*NTP"):
        read_bytes(uri)


def test_a_proxy_for_the_world_is_not_asked_about_loopback(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")  # another environment, so another client
    assert read_bytes(f"{bucket}/none") is None


def test_a_client_is_made_once_and_anew_after_a_fork(bucket: str) -> None:
    first = s3_client()
    assert s3_client() is first
    child = os.fork()
    if child == 0:
        os._exit(s3_client() is first)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_error_of_the_file_that_is_sent_stays_what_it_is() -> None:
    from botocore.exceptions import HTTPClientError

    with pytest.raises(DataError, match="became shorter"), explained("s3://bucket/a"):
        raise HTTPClientError(error=DataError("became shorter"))


@pytest.mark.parametrize("address", ["localhost:9000", "user:secretpw@localhost", "http://"])
def test_an_endpoint_that_is_no_address_is_named_without_its_value(monkeypatch, address):
    from alignment.errors import ConfigError
    from alignment.s3_objects import read_bytes

    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with pytest.raises(ConfigError, match=r"^AWS_ENDPOINT_URL is no address of a server: expected http://HOST:PORT"):
        read_bytes("s3://somebucket/x")
