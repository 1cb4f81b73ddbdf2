"""What a report says of several steps together: how far selection lifts, what the reward server did, what it cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.config import Config

Step = Mapping[str, Any]

OF_THE_LOOP = ("rollouts", "scoring", "update", "validation", "overhead")
"""Phases during which all nodes of the loop are held; the others are those of one node's tasks."""


@dataclass(frozen=True, slots=True)
class Devices:
    """What a run computed on: `count` devices of a kind in each task, on `nodes` nodes while it loops."""

    device: str
    count: int
    nodes: int = 1


def devices_of(config: Config) -> Devices | None:
    """The devices that a run holds; None where its phases are tasks with devices of their own."""
    if config.loop.executor == "disaggregated":
        return None
    nodes = config.slurm.nodes if config.slurm.enabled else 1
    own = config.resources
    return Devices("GPU", own.gpu, nodes) if own.gpu else Devices("CPU core", own.cpu, nodes)


def device_hours(devices: Devices, seconds: Mapping[str, float], evaluation_seconds: float) -> dict[str, Any]:
    """What the phases' seconds make in hours of a device: `{"device", "phases": {phase: hours}, "total"}`."""
    phases = {name: value for name, value in seconds.items() if name != "total"}
    hours = {
        name: value * devices.count * (devices.nodes if name in OF_THE_LOOP else 1) / 3600
        for name, value in {**phases, "evaluation": evaluation_seconds}.items()
    }
    return {"device": devices.device, "phases": hours, "total": sum(hours.values())}


def selection_lift(steps: Sequence[Step]) -> dict[str, float | None]:
    """Mean of selected − all over the RS steps that selected something, of the reward and of the judge's score."""
    return {
        "reward": _mean(lifts(steps, "selected_reward_mean", "reward_mean")),
        "judge": _mean(lifts(steps, "selected_judge_mean", "judge_mean")),
    }


def lifts(steps: Sequence[Step], selected: str, every: str) -> list[tuple[int, float]]:
    """(RS step, selected − all) of each step that has both numbers."""
    return [
        (s["step"], s[selected] - s[every]) for s in steps if s.get(selected) is not None and s.get(every) is not None
    ]


def scoring_totals(steps: Sequence[Step], validations: Sequence[Step]) -> dict[str, int | None]:
    """Failed requests and restarts in all RS steps, and the answers of `reuse.scores`; None where nobody counted."""
    counted = [s["scoring_server"] for s in steps if s["scoring_server"].get("failures") is not None]
    caches = [r["scoring_cache"] for r in (*steps, *validations) if "scoring_cache" in r]
    return {
        "failures": sum(c["failures"] for c in counted) if counted else None,
        "restarts": sum(bool(c["restarted"]) for c in counted) if counted else None,
        "cache_hits": sum(c["hits"] for c in caches) if caches else None,
        "cache_misses": sum(c["misses"] for c in caches) if caches else None,
    }


def _mean(points: Sequence[tuple[int, float]]) -> float | None:
    return sum(y for _, y in points) / len(points) if points else None
