"""Running the flows as a user does: a command in a process of its own, in a folder of its own."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"


@dataclass(frozen=True)
class Place:
    """A folder with its own Metaflow datastore and run root."""

    path: Path

    @property
    def root(self) -> Path:
        return self.path / "runs"

    def environment(self, **extra: str) -> dict[str, str]:
        own = {"METAFLOW_DATASTORE_SYSROOT_LOCAL": str(self.path), "METAFLOW_USER": "tester", "PYTHONUNBUFFERED": "1"}
        return {**os.environ, **own, **extra}

    def command(self, flow: str, *arguments: str, **settings: object) -> list[str]:
        """`python flows/<flow>.py … run …` on the smoke preset with overrides, keys written section__field."""
        overrides = {"run__root": self.root, "wandb__mode": "disabled", **settings}
        sets = [word for key, value in overrides.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
        return [sys.executable, str(ROOT / "flows" / f"{flow}.py"), "--config", "config", str(SMOKE), *sets, *arguments]

    def start(self, *arguments: str, flow: str = "rs_flow", **settings: object) -> subprocess.Popen[str]:
        """Start a flow in a session of its own and come back at once."""
        return self.begin(self.command(flow, *arguments, **settings))

    def begin(self, command: list[str], **extra: str) -> subprocess.Popen[str]:
        """Start a command in a session of its own and come back at once."""
        return subprocess.Popen(
            command, cwd=self.path, env=self.environment(**extra), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, *arguments: str, flow: str = "rs_flow", **settings: object) -> "Finished":
        """Run a flow to its end."""
        return self.execute(self.command(flow, *(arguments or ("run",)), **settings))

    def resume(self, flow: str = "rs_flow", **extra: str) -> "Finished":
        """`python flows/<flow>.py resume`: takes the config of the run that it continues."""
        return self.execute(resuming(flow), **extra)

    def execute(self, command: list[str], **extra: str) -> "Finished":
        done = subprocess.run(
            command, cwd=self.path, env=self.environment(**extra), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900,
        )  # fmt: skip
        return Finished(done.returncode, done.stdout, self.latest())

    def latest(self) -> Path:
        """The newest run's folder."""
        return (self.root / "latest").resolve()

    def processes(self, text: str = "") -> list[int]:
        """Pids of live processes that work in this folder, as all of its flows do, and whose command line holds `text`.

        Flows that other tests run at the same time are none of them.
        """
        return [pid for pid in processes_naming(text) if _folder_of(pid) == self.path]


@dataclass(frozen=True)
class Finished:
    """A command that ended, and the newest run's folder at that time."""

    status: int
    output: str
    newest: Path

    @property
    def folder(self) -> Path:
        assert self.status == 0, self.output
        return self.newest

    @property
    def report(self) -> dict:
        return json.loads((self.folder / "report.json").read_text())

    @property
    def digest(self) -> str:
        """The weights digest of the last step's checkpoint."""
        last = max((self.folder / "checkpoints").glob("step-*/manifest.json"))
        return json.loads(last.read_text())["weights_sha256"]


def resuming(flow: str) -> list[str]:
    """The command that resumes a flow's last run."""
    return [sys.executable, str(ROOT / "flows" / f"{flow}.py"), "resume"]


def _folder_of(pid: int) -> Path | None:
    try:
        return Path(f"/proc/{pid}/cwd").readlink()
    except OSError:  # it has ended meanwhile
        return None


def processes_naming(text: str) -> list[int]:
    """Pids of live processes whose command line holds `text`, this one apart."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has ended meanwhile
                continue
            if text in line:
                found.append(int(entry.name))
    return found


def wait_for(condition, timeout_s: float = 120, what: str = "the condition"):
    """Poll until `condition()` is true; returns its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s} s"
        time.sleep(0.01)
    return value
