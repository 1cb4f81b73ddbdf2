"""What runs a step on Slurm, without a Slurm: the command, and who ends it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignment.errors import ConfigError
from alignment.launch import Gang, _launcher
from alignment.reward_server import external_url
from alignment.slurm_command import NOTICE, SlurmTask, command
from alignment.slurm_task import recorded
from flow_runs import ROOT, wait_for

TASK = SlurmTask("RSFlow-7-iterate-9-0", cpu=4, gpu=8, memory=1000, grace_s=60.0, sources=("/src", "/work"))
ASKED = 130
WORDS = ["/venv/bin/python", "flows/rs_flow.py"]
STEP = [
    "srun", "--job-name=RSFlow-7-iterate-9-0", "--nodes=1", "--ntasks=1", "--cpus-per-task=4", "--mem=1000M",
    "--gres=gpu:8",
]  # fmt: skip
ENDS = ["--kill-on-bad-exit=1", "--export=ALL"]


def test_a_step_is_a_job_of_its_own_that_is_told_of_its_end() -> None:
    job = [
        "salloc", "--job-name=RSFlow-7-iterate-9-0", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=4",
        "--mem=1000M", "--gres=gpu:8", f"--signal={int(NOTICE)}@90",
    ]  # fmt: skip
    assert command(TASK, WORDS, {}) == [*job, *STEP, *ENDS, *WORDS]


def test_what_the_config_asks_for_reaches_the_job_alone() -> None:
    own = {"partition": "a,b", "account": "lab", "qos": "high", "constraint": "a100&nvlink", "time": "1:2:03:04"}
    task = SlurmTask("t", 1, 0, 500, 10.0, nodes=2, extra_args=("--exclusive",), **own)
    words = command(task, WORDS, {})
    job, step = words[: words.index("srun")], words[words.index("srun") :]
    assert {"--partition=a,b", "--account=lab", "--qos=high", "--constraint=a100&nvlink", "--nodes=2"} <= set(job)
    assert {"--time=1-02:03:04", "--exclusive", "--signal=23@40"} <= set(job)
    assert not any(word.startswith("--gres") for word in job)
    assert {"--nodes=1", "--ntasks=1", "--gres=none"} <= set(step)


def test_within_an_allocation_it_is_a_job_step() -> None:
    assert command(TASK, WORDS, {"SLURM_JOB_ID": "5"}) == [*STEP, *ENDS, *WORDS]
    inside = {"SLURM_JOB_ID": "5", "RS_HET_GROUP": "1"}
    assert command(TASK, WORDS, inside) == [*STEP, "--het-group=1", *ENDS, *WORDS]


def test_a_container_sees_the_sources_begins_in_the_last_and_takes_its_own_python() -> None:
    own = {"image": "trainer.sqsh", "mounts": ("/data:/data:ro", "/work"), "sources": TASK.sources}
    pyxis = command(SlurmTask("t", 1, 0, 500, 10.0, container="pyxis", **own), WORDS, {})
    assert pyxis[-5:] == [
        "--container-image=trainer.sqsh",
        "--container-mounts=/src:/src,/work:/work,/data:/data:ro",
        "--container-workdir=/work",
        "python",
        "flows/rs_flow.py",
    ]
    apptainer = command(SlurmTask("t", 1, 1, 500, 10.0, container="apptainer", **own), WORDS, {})
    binds = ["--bind", "/src", "--bind", "/work", "--bind", "/data:/data:ro"]
    inside = [*binds, "--pwd", "/work"]
    assert apptainer[-14:] == ["apptainer", "exec", "--nv", *inside, "trainer.sqsh", "python", "flows/rs_flow.py"]


def test_one_srun_starts_the_launcher_on_all_nodes_of_a_gang() -> None:
    words = _launcher(Gang(0, 2, "10.0.0.1", 20001, through=("srun",)))
    assert words == ["alignment.slurm_node", "--nnodes", "2", "--master-addr", "10.0.0.1", "--master-port", "20001"]


def test_what_is_recorded_is_what_slurm_says() -> None:
    environment = {"SLURM_JOB_ID": "5", "SLURMD_NODENAME": "n1", "SLURM_JOB_PARTITION": "gpu", "HOME": "/root"}
    assert recorded(environment) == {"slurm_job_id": "5", "slurm_node": "n1", "slurm_partition": "gpu"}


def test_the_reward_servers_address_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [external_url(url) for url in (None, "host:8001", "env:8001")] == [None, "host:8001", "env:8001"]
    monkeypatch.setenv("RS_REWARD_URL", "n1:8001")
    assert external_url("env:RS_REWARD_URL") == "n1:8001"
    monkeypatch.delenv("RS_REWARD_URL")
    with pytest.raises(
        ConfigError, match=r"reward.url \(env:RS_REWARD_URL\): RS_REWARD_URL \(''\) must be set to host"
    ):
        external_url("env:RS_REWARD_URL")


SALLOC_STAND_IN = """#!{python}
# Waits for nodes, which are a file; an interrupt cancels it then, and ends the job at once later, as salloc's does.
import signal, subprocess, sys, time
from pathlib import Path
def end(*_):
    Path("saved").write_text("cancelled")
    sys.exit(3)
