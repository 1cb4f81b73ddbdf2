"""What is done to which run and when, drawn from a seed. Pure: the same seed gives the same plan on any machine.

The instant at which a process then stands is the machine's: a plan that is repeated hits the same victims at the same
moments of a run, not at the same instruction.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Family = Literal["kill", "triton", "disk", "file", "s3", "clock", "stop"]
Event = Literal["begun", "step", "checkpoint", "evaluating", "requests"]

FEWEST: dict[Family, int] = {"kill": 100, "triton": 20, "disk": 10, "file": 20, "s3": 20, "clock": 5, "stop": 5}
"""Faults of each family that a whole plan holds, at the least."""

ALL = "all processes"
"""A power cut, but for what is in the disk's cache."""
WORKERS = ("owner", "launcher", "worker", ALL)
SERVER = ("supervisor", "tritonserver", "stub")
FLOW = ("metaflow", "task", "launcher", "worker", *SERVER, ALL)
RUN_FILES = (
    *("checkpoint weights", "checkpoint moments", "checkpoint manifest", "checkpoint DONE", "checkpoint config"),
    *("rollouts to be done again", "older rollouts", "metrics", "lineage", "scorers", "config", "prompts", "judge"),
)
EXPORT_FILES = ("export weights", "export card", "export settings", "export template", "export code")
LOST, CUT = "the answer is lost", "the connection is cut"


@dataclass(frozen=True, slots=True)
class Moment:
    """`delay_s` seconds after an event of the running command, or the `count`-th request to S3 since the last fault.

    begun: it was started. step, checkpoint: the next one is recorded, or being written. evaluating: the last RS step
    has its checkpoint.
    """

    event: Event
    delay_s: float = 0.0
    count: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `how` says what is done to `target`; `size` is a share, seconds, bytes or a count, as `how` wants."""

    family: Family
    how: str
    target: str
    moment: Moment
    size: float = 0.0

    def __str__(self) -> str:
        when = f"{self.moment.count} requests on" if self.moment.event == "requests" else self.moment.event
        return f"{self.how} {self.target} ({when} + {self.moment.delay_s:.2f} s, {self.size:.4g})"


@dataclass(frozen=True, slots=True)
class Campaign:
    """Faults of one setting, in order: `workers`, `server`, `flow`, `disk`, `files`, `exports`, `s3` or `clock`."""

    name: str
    setting: str
    faults: tuple[Fault, ...]


def draw(seed: int, *, short: bool = False) -> list[Campaign]:
    """The plan of a seed: all families in both forms, the short one in a few minutes."""
    # Those that wait longest come first, so that the others run beside them.
    counts: tuple[tuple[str, int, Callable[[random.Random, int], list[Fault]], int], ...] = (
        ("hangs", 0 if short else 2, _hangs, 3),
        ("flow", 1 if short else 4, _flow_kills, 2 if short else 6),
        ("clock", 1, _jumps, 1 if short else 5),
        ("workers", 1 if short else 7, _worker_kills, 3 if short else 9),
        ("server", 1 if short else 3, _server_faults, 4 if short else 15),
        ("files", 1 if short else 3, _damages, 2 if short else 5),
        ("exports", 0 if short else 1, _export_damages, 5),
        ("disk", 1 if short else 2, _full_disks, 1 if short else 5),
        ("s3", 1 if short else 2, _s3_faults, 4 if short else 10),
    )
    plan = []
    for setting, campaigns, faults, count in counts:
        for number in range(1, campaigns + 1):
            name = f"{setting}-{number}"
            drawn = faults(random.Random(f"{seed}/{name}"), count)
            plan.append(Campaign(name, "server" if setting == "hangs" else setting, tuple(drawn)))
    return plan


def families(campaigns: Sequence[Campaign]) -> Counter[Family]:
    """How many faults of each family there are."""
    return Counter(fault.family for campaign in campaigns for fault in campaign.faults)


def _moment(rng: random.Random, longest_start_s: float) -> Moment:
    """Half of the moments lie in a command's start, where a run spends most of its seconds here."""
    event = rng.choice(("begun", "begun", "step", "checkpoint"))
    return Moment(event, rng.uniform(0, longest_start_s if event == "begun" else 1.0))


