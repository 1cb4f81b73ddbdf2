"""A campaign carried out: runs that are begun, disturbed, gone on with to their end, and compared."""

import re
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from alignment.errors import AlignmentError
from faults.comparison import differences
from faults.damage import Damaged, damage, target
from faults.disks import fill
from faults.ends import End, end_of
from faults.injectors import POLL_S, mark, strike, wait_for_moment
from faults.plan import ALL, Campaign, Fault
from faults.setting import Bench, Command, Setting, setting_of, start
from faults.tally import Tried

COMMANDS_PER_FAULT, MORE_COMMANDS = 3, 4
"""Starts of a run's command: the one that is disturbed, one that tells of it, one more; and a few for the last ones."""

Say = Callable[[str], None]


class Lost(Exception):
    """A run that did not end as it has to; the message says why and where its files are."""


@dataclass
class Course:
    """Of one run: the faults that it has seen, and the damages that nobody has found yet."""

    seen: list[Fault]
    damages: list[Damaged]
    commands: int = 0
    was_killed: bool = False
    """Whether the command that runs now was."""


def carry_out(campaign: Campaign, bench: Bench, say: Say) -> Iterator[Tried]:
    """Runs until all faults are done, or one is lost; yields what became of each fault that was tried."""
    left, number = deque(campaign.faults), 0
    while left or not number:
        number += 1
        course = Course([], [])
        with setting_of(campaign, bench, number) as setting:
            reason = ""
            try:
                _run(setting, bench, left, course, partial(_say, say, campaign.name))
            except Lost as lost:
                reason = f"{lost}; its files: {setting.scene.path}"
            finally:
                setting.scene.clear()
            # A run that is lost before its first fault is the fault's that was to come.
            seen = course.seen or ([left[0]] if reason and left else [])
            yield from (Tried(campaign.name, fault, reason) for fault in seen)
        if reason:
            return
        shutil.rmtree(setting.scene.path)


def _say(say: Say, name: str, text: str) -> None:
    say(f"  {name}: {text}")


def _run(setting: Setting, bench: Bench, left: deque[Fault], course: Course, say: Say) -> None:
    """One run to its end under the faults that are `left`, as many as it lives to see. Raises Lost."""
    most = COMMANDS_PER_FAULT * len(left) + MORE_COMMANDS
    while True:
        course.commands += 1
        if course.commands > most:
            raise Lost(f"no end after {most} starts")
        course.was_killed = False
        command = start(setting, course.commands)
        struck = _disturb(setting, command, left, course, say)
        status = command.wait()
        if status is None:
            raise Lost(f"the command hangs; its output: {command.log}")
        if not setting.scene.is_quiet():
            raise Lost(f"processes outlive their owner: {setting.scene.processes(ALL)}")
        setting.mend()
        end = end_of(status, command.log, was_killed=course.was_killed)
        if end.lost:
            raise Lost(f"{end.lost}; the command's output: {command.log}")
        if end.is_done:
            break
        if course.damages or not (struck or course.was_killed):
            _heed(setting, end, course, say)
    _compare(setting, bench, course)


def _disturb(setting: Setting, command: Command, left: deque[Fault], course: Course, say: Say) -> list[Fault]:
    """Faults, in order, while the command runs; returns those that were done."""
    done: list[Fault] = []
    requests = setting.bucket.requests if setting.bucket else lambda: 0
    since = mark(setting.scene, requests())
    while left and command.is_alive():
        fault = left[0]
        if not wait_for_moment(fault.moment, setting.scene, since, command.is_alive, requests):
            break
        if not (did := _do(fault, setting, command, course)):
            break
        left.popleft()
        done.append(fault)
        course.seen.append(fault)
        say(did)
        since = mark(setting.scene, requests())
        if fault.family in ("disk", "file") or fault.target in ("owner", "metaflow", ALL):
            break
    return done


def _do(fault: Fault, setting: Setting, command: Command, course: Course) -> str:
    """What was done; "" where it could not be."""
    if fault.family == "disk" and setting.disk:
        return fill(setting.disk, int(fault.size))
    if fault.family == "clock" and setting.clock:
        return setting.clock.jump(fault.size)
    if fault.family == "s3" and setting.bucket:
        return setting.bucket.fail(fault.how, int(fault.size))
    if fault.family == "file":
        return _damage(fault, setting, command, course)
    did = strike(fault, setting.scene, command.is_alive)
    course.was_killed = course.was_killed or (bool(did) and fault.target in ("owner", "metaflow", "task", ALL))
    return did


def _damage(fault: Fault, setting: Setting, command: Command, course: Course) -> str:
    """Kill all, and damage a file while nobody is there."""
    scene = setting.scene
    while not ((path := target(fault.target, scene.run, setting.repository)) and path.is_file()):
        if not command.is_alive():
            return ""
        time.sleep(POLL_S)
    course.was_killed = True
    scene.signal(ALL, signal.SIGKILL)
    if not scene.is_quiet():
        raise Lost(f"processes survive kill -9: {scene.processes(ALL)}")
    found = damage(fault, scene.run, setting.repository, scene.path / "copies")
    if found is None:
        return ""
    course.damages.append(found)
    return found.said


def _heed(setting: Setting, end: End, course: Course, say: Say) -> None:
    """Do what an error asks for. Raises Lost where it says nothing of what was damaged, or nothing was."""
    if not end.message:
        return
    exactly = [damaged for damaged in course.damages if str(damaged.path) in end.message]
    named = exactly or [damaged for damaged in course.damages if damaged.is_named_in(end.message)]
    if not named:
        raise Lost(f"it ended without a fault, or named another cause: {end.message[:800]}")
    say(f"it said: {end.message[:400]}")
    asked = re.search(r"(?:remove|delete) (/\S+?)[,;:.]?(?: |$)", end.message)
    for damaged in named:
        course.damages.remove(damaged)
        if asked and Path(asked[1]).is_relative_to(setting.scene.run.path):
            _remove(Path(asked[1]))
        elif "remove it" in end.message:
            _remove(damaged.path)
        else:
            damaged.put_back()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _compare(setting: Setting, bench: Bench, course: Course) -> None:
    """Raise Lost where the finished run differs; a damage that a check of its lineage names is put right first."""
    if bench.undisturbed is None:
        return
    found = _differences(setting, bench)
    for damaged in course.damages:
        if any(damaged.path.name in line for line in found):
            damaged.put_back()
            found = _differences(setting, bench)
    if found:
        raise Lost("; ".join(found))


def _differences(setting: Setting, bench: Bench) -> list[str]:
    assert bench.undisturbed is not None
    try:
        return list(differences(setting.result(), bench.undisturbed))
    except AlignmentError as error:
        return [str(error)]
