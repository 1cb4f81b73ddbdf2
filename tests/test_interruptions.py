"""What ends a run, and what goes on after it: real workers and servers, killed, stopped and cut off.

`tests/test_flow.py` kills Metaflow and its tasks; here the workers' owner is a plain process.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from alignment import colocated
from alignment.errors import CheckpointError, ConfigError, RewardServerError, StoppedError, WorkerError
from alignment.lineage import check, main
from alignment.preparation import load_prompt_sets
from alignment.reward_server import reward_server
from alignment.rs_step import step_prompts
from alignment.task import COMMAND_STARTED
from flow_runs import ROOT, processes_naming, wait_for
from infra.triton_setup import free_ports
from interruptions import (
    SETTINGS,
    Bench,
    consumed,
    copy_up_to,
    decisions,
    iterate,
    served_bench,
    steps,
    wait_until_served,
)
from killed_worker import MOMENTS
from models.checkpoints import checkpoint_folder, finished, last_checkpoint, read_manifest
from reward_fixtures import command_line, descendants

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with served_bench(tmp_path_factory.mktemp("interruptions")) as bench:
        yield bench


@pytest.fixture(scope="module")
def undisturbed(bench):
    """Six RS steps that nothing disturbs; its checkpoints 2, 4 and 6 are all kept."""
    config, run = bench.begin("undisturbed")
    iterate(config, run)
    return run


def digest(run, step=6):
    return read_manifest(checkpoint_folder(run.checkpoints, step))["weights_sha256"]


def assert_equal_to(undisturbed, run):
    """The same prompts, responses, decisions, validations and weights, each once."""
    assert consumed(run) == consumed(undisturbed)
    for step in range(1, 7):
        assert decisions(run, step) == decisions(undisturbed, step)
    kept = ("step", "reward_mean", "judge_mean")
    ours, theirs = ([[r[k] for k in kept] for r in steps(x, "validation")] for x in (run, undisturbed))
    assert ours == [pytest.approx(row, abs=1e-5) for row in theirs]  # a server's batches move a score by some 1e-6
    assert [row[0] for row in ours] == [0, 3, 6]
    assert digest(run) == digest(undisturbed)


def test_killed_at_every_stage_boundary_nothing_is_lost_or_done_twice(bench, undisturbed, monkeypatch):
    # Checkpoints are due at 2, 4 and 6, validations at 3 and 6: each moment at a step that has it.
    at = {
        "before rollouts": 1,
        "before selection": 1,
        "before the rollouts are written": 1,
        "before the update": 2,
        "after the update": 2,
        "after the record": 2,
        "while the checkpoint is written": 2,
        "before the checkpoint is sealed": 2,
        "before its name": 2,
        "before pruning": 2,
        "before the validation": 3,
        "after the validation": 3,
        "after pruning": 4,
    }
    assert set(at) == set(MOMENTS)
    config, run = bench.begin("killed", "loop.keep_last=1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setattr(colocated, "WORKER", "killed_worker")
    for moment, step in at.items():
        monkeypatch.setenv("RS_KILL", f"{moment} {step}")
        with pytest.raises(WorkerError):
            iterate(config, run)
        done = last_checkpoint(run.checkpoints)
        saved = {"before pruning": 2, "before the validation": 2, "after the validation": 2, "after pruning": 4}
        assert (done.step if done else 0) == saved.get(moment, 0), moment
    monkeypatch.setenv("RS_KILL", "after pruning 0")  # never
    assert iterate(config, run).step == 6
    assert_equal_to(undisturbed, run)
    assert [p.name for p in finished(run.checkpoints)] == ["step-000006"]
    assert not list(run.checkpoints.glob(".*"))
    assert all(right for right, _ in check(run)), list(check(run))


def start_owner(bench, run, *overrides):
    """The owner of one iteration as a process."""
    settings = (f"run.root={bench.root}", f"reward.url={bench.url}", *SETTINGS, *overrides)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, str(ROOT / "tests" / "interruptions.py"), str(run.path), *settings]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_whatever_ends_the_owner_the_workers_save_their_last_step(bench, undisturbed, how):
    late = "loop.save_interval=6"  # so that nothing is saved in between but for the signal
    config, run = bench.begin(f"ended-by-{how.name}", late)
    owner = start_owner(bench, run, late)
    wait_for(lambda: len(steps(run)) >= 2, what="RS step 2")
    owner.send_signal(how)
    owner.wait(60)
    wait_for(lambda: not processes_naming(str(run.path)), 60, "the end of the workers")
    saved = last_checkpoint(run.checkpoints)
    assert saved is not None and saved.step == len(steps(run)) >= 2
    iterate(config, run)
    assert_equal_to(undisturbed, run)


def test_a_worker_told_to_end_saves_its_last_step(bench, undisturbed):
    late = "loop.save_interval=6"
    config, run = bench.begin("worker-sigterm", late)

    def end_the_worker():
        wait_for(lambda: len(steps(run)) >= 2, what="RS step 2")
        os.kill(processes_naming(f"-m alignment.worker --folder {run.path}")[-1], signal.SIGTERM)

    threading.Thread(target=end_the_worker).start()
    with pytest.raises(StoppedError, match=r"stopped after RS step \d of 6: SIGTERM .*`.*resume` goes on from there"):
        iterate(config, run)
    assert last_checkpoint(run.checkpoints).step == len(steps(run)) >= 2
    iterate(config, run)
    assert_equal_to(undisturbed, run)


def test_a_launcher_told_to_end_lets_its_workers_save(bench, undisturbed):
    late = "loop.save_interval=6"
    config, run = bench.begin("launcher-sigterm", late)

    def end_the_launcher():
        wait_for(lambda: len(steps(run)) >= 2, what="RS step 2")
        os.kill(processes_naming(f"alignment.worker --folder {run.path}")[0], signal.SIGTERM)

    threading.Thread(target=end_the_launcher).start()
    with pytest.raises(StoppedError, match=r"stopped after RS step \d of 6: SIGTERM"):
        iterate(config, run)
    assert last_checkpoint(run.checkpoints).step == len(steps(run)) >= 2


def test_a_request_that_hangs_does_not_keep_a_worker_from_saving(mortal):
    bench, port, serve = mortal
    with serve():
        config, run = bench.begin("hanging", "loop.save_interval=6", "loop.stop_grace_s=10", "reward.timeout_s=100")

        def hang_then_end():
            wait_for(lambda: len(steps(run)) >= 2, what="RS step 2")
            servers = processes_naming(f"port={port} ")
            for pid in servers:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(1)
            os.kill(processes_naming(f"-m alignment.worker --folder {run.path}")[-1], signal.SIGTERM)

        threading.Thread(target=hang_then_end).start()
        with pytest.raises(StoppedError, match=r"stopped after RS step \d of 6: SIGTERM"):
            iterate(config, run)
        end_server(port)
    assert last_checkpoint(run.checkpoints).step == len(steps(run)) >= 2


def test_the_time_limit_stops_with_a_checkpoint(bench, monkeypatch):
    long = ("loop.max_steps=100000", "loop.steps_per_iteration=100000", "loop.save_interval=100000")
    limit = "loop.max_time_per_run=00:00:00:30"
    config, run = bench.begin("limited", *long, limit)
    monkeypatch.setenv(COMMAND_STARTED, str(time.time()))
    with pytest.raises(StoppedError, match=r"stopped after RS step (\d+) of 100000: loop\.max_time_per_run is over"):
        iterate(config, run)
    assert last_checkpoint(run.checkpoints).step == len(steps(run)) > 0


def test_an_epoch_limit_ends_the_run(bench):
    # 64 training prompts are left by the held-out ones: eight steps of eight prompts an epoch.
    config, run = bench.begin("epochs", "loop.max_epochs=1", "loop.max_steps=1000", "loop.steps_per_iteration=1000")
    last = iterate(config, run).step
    read = [prompt_id for prompts in consumed(run) for prompt_id in prompts]
    train = [json.loads(line)["id"] for line in (run.prompts / "train.jsonl").read_text().splitlines()]
    assert last == len(train) // 8 and len(set(read)) == len(read) == last * 8


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 2), (2, 0), (2, 2)])
def test_a_resume_on_as_many_ranks_is_bit_identical(bench, ranks, zero_stage):
    """One rank under ZeRO 0 is what all the other tests look at."""
    shape = (f"resources.cpu_workers={ranks}", f"training.zero_stage={zero_stage}")
    config, whole = bench.begin(f"whole-{ranks}-{zero_stage}", *shape, "loop.max_steps=4")
    iterate(config, whole)
    resumed = copy_up_to(whole, f"resumed-{ranks}-{zero_stage}", 2)
    iterate(config, resumed)
    assert digest(resumed, 4) == digest(whole, 4)
    ours, theirs = (sorted((checkpoint_folder(run.checkpoints, 4) / "optimizer").iterdir()) for run in (resumed, whole))
    assert len(ours) == ranks
    assert [p.read_bytes() for p in ours] == [p.read_bytes() for p in theirs]


def test_a_new_run_goes_on_from_another_with_more_workers_and_steps(bench, undisturbed, capfd):
    more = ("loop.max_steps=8", "resources.cpu_workers=2", "training.zero_stage=2", "training.lr=1e-4")
    config, run = bench.begin("going-on", "resume.from=undisturbed", *more)
    assert iterate(config, run).step == 8
    said = capfd.readouterr().err
    assert "continuing after RS step 6" in said
    assert "written by 1 workers under ZeRO 0 and this run has 2 under ZeRO 2: the weights go on" in said
    # The prompts go on in their order: a whole run of eight steps reads the same.
    _, whole = bench.begin("whole-8", "loop.max_steps=8")
    train = load_prompt_sets(whole.path).train
    assert consumed(run) == [[p.prompt_id for p in step_prompts(config, train, step)] for step in range(1, 9)]
    assert [r["lr"] for r in steps(run)][-2:] == [1e-4, 1e-4]
    # Complete by itself: rollouts, records, checkpoints and the chain down to the base.
    assert [p.name for p in sorted(run.rollouts.iterdir())] == [f"step-{i:06d}.parquet" for i in range(1, 9)]
    manifest = read_manifest(checkpoint_folder(run.checkpoints, 8))
    assert (manifest["parent"]["run_id"], manifest["parent"]["step"]) == ("undisturbed", 6)
    assert manifest["parent"]["weights_sha256"] == digest(undisturbed)
    assert all(right for right, _ in check(run)), list(check(run))


def end_server(port):
    """Kill the server at a port and its supervisor at once; an orderly end would answer for some seconds more."""
    for pid in processes_naming(f"port={port} ") + processes_naming(f"--grpc-port {port} "):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def mortal(bench):
    """A bench whose server is at a port of its own, and a way to serve there."""
    port = free_ports(1)[0]
    start = partial(
        reward_server, repository=bench.root / "triton_repo", name="reward_model", version="1",
        url=None, grpc_port=port, log=bench.root / "mortal.log", threads=1,
    )  # fmt: skip

    @contextlib.contextmanager
    def serve():
        with start() as server:
            wait_until_served(server.url)
            yield

    return Bench(bench.root, f"127.0.0.1:{port}"), port, serve


def end_server_after(run, done, port):
    """In the background: once a run has `done` RS steps, its server is gone."""

    def end():
        wait_for(lambda: len(steps(run)) >= done, what=f"RS step {done}")
        end_server(port)

    thread = threading.Thread(target=end)
    thread.start()
    return thread


def test_a_server_that_stays_away_stops_the_run_with_a_checkpoint(mortal, undisturbed):
    bench, port, serve = mortal
    with serve():
        config, run = bench.begin("server-gone", "loop.save_interval=6", "reward.patience_s=1")
        ending = end_server_after(run, 2, port)
        with pytest.raises(RewardServerError, match=r"failed \d+ times in \d+ s, at last with UNAVAILABLE"):
            iterate(config, run)
        ending.join()
    assert last_checkpoint(run.checkpoints).step == len(steps(run)) >= 2
    with serve():
        iterate(config, run)
    assert_equal_to(undisturbed, run)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("loop.max_steps=6",), "has 6 RS steps behind it, and this run is to have 6: raise loop.max_steps"),
        (("loop.max_steps=8", "seed=1"), "was another task: seed (0 there, 1 here). Keep these keys"),
        (("loop.max_steps=8", "reward.version=7"), "reward.version (7) is not the 1 that resume.from"),
        (("resume.from=nowhere",), "resume.from (nowhere): no run of that id in"),
    ],
)
def test_what_a_run_cannot_go_on_with(bench, undisturbed, overrides, said):
    with pytest.raises(ConfigError) as caught:
        bench.begin(f"no-{len(said)}", f"resume.from={undisturbed.path}", *overrides)
    assert said in str(caught.value)


def test_going_on_twice_undoes_nothing(bench, undisturbed):
    more = ("resume.from=undisturbed", "loop.max_steps=7", "loop.save_interval=1")
    config, run = bench.begin("twice", *more)
    iterate(config, run)
    bench.begin("twice", *more)  # a first step that is resumed
    assert len(steps(run)) == 7 and last_checkpoint(run.checkpoints).step == 7
    assert all(right for right, _ in check(run)), list(check(run))


def test_a_server_that_comes_back_is_waited_for(mortal, undisturbed):
    bench, port, serve = mortal
    with serve():
        config, run = bench.begin("server-back", "reward.patience_s=120")
        ending = end_server_after(run, 2, port)
        waiting = threading.Thread(target=iterate, args=(config, run))
        waiting.start()
        ending.join()
    assert waiting.is_alive()
    with serve():
        waiting.join(180)
    assert_equal_to(undisturbed, run)


def test_a_local_server_whose_processes_are_killed_is_started_again(bench, undisturbed):
    config, run = bench.begin("local-server")
    local = config.model_copy(update={"reward": config.reward.model_copy(update={"url": None})})
    scorers = json.loads(run.scorers.read_text())
    scorers["reward_model"]["repository"] = str(bench.root / "triton_repo")
    run.scorers.write_text(json.dumps(scorers))

    def mine(name):
        """Of the servers below this process those that were not there before: other tests have some too."""
        try:
            return {pid for pid in descendants(os.getpid()) if name in command_line(pid)} - others
        except OSError:  # one ended while we looked: look again
            return set()

    def kill_both():
        for step, name in ((1, "triton_python_backend_stub"), (3, "bin/tritonserver")):
            wait_for(lambda step=step: len(steps(run)) >= step, what=f"RS step {step}")
            for pid in wait_for(lambda name=name: mine(name)):
                os.kill(pid, signal.SIGKILL)

    others = descendants(os.getpid())
    killer = threading.Thread(target=kill_both)
    killer.start()
    iterate(local, run)
    killer.join()
    log = (run.path / "logs" / "triton.log").read_text()
    assert log.count("starting the server again") == 2
    assert_equal_to(undisturbed, run)


def test_a_checkpoint_of_another_task_is_refused(bench, undisturbed):
    config, run = bench.begin("foreign", "seed=3")
    shutil.copytree(checkpoint_folder(undisturbed.checkpoints, 6), checkpoint_folder(run.checkpoints, 6))
    with pytest.raises(CheckpointError, match="step-000006 was written by the run undisturbed: go on from it by"):
        iterate(config, run)
    (run.lineage).mkdir(exist_ok=True)  # with its manifest, as if it had been adopted
    shutil.copy(checkpoint_folder(undisturbed.checkpoints, 6) / "manifest.json", run.lineage / "step-000006.json")
    with pytest.raises(CheckpointError, match=r"step-000006 is a checkpoint of another task: seed \(0 there, 3 here\)"):
        iterate(config, run)


def test_lineage_answers(bench, undisturbed, capsys):
    path = str(undisturbed.path)
    assert main([path]) == 0
    said = capsys.readouterr().out
    for part in (digest(undisturbed), "selection", "top_per_prompt", "reward_model", "base tiny", "48 read by seed 0"):
        assert part in said
    assert main([path, "--step", "2"]) == 0
    said = capsys.readouterr().out
    rows = undisturbed.read_rollouts(2)
    assert "8 of 32 responses selected, scored by reward_model version 1" in said
    assert all(row["reason"] in said and row["prompt_id"] in said for row in rows)
    assert main([path, "--step", "9"]) == 1
    assert "RS step 9 has not been selected" in capsys.readouterr().err
    assert main(["no-such-run"]) == 1
    assert "no run folder of that name" in capsys.readouterr().err

    _, other = bench.begin("other-rule", "selection.strategy=random_per_prompt", "loop.max_steps=2")
    iterate(bench.config("selection.strategy=random_per_prompt", "loop.max_steps=2"), other)
    assert main([path, "--diff", str(other.path)]) == 0
    said = capsys.readouterr().out
    assert "selection.strategy ('random_per_prompt' there, 'top_per_prompt' here)" in said
    assert "decisions differ from RS step 1 on" in said and "other weights at the end" in said


@pytest.mark.parametrize(
    "what",
    [
        *("rollouts/step-000003.parquet", "prompts/train.jsonl", "lineage/step-000002.json", "judge/judge.json"),
        "checkpoints/step-000002/model.safetensors",
    ],
)
def test_lineage_finds_what_was_changed(undisturbed, capsys, what):
    copy = copy_up_to(undisturbed, f"changed-{what.replace('/', '-')}", 6)
    assert main([str(copy.path), "--verify"]) == 0
    data = bytearray((copy.path / what).read_bytes())
    data[-3] ^= 1
    (copy.path / what).write_bytes(data)
    capsys.readouterr()
    assert main([str(copy.path), "--verify"]) == 1
    assert any(line.startswith("WRONG") and Path(what).name in line for line in capsys.readouterr().out.splitlines())


def test_lineage_knows_the_mix_in_of_the_run_that_this_one_goes_on_from(bench, tmp_path):
    """Until its first checkpoint a run's newest one is the other run's, and so are the demonstrations that it names."""
    few = tmp_path / "few.jsonl"
    few.write_text('{"input": "a", "output": " b"}\n' * 4)
    mixed = ("training.num_sft_examples=2", "loop.save_interval=1")
    iterate(*bench.begin("mixed", "training.sft_mix=toy:demonstrations", "loop.max_steps=1", *mixed))
    more = ("resume.from=mixed", "loop.max_steps=2", *mixed)
    config, other_mix = bench.begin("other-mix", f"training.sft_mix={few}", *more)
    _, no_mix = bench.begin("no-mix", *more)
    for run in (other_mix, no_mix):
        assert all(right for right, _ in check(run)), list(check(run))
    iterate(config, other_mix)
    assert all(right for right, _ in check(other_mix)), list(check(other_mix))
    for run in (other_mix, no_mix):  # the one its own, the other as it was taken over
        path = run.prompts / "mix_in.jsonl"
        path.write_text(path.read_text() + " ")
        assert [what for right, what in check(run) if not right] == ["prompts/mix_in.jsonl"]


@pytest.mark.parametrize("what", ["metrics", "config", "forged checkpoint"])
def test_lineage_finds_what_was_forged(undisturbed, capsys, what):
    """Changes that leave every file well-formed, and a checkpoint's own sums in order."""
    copy = copy_up_to(undisturbed, f"forged-{what.replace(' ', '-')}", 6)
    if what == "metrics":
        records = [{**r, "reward_mean": 9.0} if r["kind"] == "step" else r for r in copy.read_metrics()]
        copy.metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
        found = "metrics.jsonl"
    elif what == "config":
        copy.config.write_text(copy.config.read_text().replace("top_per_prompt", "random_per_prompt"))
        found = "config.json"
    else:
        folder = checkpoint_folder(copy.checkpoints, 2)
        text = json.dumps({**read_manifest(folder), "created": "never"}, indent=2)
        (folder / "manifest.json").write_text(text)
        (folder / "DONE").write_text(hashlib.sha256(text.encode()).hexdigest())
        found = "step-000002"
    assert main([str(copy.path), "--verify"]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert len(wrong) == 1 and found in wrong[0]


def test_workers_listen_on_loopback_alone(bench):
    config, run = bench.begin("listening", "resources.cpu_workers=2", "loop.save_interval=6")
    seen = []

    def look():
        wait_for(lambda: len(steps(run)) >= 1, what="RS step 1")
        pids = set(processes_naming(str(run.path)))
        seen.append((pids, [a for pid in pids for a in listening(pid)]))

    looking = threading.Thread(target=look)
    looking.start()
    iterate(config, run)
    looking.join()
    pids, addresses = seen[0]
    assert len(pids) >= 3  # the launcher and two ranks
    assert set(addresses) <= {"0100007F", "00000000000000000000000001000000"}, addresses


def listening(pid):
    """Local addresses, as /proc shows them, of the sockets on which a process listens."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(link))
        except OSError:  # closed meanwhile
            continue
    rows = [
        row.split() for kind in ("tcp", "tcp6") for row in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]
    ]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
