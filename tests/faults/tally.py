"""What became of the faults: counted, and the line that says so."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from faults.plan import Campaign, Fault, families


@dataclass(frozen=True, slots=True)
class Tried:
    """A fault that was done to a run of a campaign, and why the run was lost; "" where it survived."""

    campaign: str
    fault: Fault
    lost: str = ""


def summary(plan: Sequence[Campaign], tried: Sequence[Tried], seed: int) -> list[str]:
    """Lines on each family and on each loss; the last one is `faults: N tried, N survived, N lost`."""
    planned, done = families(plan), Counter(one.fault.family for one in tried)
    lost = Counter(one.fault.family for one in tried if one.lost)
    lines = [
        f"{family:<7} {done[family]:>4} of {planned[family]} tried, {done[family] - lost[family]} survived"
        for family in planned
    ]
    reasons = dict.fromkeys((one.campaign, one.lost) for one in tried if one.lost)
    for campaign, reason in reasons:
        lines.append(f"lost: {campaign}: {reason}")
        lines.append(f"      again: make test-faults SEED={seed} ONLY={campaign}")
    count = sum(lost.values())
    return [*lines, f"faults: {len(tried)} tried, {len(tried) - count} survived, {count} lost"]


def status(plan: Sequence[Campaign], tried: Sequence[Tried]) -> int:
    """The command's: 1 where a fault was lost, or was not tried although it stands in the plan."""
    return int(any(one.lost for one in tried) or len(tried) < sum(families(plan).values()))
