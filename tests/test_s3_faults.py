"""S3 through a proxy that cuts, delays, loses answers and fails, and processes that are killed or must stay small."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from alignment import s3_connection
from alignment.errors import StorageError
from alignment.s3_folders import pull_folder, push_folder
from alignment.s3_objects import read_bytes, stat_object, write_bytes
from alignment.s3_pointers import move_pointer, read_pointer
from alignment.s3_threads import THREADS
from alignment.s3_transfer import PART_BYTES, download_file, upload_file
from flaky_proxy import Fault, FlakyProxy
from test_s3_transfer import LARGE, contents, digest, large_file, unfinished, written

ROOT = Path(__file__).parents[1]
BIG = 300 << 20
MEMORY_KB = 40 << 10
"""What moving a file of any size may add to a process: buffers of 4 threads and OpenSSL's and urllib3's own."""


@pytest.mark.parametrize("status", [500, 503])
def test_answers_of_a_server_in_trouble_are_tried_again(flaky: FlakyProxy, bucket: str, status: int) -> None:
    flaky.fail(Fault(status=status), times=3)
    write_bytes(f"{bucket}/a", b"x")
    flaky.fail(Fault(status=status), times=3)
    assert read_bytes(f"{bucket}/a")[0] == b"x"
    flaky.fail(Fault(status=status), times=1000)
    with pytest.raises(StorageError, match=r"(overloaded|failed 7 times in a row) .*try again later"):
        read_bytes(f"{bucket}/a")
    assert flaky.count("GET") == 4 + s3_connection.ATTEMPTS


def test_a_long_outage_leaves_later_requests_their_tries(flaky: FlakyProxy, bucket: str) -> None:
    for _ in range(12):
        flaky.fail(Fault(status=500), times=1000)
        with pytest.raises(StorageError, match="failed 7 times in a row"):
            read_bytes(f"{bucket}/none")
    flaky.fail(Fault(status=500), times=3)
    assert read_bytes(f"{bucket}/none") is None


def test_cut_connections_are_tried_again(flaky: FlakyProxy, bucket: str, tmp_path: Path) -> None:
    path, uri = large_file(tmp_path / "file"), f"{bucket}/file"
    flaky.fail(Fault(cut_up=PART_BYTES // 2), times=3, method="PUT", path="partNumber=[123]")
    upload_file(path, uri)
    assert flaky.count("PUT", "partNumber=") == 4 + 3
    flaky.fail(Fault(cut_down=PART_BYTES // 2), times=3, method="GET")
    flaky.down = 0
    download_file(uri, tmp_path / "back", sha256=digest(path))
    assert flaky.down < LARGE + PART_BYTES  # what had arrived is not fetched again
    flaky.fail(Fault(cut_down=0), times=1000, method="GET")
    with pytest.raises(StorageError, match=r"no connection to http://127.0.0.1:\d+, or it broke"):
        read_bytes(uri)


def test_a_stream_that_breaks_again_and_again_ends_in_an_error(flaky: FlakyProxy, bucket: str, tmp_path: Path) -> None:
    write_bytes(f"{bucket}/file", b"x" * 100_000)
    flaky.fail(Fault(cut_down=5), times=1000, method="GET")
    with pytest.raises(StorageError, match="or it broke"):
        download_file(f"{bucket}/file", tmp_path / "back")
    flaky.fail(Fault(cut_down=50_000), times=1000, method="GET")
    with pytest.raises(StorageError, match="or it broke"):
        read_bytes(f"{bucket}/file")
    download_file(f"{bucket}/file", tmp_path / "back")  # each try gets further
    assert (tmp_path / "back").read_bytes() == b"x" * 100_000


@pytest.mark.parametrize("cut", [20, 90, 200, 400])
def test_an_answer_whose_head_is_cut_off_is_not_taken_for_whole(
    flaky: FlakyProxy, bucket: str, tmp_path: Path, cut: int
) -> None:
    path, uri = large_file(tmp_path / "file"), f"{bucket}/file"
    first = move_pointer(f"{bucket}/latest", "run-1", None)
    flaky.fail(Fault(cut_down=cut), times=1, method="PUT")
    assert read_pointer(f"{bucket}/latest") == first
    second = move_pointer(f"{bucket}/latest", "run-2", first.token)
    for method in ("PUT", "HEAD", "GET"):
        flaky.fail(Fault(cut_down=cut), times=2, method=method)
        assert upload_file(path, f"{uri}-{method}") == digest(path)
        flaky.fail(Fault(cut_down=cut), times=1, method=method)
        assert stat_object(f"{uri}-{method}").sha256 == digest(path)
        download_file(f"{uri}-{method}", tmp_path / method, sha256=None)
        assert digest(tmp_path / method) == digest(path)
    flaky.fail(Fault(cut_down=cut), times=1, method="GET")
    assert read_pointer(f"{bucket}/latest") == second


def test_a_server_that_is_silent_is_given_up(flaky: FlakyProxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_connection, "READ_TIMEOUT_S", 0.2)
    monkeypatch.setenv("AWS_SDK_UA_APP_ID", "another-client")
    flaky.fail(Fault(delay_s=0.6), times=2)
    assert read_bytes(f"{bucket}/none") is None
    flaky.fail(Fault(delay_s=0.6), times=1000)
    with pytest.raises(StorageError, match=r"http://127.0.0.1:\d+ did not answer in time; tried 7 times"):
        read_bytes(f"{bucket}/none")


def test_a_lost_answer_is_no_lost_race(flaky: FlakyProxy, bucket: str) -> None:
    uri = f"{bucket}/latest"
    flaky.fail(Fault(cut_down=0), times=1, method="PUT")
    first = move_pointer(uri, "run-1", None)
    flaky.fail(Fault(cut_down=0), times=1, method="PUT")
    second = move_pointer(uri, "run-2", first.token)
    assert flaky.count("PUT") == 4
    assert read_pointer(uri) == second


def test_a_lost_answer_to_the_end_of_an_upload_is_no_failure(flaky: FlakyProxy, bucket: str, tmp_path: Path) -> None:
    path, uri = large_file(tmp_path / "file"), f"{bucket}/file"
    flaky.fail(Fault(cut_down=0), times=1, method="POST", path="uploadId=")
    assert upload_file(path, uri) == digest(path) == stat_object(uri).sha256
    assert unfinished(uri) == 0 and flaky.count("PUT", "partNumber=") == 4


def process(action: str, uri: str, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "s3_uploader.py"), action, uri, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def killed_after(moved: int, action: str, uri: str, path: Path, flaky: FlakyProxy) -> None:
    """A process that is killed with -9 once so many bytes have passed the proxy."""
    flaky.up = flaky.down = 0
    with process(action, uri, path) as running:
        while max(flaky.up, flaky.down) < moved:
            assert running.poll() is None, running.communicate()[1]
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL


def test_a_killed_transfer_goes_on_where_it_was(flaky: FlakyProxy, bucket: str, tmp_path: Path) -> None:
    size = 12 * PART_BYTES
    path, uri = large_file(tmp_path / "file", size=size), f"{bucket}/file"
    flaky.bytes_per_s = 20 << 20
    killed_after(size // 2, "upload", uri, path, flaky)
    flaky.bytes_per_s, flaky.up = float("inf"), 0
    assert unfinished(uri) == 1 and stat_object(uri) is None
    upload_file(path, uri)
    # Half had been sent, and of that no more than the parts in flight were lost.
    assert flaky.up < size // 2 + THREADS * PART_BYTES + (1 << 20)
    killed_after(size // 2, "download", uri, tmp_path / "back", flaky)
    flaky.down = 0
    download_file(uri, tmp_path / "back", sha256=digest(path))
    assert flaky.down < size // 2 + THREADS * PART_BYTES + (1 << 20)
    assert not (tmp_path / ".back.partial").exists()


def test_memory_does_not_grow_with_the_file(bucket: str, server_name: str, tmp_path: Path) -> None:
    if server_name == "moto":
        pytest.skip("moto keeps what it is sent in the memory of this process")
    path, uri = tmp_path / "file", f"{bucket}/file"
    with path.open("wb") as file:
        for _ in range(BIG >> 20):
            file.write(os.urandom(1 << 10) * (1 << 10))
    for action, place in (("upload", path), ("download", tmp_path / "back")):
        with process(action, uri, place) as running:
            said, errors = running.communicate(timeout=200)
        assert running.returncode == 0, errors
        before, after = map(int, said.split())
        assert after - before < MEMORY_KB, (action, before, after)
    assert digest(tmp_path / "back") == digest(path)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_checkpoint_is_whole_after_twenty_random_faults(
    flaky: FlakyProxy, bucket: str, tmp_path: Path, seed: int
) -> None:
    names = {f"part-{number}.bin": os.urandom(5000) for number in range(12)}
    folder, uri = written(tmp_path / "step-000001", {**names, "manifest.json": b"{}", "DONE": b"x"}), f"{bucket}/one"
    large_file(folder / "model.safetensors")
    draw, left, lock = random.Random(seed), [20], threading.Lock()

    def at_random(method: str, at: str) -> Fault | None:
        with lock:
            if left[0] == 0 or draw.random() < 0.4:
                return None
            left[0] -= 1
        return draw.choice(
            [
                Fault(status=500),
                Fault(status=503),
                Fault(cut_up=draw.randrange(100)),
                Fault(cut_up=draw.randrange(PART_BYTES)),
                Fault(cut_down=0),
                Fault(cut_down=draw.randrange(2000)),
                Fault(delay_s=0.2),
            ]
        )

    flaky.decide = at_random
    for _ in range(5):  # a run that pushes again after an error, as it does after its next step
        try:
            push_folder(folder, uri)
            break
        except StorageError:
            assert read_bytes(f"{uri}/DONE") is None
    assert left[0] < 20
    flaky.decide = lambda method, at: None
    pull_folder(uri, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
