"""The cache of folders from S3, on moto and on Ceph."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from alignment.errors import ConfigError, StorageError
from alignment.model_cache import cache_root, cached_folder, forget_folder, scratch_folder
from alignment.s3_folders import push_folder
from flaky_proxy import Fault, FlakyProxy
from test_s3_transfer import contents, written

ROOT = Path(__file__).parents[1]
KB = 1000


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stored(bucket: str, tmp_path: Path, *names: str, size: int = 40 * KB) -> None:
    """Models of one size, each below its name."""
    for name in names:
        files = {"model.bin": os.urandom(size - 5), "DONE": name.encode().ljust(5)}
        push_folder(written(tmp_path / name, files), f"{bucket}/{name}")


def cached() -> set[str]:
    """Names of the models that are whole in the cache."""
    return {path.read_text().strip() for path in cache_root().glob("folders/*/content/DONE")}


def use_once(uri: str, limit: int = 100 * KB, sha256: str = "version") -> Path:
    with cached_folder(uri, sha256, limit) as folder:
        assert (folder / "model.bin").is_file()
        return folder


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, own_cache: Path, tmp_path: Path) -> None:
    assert cache_root() == own_cache
    monkeypatch.delenv("RS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "rejection-sampling"


def test_a_folder_is_fetched_once(flaky: FlakyProxy, bucket: str, tmp_path: Path) -> None:
    stored(bucket, tmp_path, "a")
    place = use_once(f"{bucket}/a")
    assert contents(place) == contents(tmp_path / "a")
    flaky.requests.clear()
    assert use_once(f"{bucket}/a/") == place and flaky.requests == []
    assert use_once(f"{bucket}/a", sha256="other version") != place


def test_what_was_unused_longest_goes_first(bucket: str, tmp_path: Path) -> None:
    stored(bucket, tmp_path, "a", "b", "c")
    use_once(f"{bucket}/a")
    use_once(f"{bucket}/b")
    use_once(f"{bucket}/a")
    use_once(f"{bucket}/c")
    assert cached() == {"a", "c"}
    assert len(list(cache_root().glob("folders/*"))) == 2


def test_what_is_in_use_stays(bucket: str, tmp_path: Path) -> None:
    stored(bucket, tmp_path, "a", "b", "c")
    with cached_folder(f"{bucket}/a", "version", 100 * KB) as place:
        use_once(f"{bucket}/b")
        use_once(f"{bucket}/c")
        assert cached() == {"a", "c"} and place.is_dir()
        with (
            cached_folder(f"{bucket}/c", "version", 100 * KB),
            pytest.raises(StorageError, match=r"takes 0 MB and does not fit in the cache .*RS_CACHE"),
        ):
            use_once(f"{bucket}/b")
    use_once(f"{bucket}/b")
    assert len(cached()) == 2


def test_a_folder_beyond_the_limit_is_refused_and_removes_nothing(bucket: str, tmp_path: Path) -> None:
    stored(bucket, tmp_path, "a")
    stored(bucket, tmp_path, "b", size=200 * KB)
    use_once(f"{bucket}/a")
    with pytest.raises(StorageError, match="raise the limit"):
        use_once(f"{bucket}/b")
    assert cached() == {"a"}


def test_an_interrupted_fetch_goes_on_and_is_never_taken_for_whole(
    flaky: FlakyProxy, bucket: str, tmp_path: Path
) -> None:
    stored(bucket, tmp_path, "a")
    flaky.fail(Fault(status=500), times=1000, method="GET", path="DONE")
    with pytest.raises(StorageError):
        use_once(f"{bucket}/a")
    assert cached() == set()
    flaky.decide = lambda method, at: None
    flaky.requests.clear()
    use_once(f"{bucket}/a")
    assert cached() == {"a"} and flaky.count("GET", "model.bin") == 0


def test_users_at_once_fetch_once(flaky: FlakyProxy, bucket: str, tmp_path: Path) -> None:
    stored(bucket, tmp_path, "a")
    flaky.requests.clear()
    threads = [threading.Thread(target=use_once, args=(f"{bucket}/a",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert flaky.count("GET", "model.bin") == 1 and cached() == {"a"}


def test_a_folder_in_use_by_another_process_stays_until_that_is_killed(bucket: str, tmp_path: Path) -> None:
    stored(bucket, tmp_path, "a", "b", "c")
    script = (
        "import sys, time; from alignment.model_cache import cached_folder\n"
        f"with cached_folder('{bucket}/a', 'version', {100 * KB}): print('in use', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == "in use\n"
        use_once(f"{bucket}/b")
        use_once(f"{bucket}/c")
        assert cached() == {"a", "c"}
        other.kill()
    use_once(f"{bucket}/c")
    use_once(f"{bucket}/b")
    assert cached() == {"b", "c"}


def test_the_limit_of_a_node(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(bucket, tmp_path, "a")
    monkeypatch.setenv("RS_CACHE_LIMIT_GB", "0.00001")
    with pytest.raises(StorageError, match="limit is 0 MB"):
        use_once(f"{bucket}/a")
    monkeypatch.setenv("RS_CACHE_LIMIT_GB", "much")
    with pytest.raises(ConfigError, match=r"RS_CACHE_LIMIT_GB \(much\) must be a number above 0"):
        use_once(f"{bucket}/a")


def test_a_damaged_copy_is_forgotten(bucket: str, tmp_path: Path) -> None:
    stored(bucket, tmp_path, "a")
    (use_once(f"{bucket}/a") / "DONE").write_text("damaged")
    forget_folder(f"{bucket}/a", "version")
    assert (use_once(f"{bucket}/a") / "DONE").read_text().strip() == "a"


def test_what_a_killed_export_left_goes_and_one_under_way_stays(own_cache: Path) -> None:
    left = own_cache / "exports" / "left"
    left.mkdir(parents=True)
    (own_cache / "exports" / "left.lock").touch()
    with scratch_folder() as first:
        (first / "file").write_text("x")
        assert not left.exists()
        with scratch_folder() as second:
            assert first.is_dir() and second != first
    assert [path.name for path in (own_cache / "exports").iterdir()] == ["sweep"]
