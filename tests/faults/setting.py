"""The settings of campaigns: what a run is started by, where it lives, and what stands around it."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alignment.run_folder import RunFolder
from faults.disks import free, small_disk
from faults.injectors import ClockStandIn
from faults.plan import Campaign
from faults.s3_faults import Bucket, bucket
from faults.scene import SETTINGS, Scene
from flow_runs import ROOT, Place, resuming

LONGEST_S = 420.0
"""No command of these runs takes longer, on two busy cores and with a Triton that hangs: one that does is lost."""
RUN = "run"


@dataclass(frozen=True)
class Bench:
    """What all campaigns share: a folder, an export, its server at `url`, and a run that nothing disturbed."""

    folder: Path
    repository: Path
    url: str
    undisturbed: RunFolder | None = None


@dataclass(frozen=True)
class Setting:
    """A scene with what the faults of its campaign act on besides processes; None what it has not."""

    scene: Scene
    is_flow: bool = False
    repository: Path = Path()
    disk: Path | None = None
    bucket: Bucket | None = None
    clock: ClockStandIn | None = None

    def command(self) -> list[str]:
        """What starts the run, or goes on with it."""
        overrides = [f"run.root={self.scene.remote or self.scene.root}", *self.scene.settings]
        if not self.is_flow:
            return [sys.executable, "-m", "faults.owner", RUN, *overrides]
        if (self.scene.path / ".metaflow" / "RSFlow" / "latest_run").exists():
            return resuming("rs_flow")
        sets = dict(word.replace(".", "__", 1).split("=", 1) for word in overrides)
        return Place(self.scene.path).command("rs_flow", "run", **sets)

    def mend(self) -> None:
        """End what outlasts a command: a full disk has room again, S3 answers."""
        if self.disk:
            free(self.disk)
        if self.bucket:
            self.bucket.proxy.decide = lambda method, path: None

    def result(self) -> RunFolder:
        """The finished run, as whoever comes later finds it."""
        if self.bucket is None or self.scene.remote is None:
            return self.scene.run
        return self.bucket.fetch(f"{self.scene.remote}/{RUN}", self.scene.path / "fetched" / RUN)


@contextlib.contextmanager
def setting_of(campaign: Campaign, bench: Bench, number: int) -> Iterator[Setting]:
    """A new scene for the `number`-th run of a campaign, and what its setting needs."""
    path = bench.folder / campaign.name / f"run-{number}"
    path.mkdir(parents=True)
    root, own = path / "runs", campaign.setting
    served_there = (*SETTINGS, f"reward.url={bench.url}")
    served_here = (*SETTINGS, f"reward.repository={bench.repository}")
    with contextlib.ExitStack() as stack:
        if own == "disk":
            disk = stack.enter_context(small_disk(path / "disk"))
            yield Setting(Scene(path, RUN, disk, served_there), disk=disk)
        elif own == "s3":
            there = stack.enter_context(bucket())
            settings = (*served_there, f"run.workspace={path / 'workspace'}")
            environment = {**there.environment(), "RS_CACHE": str(path / "cache")}
            local = path / "workspace" / there.uri.removeprefix("s3://") / "runs"
            yield Setting(Scene(path, RUN, local, settings, environment, f"{there.uri}/runs"), bucket=there)
        elif own == "clock":
            clock = ClockStandIn(path)
            yield Setting(Scene(path, RUN, root, served_here, clock.environment()), clock=clock)
        elif own in ("flow", "exports"):
            repository = root / "triton_repo"
            yield Setting(Scene(path, RUN, root, SETTINGS), own == "flow", repository)
        else:
            yield Setting(Scene(path, RUN, root, served_here if own == "server" else served_there))


@dataclass(frozen=True)
class Command:
    """A started command of a run: its process, its output, and what it was asked for."""

    process: subprocess.Popen[bytes]
    log: Path

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def wait(self, longest_s: float = LONGEST_S) -> int | None:
        """Its status; None where it takes too long."""
        deadline = time.monotonic() + longest_s
        while self.is_alive():
            if time.monotonic() > deadline:
                return None
            time.sleep(0.05)
        return self.process.returncode


def start(setting: Setting, number: int) -> Command:
    """Start the scene's command for the `number`-th time."""
    scene = setting.scene
    log = scene.path / f"command-{number:02d}.log"
    python_path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "DS_ACCELERATOR": "cpu"}
    inherited = Place(scene.path).environment(**python_path)
    environment = {name: value for name, value in inherited.items() if not name.startswith("AWS_")} | scene.environment
    with log.open("wb") as output:
        process = subprocess.Popen(
            setting.command(), cwd=scene.path, env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return Command(process, log)