signal.signal(signal.SIGINT, end)
print("waits", flush=True)
while not Path("nodes").exists():
    time.sleep(0.05)
sys.exit(subprocess.run(sys.argv[1:]).returncode)
"""
SAVES = "trap '' INT; echo begun; while read -r; do :; done; sleep 0.2; echo saved > saved"
WAYS = ("owner", signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


class TestAttending:
    """infra/slurm/attend.py in front of commands that stand in for salloc and srun: they see the end of their input."""

    def attend(self, folder: Path, *command: str) -> subprocess.Popen[str]:
        attend = [sys.executable, str(ROOT / "infra" / "slurm" / "attend.py"), "0.5", str(folder / "shared")]
        return subprocess.Popen(
            [*attend, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )

    def end(self, process: subprocess.Popen[str], how: object) -> None:
        if how == "owner":
            process.stdin.close()
        else:
            process.send_signal(how)

    def says_in_the_end(self, folder: Path, what: str) -> None:
        saved = folder / "saved"
        wait_for(lambda: saved.exists() and saved.read_text().strip() == what, 30, what)

    def test_status_and_lines_are_the_commands(self, tmp_path: Path) -> None:
        process = self.attend(tmp_path, "bash", "-c", "echo one; exit 7")
        assert (process.stdout.read(), process.wait()) == ("one\n", 7)

    def test_a_status_of_0_counts_if_the_task_has_said_that_it_ended_well(self, tmp_path: Path) -> None:
        assert self.attend(tmp_path, "bash", "-c", "touch $RS_TASK_DONE").wait() == 0
        assert self.attend(tmp_path, "true").wait() == 1

    def test_a_command_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        assert self.attend(tmp_path, "nonesuch").wait() == 127

    @pytest.mark.parametrize("how", WAYS)
    def test_the_command_sees_its_input_end_whatever_ends_the_attendant(self, tmp_path: Path, how: object) -> None:
        process = self.attend(tmp_path, "bash", "-c", SAVES)
        assert process.stdout.readline() == "begun\n"
        self.end(process, how)
        self.says_in_the_end(tmp_path, "saved")
        assert process.wait(30) == (-signal.SIGKILL if how == signal.SIGKILL else ASKED)

    @pytest.mark.parametrize("how", WAYS)
    @pytest.mark.parametrize(("has_nodes", "says"), [(False, "cancelled"), (True, "saved")])
    def test_a_job_is_cancelled_that_waits_and_saves_that_runs(
        self, tmp_path: Path, how: object, has_nodes: bool, says: str
    ) -> None:
        (tmp_path / "salloc").write_text(SALLOC_STAND_IN.format(python=sys.executable))
        (tmp_path / "salloc").chmod(0o755)
        if has_nodes:
            (tmp_path / "nodes").touch()
        process = self.attend(tmp_path, "./salloc", "bash", "-c", SAVES)
        assert process.stdout.readline() == "waits\n"
        if has_nodes:
            assert process.stdout.readline() == "begun\n"
        self.end(process, how)
        self.says_in_the_end(tmp_path, says)

    def test_a_file_of_configs_is_copied_to_where_all_nodes_see_it(self, tmp_path: Path) -> None:
        (tmp_path / "own.json").write_text("{}")
        words = [
            "bash",
            "-c",
            'echo "$2"; cat "$2"; touch $RS_TASK_DONE',
            "bash",
            "--local-config-file",
            str(tmp_path / "own.json"),
        ]
        process = self.attend(tmp_path, *words)
        name, text = process.stdout.read().splitlines()
        assert process.wait() == 0
        assert (Path(name).parent, text) == (tmp_path / "shared", "{}")
        assert list((tmp_path / "shared").iterdir()) == []


ENDING = """
import sys, time
from alignment.slurm_task import end_in_order
end_in_order(60.0)
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    time.sleep(0.3)  # a second request comes meanwhile
    print("saved", flush=True)
"""


@pytest.mark.parametrize("first", ["owner", signal.SIGTERM, NOTICE])
def test_a_task_is_interrupted_once_and_saves(first: object) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ENDING], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    if first == "owner":
        process.stdin.close()
        process.stdin = None
    else:
        process.send_signal(first)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate()
    assert out == "saved\n" and "KeyboardInterrupt" in errors
    assert process.returncode
