"""Command line: draw a plan, carry it out, count; 1 where a run was lost or a fault of the plan was not tried."""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from alignment.config import load_config
from alignment.reward_server import reward_server
from alignment.scoring import RewardClient
from alignment.stages import begin, prepare_scorers
from alignment.task import START_S
from faults import __doc__ as about
from faults.campaign import Say, carry_out
from faults.disks import why_no_disk
from faults.plan import Campaign, draw
from faults.scene import SETTINGS, STEPS, Scene
from faults.setting import Bench, setting_of, start
from faults.tally import Tried, status, summary
from flow_runs import SMOKE

LANES = 3
"""Campaigns side by side: of two cores one would often wait for a server to start, or to be found hanging."""


def main() -> int:
    """Returns the exit status."""
    options = _options()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    plan = [one for one in draw(seed, short=options.short) if one.name.startswith(options.only)]
    if not plan:
        sys.exit(f"--only {options.only}: the plan has {', '.join(c.name for c in draw(seed, short=options.short))}")
    count, begun = sum(len(one.faults) for one in plan), time.monotonic()
    say = _teller(begun)
    say(f"seed {seed}: {count} faults in {len(plan)} campaigns; --seed {seed} draws them again")
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    if any(one.setting == "disk" for one in plan) and (refused := why_no_disk(folder)):
        sys.exit(f"no disk can be filled: {refused}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _give_up(folder))
    with _bench(folder, say) as bench:
        tried = _all(plan, bench, say)
    say("")
    print(*summary(plan, tried, seed), sep="\n", flush=True)
    return status(plan, tried)


def _give_up(folder: Path) -> None:
    """End with all processes of all scenes, and with the server, which ends with this one."""
    for scene in folder.glob("*/run-*"):
        Scene(scene, "", scene).clear()
    os._exit(1)


def _all(plan: Sequence[Campaign], bench: Bench, say: Say) -> list[Tried]:
    """Campaigns in LANES; what became of their faults."""

    def one(campaign: Campaign) -> list[Tried]:
        begun, tried = time.monotonic(), []
        for fault in carry_out(campaign, bench, say):
            tried.append(fault)
        lost = next((fault.lost for fault in tried if fault.lost), "")
        seconds = time.monotonic() - begun
        say(f"{campaign.name}: {len(tried)} faults in {seconds:.0f} s, {f'LOST: {lost}' if lost else 'survived'}")
        return tried

    with ThreadPoolExecutor(LANES) as lanes:
        return [fault for tried in lanes.map(one, plan) for fault in tried]


@contextlib.contextmanager
def _bench(folder: Path, say: Say) -> Iterator[Bench]:
    """The reward model exported and served, and a run that nothing disturbs."""
    config = load_config(SMOKE, [*SETTINGS, f"run.root={folder / 'runs'}"])
    reference, _ = prepare_scorers(config, begin(config, "exporting")[0])
    repository = Path(reference["repository"])
    with reward_server(
        repository=repository,
        name=reference["name"],
        version=reference["version"],
        url=None,
        grpc_port=0,
        log=folder / "triton.log",
        threads=1,
    ) as server:
        with RewardClient(server.url) as client:
            client.wait_ready(START_S)
        bench = Bench(folder, repository, server.url)
        with setting_of(Campaign("undisturbed", "workers", ()), bench, 1) as setting:
            command = start(setting, 1)
            if command.wait() != 0:
                sys.exit(f"the run that nothing disturbed failed:\n{command.log.read_text()[-2000:]}")
            say(f"undisturbed: {STEPS} RS steps; the files of this and of all lost runs are in {folder}")
            yield replace(bench, undisturbed=setting.result())


def _teller(begun: float) -> Say:
    lock = threading.Lock()

    def say(text: str) -> None:
        with lock:
            print(f"[{time.monotonic() - begun:5.0f} s] {text}" if text else "", flush=True)

    return say


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m faults", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="of the plan; a new one without, which is printed")
    parser.add_argument("--short", action="store_true", help="the plan that CI carries out: each family, few faults")
    parser.add_argument(
        "--only", metavar="NAME", default="", help="only campaigns whose names begin so: disk, workers-2"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
