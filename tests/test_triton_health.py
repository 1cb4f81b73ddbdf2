"""What the local launcher makes of its server's answers and of the repository, with stand-ins for the server."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignment.errors import RewardServerError
from infra import triton, triton_follow, triton_health
from infra.triton_follow import Follower
from infra.triton_health import HUNG_S, PULSE_S, IndexEntry, feel_pulse, loading_failure
from infra.triton_leftovers import BackendFolder, owner, sweep
from infra.triton_setup import Ports, Prepared, drop_deleted, link_version, prepare, servable_versions

PULSES = 10


class Clock:
    """Stands in for the time and for the event that ends the watch: waiting moves the time, `PULSES` times."""

    def __init__(self) -> None:
        self.now, self.pulses = 1000.0, 0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        self.pulses += 1
        return self.is_set()

    def is_set(self) -> bool:
        return self.pulses > PULSES


def full_queue(_clock: Clock) -> bool:
    return False


def answered(_clock: Clock) -> bool:
    return True


def refused(_clock: Clock) -> bool:
    raise RewardServerError("cannot score a plain conversation (INTERNAL)")


def never(clock: Clock) -> bool:
    clock.now += HUNG_S
    return False


def once_at_pulse_2(clock: Clock) -> bool:
    return clock.pulses == 2


@pytest.mark.parametrize(
    ("canary", "executions", "hung_after_s"),
    [
        (full_queue, lambda clock: clock.pulses, None),
        (answered, lambda _: 7, None),
        (answered, lambda _: None, None),
        (refused, lambda _: 7, None),
        # Refused at once and nobody else is answered: hung after HUNG_S, not at the first refusal.
        (full_queue, lambda _: 7, HUNG_S),
        (full_queue, lambda _: None, HUNG_S),
        # A count that cannot be read now and then is no sign of life.
        (full_queue, lambda clock: 7 if clock.pulses % 2 else None, HUNG_S + PULSE_S),
        (once_at_pulse_2, lambda _: 7, 2 * PULSE_S + HUNG_S),
        (never, lambda _: 7, PULSE_S + HUNG_S),
        # The queue is longer than the canary waits, and moves.
        (never, lambda clock: int(clock.now), None),
    ],
)
def test_hung_is_who_answers_nobody_for_a_while(monkeypatch, canary, executions, hung_after_s):
    clock = Clock()

    monkeypatch.setattr(triton_health, "monotonic", clock)
    monkeypatch.setattr(triton_health, "answers", lambda *_: canary(clock))
    monkeypatch.setattr(triton_health, "_executions", lambda *_: executions(clock))
    monkeypatch.setattr(triton_health, "_takes_prompts", lambda *_: False)
    hung: list[str] = []
    feel_pulse("127.0.0.1:1", "reward_model", hung, clock)
    if hung_after_s is None:
        assert hung == []
    else:
        assert hung == [f"reward_model has answered nobody for {HUNG_S:g} s"]
        assert clock.now == 1000 + hung_after_s


def test_a_policy_may_decode_for_minutes(monkeypatch):
    waited: list[float] = []

    def busy(clock: Clock, wait_s: float) -> bool:
        waited.append(wait_s)
        clock.now += 200
        return False

    clock = Clock()
    monkeypatch.setattr(triton_health, "monotonic", clock)
    monkeypatch.setattr(triton_health, "answers", lambda _url, _model, wait_s, _version: busy(clock, wait_s))
    monkeypatch.setattr(triton_health, "_executions", lambda *_: 7)
    monkeypatch.setattr(triton_health, "_takes_prompts", lambda *_: True)
    hung: list[str] = []
    feel_pulse("127.0.0.1:1", "policy", hung, clock)
    assert hung == ["policy has answered nobody for 600 s"]
    assert waited == [600.0] * 3  # at 220, 440 and 660 s


def test_what_a_server_does_not_say_the_kind_of_is_not_asked(monkeypatch):
    # A conversation sent to a policy would be refused, as if its version were broken.
    monkeypatch.setattr(triton_health, "_listens", lambda _: True)
    monkeypatch.setattr(triton_health, "_takes_prompts", lambda *_: None)
    assert not triton_health.answers("127.0.0.1:1", "policy", 1.0)


STUB_DIED = IndexEntry("m", "1", "UNAVAILABLE", "Internal: Stub process 'm_0_0' is not healthy.")
BROKEN = IndexEntry("m", "2", "UNAVAILABLE", "Internal: the reward is nan\nAt: model.py(78)")
LOADED = IndexEntry("m", "3", "READY", "")


def test_only_a_lost_process_is_worth_a_new_start(monkeypatch):
    def failure(*index: IndexEntry) -> str:
        monkeypatch.setattr(triton_health, "model_index", lambda *_: list(index))
        return loading_failure("127.0.0.1:1", "key", ["m"])

    assert failure(LOADED) == ""
    assert failure(LOADED, STUB_DIED) == (
        "m version 1 cannot be served (Internal: Stub process 'm_0_0' is not healthy.)"
    )
    with pytest.raises(RewardServerError, match=r"m version 1 .*; m version 2 cannot be served .*nan"):
        failure(STUB_DIED, BROKEN)


@pytest.mark.parametrize(
    ("index", "start_s", "expected"),
    [
        (None, 0.0, (False, "it did not get ready within 0 s")),
        ([STUB_DIED], 600.0, (True, STUB_DIED.failure)),
    ],
)
def test_a_server_that_never_gets_ready_is_given_up_or_lost(monkeypatch, index, start_s, expected):
    monkeypatch.setattr(triton, "START_S", start_s)
    monkeypatch.setattr(triton, "answers", lambda *_: False)
    monkeypatch.setattr(triton_health, "model_index", lambda *_: index)
    process, prepared = SimpleNamespace(poll=lambda: None), Prepared([], {}, Path("view"), "key")
    watched = triton._watch(process, prepared, ["m"], Ports(1, 2, 3), lambda _: False, pytest.fail, None)
    assert watched == expected


def write_version(version: Path) -> Path:
    """The files that make a version, with nothing in them."""
    (version / "weights").mkdir(parents=True)
    (version.parent / "config.pbtxt").touch()
    for name in ("model.py", "settings.json", "template.jinja", "card.json", "weights/model.safetensors"):
        (version / name).touch()
    return version


@pytest.mark.parametrize(
    "missing", ["model.py", "settings.json", "template.jinja", "card.json", "weights/model.safetensors", "weights"]
)
def test_half_a_version_is_none(tmp_path, missing):
    write_version(tmp_path / "m" / "1")
    for name in ("2", "²", "٣", "3x"):
        half = write_version(tmp_path / "m" / name)
        if name == "2":
            shutil.rmtree(half / missing) if missing == "weights" else (half / missing).unlink()
    assert servable_versions(tmp_path) == {"m": ["1"]}


def test_a_version_that_vanishes_while_it_is_linked_leaves_nothing(tmp_path):
    version = write_version(tmp_path / "repository" / "m" / "1")
    (version / "model.py").unlink()
    view = tmp_path / "scratch" / "repository" / "m"
    view.mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        link_version(view, version)
    assert [path.name for path in (tmp_path / "scratch").rglob("*")] == ["repository", "m"]
    with pytest.raises(RewardServerError, match=r"repository cannot be laid out for tritonserver in .*model\.py"):
        prepare(tmp_path / "other", {"m": ["1"]}, tmp_path / "repository", Ports(1, 2, 3), "prefix")


def test_what_was_deleted_from_the_repository_leaves_the_view(tmp_path):
    view = tmp_path / "view" / "repository" / "m"
    view.mkdir(parents=True)
    for name in ("1", "2", "3"):
        link_version(view, write_version(tmp_path / "m" / name))
    shutil.rmtree(tmp_path / "m" / "1")
    (tmp_path / "m" / "3" / "card.json").unlink()
    assert drop_deleted(view.parent, tmp_path) == ["m/1", "m/3"]
    assert [path.name for path in view.iterdir()] == ["2"]
    assert drop_deleted(view.parent, tmp_path) == []
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(RewardServerError, match="no version of m that was served is left in"):
        drop_deleted(view.parent, tmp_path)


def test_a_refused_version_is_tried_again_once_it_has_changed(tmp_path, monkeypatch, capsys):
    repository, view = tmp_path / "repository", tmp_path / "scratch" / "repository"
    (view / "m").mkdir(parents=True)
    follower = Follower(repository, ["m"], Prepared([], {}, view, "key"), "127.0.0.1:1")

    def linked_after(*index: IndexEntry) -> bool:
        monkeypatch.setattr(triton_follow, "model_index", lambda *_: list(index))
        follower.follow()
        return (view / "m" / "2").exists()

    assert not linked_after()
    version = write_version(repository / "m" / "2")
    with monkeypatch.context() as patch:
        patch.setattr(triton_follow, "link_version", lambda *_: os.stat(tmp_path / "gone"))
        assert not linked_after()
    assert linked_after()
    assert not linked_after(BROKEN)
    assert not linked_after(BROKEN)
    (version / "weights" / "model.safetensors").write_text("the rest")
    os.utime(version / "weights" / "model.safetensors", (1, 1))  # as a copy that keeps times
    assert linked_after(BROKEN), "what the server says of the last try is not said of this one"
    assert linked_after(IndexEntry("m", "2", "LOADING", ""))
    assert not linked_after(BROKEN)
    (version / "card.json").write_text("{}")
    assert linked_after(BROKEN)
    assert linked_after(IndexEntry("m", "2", "READY", ""))
    said = capsys.readouterr()
    assert said.out == "serving m version 2 too\n"
    assert said.err.count("m version 2 cannot be served (Internal: the reward is nan); the versions before") == 2


def test_only_what_dead_launchers_left_is_swept(tmp_path):
    own, dead = owner(), "9999999_" + owner().partition("_")[2]  # above the greatest pid of Linux, 2^22
    elsewhere = "9999999_1"
    for name in (f"triton-{dead}-x", f"triton-{own}-x", f"triton-{elsewhere}-x", "triton-9999999", "tritonx"):
        (tmp_path / name / "repository").mkdir(parents=True)
    for name in (f"triton_{dead}_ab12", f"triton_{own}_ab12", f"triton_{elsewhere}_ab12", "triton_python_9"):
        (tmp_path / name).touch()
    (tmp_path / f"triton-{dead}-link").symlink_to(tmp_path / "tritonx")
    before = {path.name for path in tmp_path.iterdir()}
    sweep(shared_memory=tmp_path, scratch=tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert before - left == {f"triton-{dead}-x", f"triton_{dead}_ab12", f"triton-{dead}-link"}
    assert (tmp_path / "tritonx" / "repository").is_dir()


@pytest.mark.parametrize("others", [(), ("another",)])
def test_a_servers_temporary_folder_goes_with_it_where_it_is_surely_its_own(tmp_path, others):
    (tmp_path / "python_env_before").mkdir()
    folder = BackendFolder(tmp_path)
    folder.server_starts()
    for name in ("own", *others):
        (tmp_path / f"python_env_{name}").mkdir()
    folder.server_is_ready()
    (tmp_path / "python_env_later").mkdir()
    folder.server_has_ended()
    kept = {"python_env_before", "python_env_later", *(f"python_env_{name}" for name in others)}
    assert {path.name for path in tmp_path.iterdir()} == kept | ({"python_env_own"} if others else set())