def _dealt(rng: random.Random, among: Sequence[str], count: int) -> list[str]:
    """`count` of `among`, each as often as the others, in random order."""
    dealt: list[str] = []
    while len(dealt) < count:
        dealt += rng.sample(among, len(among))
    return rng.sample(dealt[:count], count)


def _worker_kills(rng: random.Random, count: int) -> list[Fault]:
    """Kills of a run's workers and their owner, and one worker that stands still for a while."""
    kills = [Fault("kill", "kill -9", who, _moment(rng, 12.0)) for who in _dealt(rng, WORKERS, count - 1)]
    stop = Fault("stop", "SIGSTOP, then SIGCONT", "worker", Moment("step", rng.uniform(0, 1)), rng.uniform(1, 6))
    kills.insert(rng.randrange(count), stop)
    return kills


def _server_faults(rng: random.Random, count: int) -> list[Fault]:
    """Kills of the local reward server's processes, a third of them crashes, while the workers go on."""
    crashes = count // 3
    kinds = rng.sample(["kill"] * (count - crashes) + ["crash"] * crashes, count)
    who = iter(_dealt(rng, SERVER, count))
    faults = []
    for kind in kinds:
        moment = Moment(rng.choice(("begun", "step", "step")), rng.uniform(0, 2))
        if kind == "kill":
            faults.append(Fault("kill", "kill -9", next(who), moment))
        else:
            crash = rng.choice(("SIGSEGV", "SIGABRT"))
            faults.append(Fault("triton", crash, rng.choice(("tritonserver", "stub")), moment))
    return faults


def _hangs(rng: random.Random, count: int) -> list[Fault]:
    """SIGSTOP of Triton's processes, which nobody continues: the launcher has to notice."""
    moment = [Moment("step", rng.uniform(0, 0.5)) for _ in range(count)]
    return [
        Fault("triton", "SIGSTOP", who, when)
        for who, when in zip(_dealt(rng, ("tritonserver", "stub"), count), moment, strict=True)
    ]


def _flow_kills(rng: random.Random, count: int) -> list[Fault]:
    """Kills under Metaflow, in all of its steps; the last one while it evaluates."""
    faults = [Fault("kill", "kill -9", who, _moment(rng, 20.0)) for who in _dealt(rng, FLOW, count - 1)]
    late = Fault("kill", "kill -9", rng.choice(("metaflow", "task")), Moment("evaluating", rng.uniform(0, 12)))
    return [*faults, late]


def _jumps(rng: random.Random, count: int) -> list[Fault]:
    """The wall clock jumps by up to a month, either way."""
    hours = [rng.choice((-1, 1)) * rng.choice((0.01, 1, 24, 720)) * rng.uniform(0.5, 1) for _ in range(count)]
    return [Fault("clock", "jump of hours", "wall clock", Moment("step", rng.uniform(0, 0.5)), h) for h in hours]


def _damages(rng: random.Random, count: int) -> list[Fault]:
    return _damaged(rng, _dealt(rng, RUN_FILES, count))


def _export_damages(rng: random.Random, count: int) -> list[Fault]:
    return _damaged(rng, _dealt(rng, EXPORT_FILES, count))


def _damaged(rng: random.Random, targets: Sequence[str]) -> list[Fault]:
    """Files cut off, or with a bit turned over, at a share of their length."""
    faults = []
    for target in targets:
        how = rng.choice(("truncate", "flip a bit of"))
        moment = Moment(rng.choice(("step", "checkpoint")), rng.uniform(0, 1))
        faults.append(Fault("file", how, target, moment, rng.random()))
    return faults


def _full_disks(rng: random.Random, count: int) -> list[Fault]:
    """So many bytes are left: none, or less than a checkpoint takes."""
    left = [rng.choice((0, 1, 1)) * rng.uniform(0, 400_000) for _ in range(count)]
    return [Fault("disk", "fill", "disk of the run", _moment(rng, 12.0), size) for size in left]


def _s3_faults(rng: random.Random, count: int) -> list[Fault]:
    """Faults of a few requests each; the last of them outlasts all tries."""
    faults = []
    for number in range(count):
        how = rng.choice(("500", "503", "time-out", CUT, LOST))
        times = 60 if number == count - 1 else rng.randint(1, 4)
        faults.append(Fault("s3", how, "requests to S3", Moment("requests", count=rng.randint(1, 12)), times))
    return faults
