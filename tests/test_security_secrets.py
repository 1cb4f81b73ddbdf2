"""Messages about S3 hold neither keys nor the password of an address."""

import socket
from pathlib import Path

import pytest

from alignment.errors import AlignmentError
from alignment.files import local_copy
from alignment.s3_errors import without_user

SECRETS = {"AWS_ACCESS_KEY_ID": "planted-key", "AWS_SECRET_ACCESS_KEY": "planted-secret"}


def test_a_data_file_that_cannot_be_fetched_is_told_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for name, value in {**SECRETS, "AWS_ENDPOINT_URL": f"http://user:planted-password@127.0.0.1:{port}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(AlignmentError, match=f"127.0.0.1:{port}") as caught:
        local_copy("s3://bucket/prompts.jsonl", tmp_path)
    assert "planted" not in str(caught.value)


def test_addresses_are_shown_without_their_user() -> None:
    assert (
        without_user("at https://me:word@host:1/a, then http://host/b@c") == "at https://host:1/a, then http://host/b@c"
    )
