"""The plan and the tally of the runs under faults; `make test-faults` carries plans out."""

from collections import Counter
from pathlib import Path

import pytest

from alignment.run_folder import RunFolder
from faults.damage import damage
from faults.ends import end_of
from faults.plan import EXPORT_FILES, FEWEST, RUN_FILES, SERVER, Campaign, Fault, Moment, draw, families
from faults.tally import Tried, status, summary

KILL = Fault("kill", "kill -9", "worker", Moment("step", 0.5))


def test_a_seed_draws_one_plan() -> None:
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


@pytest.mark.parametrize("seed", range(20))
def test_a_whole_plan_has_enough_of_each_family(seed: int) -> None:
    found = families(draw(seed))
    assert all(found[family] >= fewest for family, fewest in FEWEST.items())
    assert set(families(draw(seed, short=True))) == set(FEWEST)


def test_over_a_few_seeds_everything_is_a_target() -> None:
    faults = [fault for seed in range(5) for campaign in draw(seed) for fault in campaign.faults]
    targets = Counter(fault.target for fault in faults)
    assert {*RUN_FILES, *EXPORT_FILES, *SERVER, "owner", "launcher", "worker", "metaflow", "task"} <= set(targets)
    assert {fault.how for fault in faults if fault.family == "triton"} == {"SIGSEGV", "SIGABRT", "SIGSTOP"}


def test_the_tally_counts_by_family_and_names_what_is_lost() -> None:
    plan = [Campaign("workers-1", "workers", (KILL, KILL)), Campaign("disk-1", "disk", (_full(),))]
    survived = [Tried("workers-1", KILL), Tried("workers-1", KILL)]
    lines = summary(plan, [*survived, Tried("disk-1", _full(), "no message")], 7)
    assert lines[-1] == "faults: 3 tried, 2 survived, 1 lost"
    assert "kill       2 of 2 tried, 2 survived" in lines and "disk       1 of 1 tried, 0 survived" in lines
    assert "lost: disk-1: no message" in lines and any("SEED=7 ONLY=disk-1" in line for line in lines)
    assert status(plan, [*survived, Tried("disk-1", _full())]) == 0
    assert status(plan, survived) == status(plan, [*survived, Tried("disk-1", _full(), "no message")]) == 1


def _full() -> Fault:
    return Fault("disk", "fill", "disk of the run", Moment("begun"))


@pytest.mark.parametrize(
    ("said", "code", "was_killed", "is_fine"),
    [
        ("done", 0, False, True),
        ("DiskError: cannot write /x: No space left on device; free some space and resume the run", 1, False, True),
        ("DiskError: cannot write /x: No space left on device", 1, False, False),  # no remedy
        ("Segmentation fault", -11, False, False),
        ("", -9, True, True),
        ("Traceback (most recent call last)\n  File\nKeyError: 'step'", 1, False, False),
    ],
)
def test_how_a_command_ended(tmp_path: Path, said: str, code: int, was_killed: bool, is_fine: bool) -> None:
    log = tmp_path / "log"
    log.write_text(said)
    end = end_of(code, log, was_killed=was_killed)
    assert (not end.lost) == is_fine
    assert end.is_done == (code == 0)


@pytest.mark.parametrize("how", ["truncate", "flip a bit of"])
def test_a_damage_changes_one_file_and_can_be_put_right(tmp_path: Path, how: str) -> None:
    run = RunFolder(tmp_path / "run")
    newest = run.checkpoints / "step-000002"
    newest.mkdir(parents=True)
    for name in ("DONE", "model.safetensors"):
        (newest / name).write_bytes(b"0123456789")
    fault = Fault("file", how, "checkpoint weights", Moment("step"), 0.75)
    found = damage(fault, run, tmp_path, tmp_path / "copies")
    assert found is not None and found.path == newest / "model.safetensors"
    expected = b"0123456" if how == "truncate" else b"0123456" + bytes([ord("7") ^ 1 << 7]) + b"89"
    assert found.path.read_bytes() == expected and (newest / "DONE").read_bytes() == b"0123456789"
    assert found.is_named_in(f"{newest} is damaged") and not found.is_named_in("the disk is full")
    found.put_back()
    assert found.path.read_bytes() == b"0123456789"
    assert damage(Fault("file", how, "metrics", Moment("step")), run, tmp_path, tmp_path / "copies") is None
