"""Whole flows whose runs, exports and registry live under s3://, with Metaflow's datastore there too.

moto stands in for S3; the slow tests are on Ceph, where it is installed.
"""

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator

import pytest

from alignment.s3_objects import list_objects, read_bytes
from alignment.scoring import RewardClient
from alignment.workspace import find_run
from flow_runs import ROOT, Finished, Place, processes_naming, wait_for
from models.checkpoints import verify
from s3_flow_runs import LONGER_STEPS, Node, names
from s3_servers import S3Server, new_bucket, use

SECRET = "planted-secret-7f3a9c"


@pytest.fixture(scope="module")
def node(moto_server, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use(S3Server(moto_server.url, "any", SECRET), patch)
        yield Node(tmp_path_factory.mktemp("node"), new_bucket())


@pytest.fixture(scope="module")
def aligned(node):
    """A run of the smoke preset, W&B offline; what it printed."""
    done = node.run("run", wandb__mode="offline")
    assert done.status == 0, done.output[-4000:]
    return done.output


@pytest.fixture(scope="module")
def run(node, aligned):
    return find_run(node.root, "latest")


@pytest.fixture
def elsewhere(node, tmp_path):
    """A node that has nothing yet."""
    return Node(tmp_path, node.bucket)


def test_a_run_leaves_in_s3_what_a_local_one_leaves_in_its_folder(node, aligned, run):
    files = names(run)
    alone = {"config.json", "metrics.jsonl", "scorers.json", "report.json", "report.html", "evaluation.json"}
    assert alone <= set(files)
    assert [f for f in files if f.startswith("rollouts/")] == [f"rollouts/step-{i:06d}.parquet" for i in range(1, 5)]
    assert {"checkpoints/step-000004/DONE", "lineage/step-000004.json", "prompts/train.jsonl"} <= set(files)
    assert any(name.startswith("wandb/offline-run-") for name in files)
    assert not [name for name in files if "/." in f"/{name}"]  # locks and what is being written stay
    assert f"{run}/report.html" in aligned


def test_what_passes_between_tasks_names_no_node(node, aligned, run):
    report, scorers = (json.loads(read_bytes(f"{run}/{name}")[0]) for name in ("report.json", "scorers.json"))
    assert report["checkpoint"]["uri"].startswith(f"{run}/checkpoints/step-")
    assert scorers["judge"]["uri"] == f"{run}/judge"
    assert scorers["reward_model"]["repository"] == f"{node.root}/triton_repo"
    assert "triton_repo/reward_model/1/card.json" in names(node.root)


def test_another_node_verifies_registers_and_fetches(elsewhere, run):
    checked = elsewhere.tool("alignment.lineage", run, "--verify")
    assert checked.status == 0 and "WRONG" not in checked.output, checked.output
    registry = ("models.registry", "--root", elsewhere.root)
    listed = elsewhere.tool(*registry, "list")
    assert "policy:1 @latest  policy, run " in listed.output and "reward_model:1 @latest" in listed.output
    assert elsewhere.tool(*registry, "promote", "policy:1").output == "policy@promoted is policy:1\n"
    shown = json.loads(elsewhere.tool(*registry, "show", "policy@promoted").output)
    assert shown["lineage"]["run"] == run and shown["uri"].startswith(f"{run}/checkpoints/")
    fetched = elsewhere.tool(*registry, "fetch", "policy@promoted", "--to", "policy")
    assert fetched.status == 0, fetched.output
    assert verify(elsewhere.path / "policy", name=shown["uri"].rpartition("/")[2]).sha256 == shown["sha256"]


@pytest.mark.long
def test_another_node_evaluates_what_is_promoted_against_the_base(elsewhere, run):
    assert elsewhere.tool("models.registry", "--root", elsewhere.root, "promote", "policy:1").status == 0
    done = elsewhere.run("run", flow="evaluate_flow", evaluation__model="registry:policy@promoted")
    assert done.status == 0, done.output[-4000:]
    evaluated = find_run(elsewhere.root, "evaluations/latest")
    report = json.loads(read_bytes(f"{evaluated}/report.json")[0])
    assert report["checkpoint"]["uri"].startswith(f"{run}/checkpoints/")
    assert find_run(elsewhere.root, "latest") == run  # still the newest run that trained


def test_triton_serves_a_repository_in_s3(elsewhere, aligned):
    assert_serves(elsewhere, f"{elsewhere.root}/triton_repo")


def test_triton_serves_a_reward_model_that_was_fetched(elsewhere, aligned):
    fetched = elsewhere.tool("models.registry", "--root", elsewhere.root, "fetch", "reward_model", "--to", "repository")
    assert fetched.status == 0 and "reward_model:1 is in repository" in fetched.output, fetched.output
    assert_serves(elsewhere, "repository")


def assert_serves(node: Node, repository: str) -> None:
    """`python -m infra.triton` serves version 1 of a repository, and scores."""
    server = subprocess.Popen(
        [sys.executable, "-m", "infra.triton", "--repository", repository],
        cwd=node.path, env=node.environment(PYTHONPATH=str(ROOT)), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        lines = [server.stdout.readline() for _ in range(2)]
        assert lines[0] == "serving reward_model (version 1); stop with Ctrl-C\n"
        with RewardClient(lines[1].split()[1]) as client:
            assert len(client.score([[{"role": "assistant", "content": "fine"}]])) == 1
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0


def test_a_policy_is_exported_to_a_repository_in_s3_twice(elsewhere, run):
    for version in ("1", "2"):
        repository = f"{elsewhere.bucket}/policies"
        done = elsewhere.tool("models.policy_export", run, "--repository", repository, "--name", "mine")
        assert done.status == 0 and f"as {repository}/mine/{version} " in done.output, done.output
        assert f"mine/{version}/card.json" in names(repository)


def test_following_takes_a_folder(elsewhere, aligned):
    done = elsewhere.tool("infra.triton", "--repository", f"{elsewhere.root}/triton_repo", "--follow")
    assert done.status == 2 and "--follow looks at a folder, and s3://" in done.output


def test_a_missing_bucket_is_told_before_anything_is_trained(elsewhere):
    done = elsewhere.run("run", run__root="s3://there-is-no-such/runs")
    assert done.status == 1 and "there is no such bucket" in done.output
    assert "Traceback" not in done.output and "reward_model" not in done.output.partition("StorageError")[0]


def test_no_key_is_in_anything_that_a_run_leaves(node, aligned, run):
    assert SECRET not in aligned
    stored = list_objects(node.bucket)
    assert len(stored) > 50
    for entry in stored:
        assert SECRET.encode() not in plain(read_bytes(entry.uri)[0]), entry.uri
    for path in node.path.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in plain(path.read_bytes()), path


def plain(data: bytes) -> bytes:
    """Metaflow's artifacts are gzipped."""
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return data


@pytest.mark.long
def test_a_node_that_is_lost_in_the_middle_costs_no_step_that_was_sent(ceph_server, tmp_path, monkeypatch):
    use(ceph_server, monkeypatch)
    node, local = Node(tmp_path / "node", new_bucket()), Place(tmp_path / "local")
    with running(local) as undisturbed, running(node) as started:
        run = wait_for(lambda: find_run(node.root, "latest"), 120, "the run")
        wait_for(lambda: read_bytes(f"{run}/checkpoints/step-000002/DONE"), 240, "RS step 2")
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        wait_for(lambda: not processes_naming(str(node.path)), 90, "the end of the workers")
        assert read_bytes(f"{run}/report.json") is None
        shutil.rmtree(node.path / "cache")  # another node would not have it
        resumed = node.resume()
        assert resumed.status == 0, resumed.output[-4000:]
        metrics = [json.loads(line) for line in read_bytes(f"{run}/metrics.jsonl")[0].splitlines()]
        assert [r["step"] for r in metrics if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
        assert "continuing after RS step" in resumed.output
        # The same decisions and weights as a local run that nothing disturbed.
        said, _ = undisturbed.communicate(timeout=240)
        manifest = json.loads(read_bytes(f"{run}/checkpoints/step-000006/manifest.json")[0])
        assert manifest["weights_sha256"] == Finished(undisturbed.returncode, said, local.latest()).digest


@contextlib.contextmanager
def running(place: Place) -> Iterator[subprocess.Popen[str]]:
    """A run in the background, with a folder of its own; it ends with the context."""
    place.path.mkdir()
    process = place.start("run", **LONGER_STEPS)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.long
def test_what_a_fine_tuning_left_in_s3_is_aligned(ceph_server, tmp_path, monkeypatch):
    use(ceph_server, monkeypatch)
    node = Node(tmp_path, new_bucket())
    tuned = node.run("run", flow="sft_flow")
    assert tuned.status == 0, tuned.output[-4000:]
    sft = find_run(node.root, "sft/latest")
    assert {"model/config.json", "report.json"} <= set(names(sft))
    aligned = node.run("run", policy__model=f"{sft}/model", loop__max_steps=2)
    assert aligned.status == 0, aligned.output[-4000:]
    manifest = json.loads(read_bytes(f"{find_run(node.root, 'latest')}/checkpoints/step-000002/manifest.json")[0])
    # Only the first checkpoint's parent is the base.
    assert manifest["parent"]["step"] == 1
    first = json.loads(read_bytes(f"{find_run(node.root, 'latest')}/lineage/step-000001.json")[0])
    assert first["parent"]["model"] == f"{sft}/model"


@pytest.mark.long
def test_a_reward_model_in_s3_is_found_again_by_its_recipe(ceph_server, tmp_path, monkeypatch):
    use(ceph_server, monkeypatch)
    node = Node(tmp_path, new_bucket())
    for said in ("reward model: exported version 1 to s3://", "was made by this recipe"):
        done = node.run("run", flow="reward_model_flow")
        assert done.status == 0 and said in done.output, done.output[-4000:]
    assert "reward_model/1/card.json" in names(f"{node.root}/triton_repo")


@pytest.mark.long
def test_a_new_run_goes_on_from_one_in_s3(elsewhere, run):
    more = elsewhere.run("run", resume__from=run, loop__max_steps=5)
    assert more.status == 0, more.output[-4000:]
    new = find_run(elsewhere.root, "latest")
    assert new != run and "continuing after RS step 4" in more.output
    assert {"checkpoints/step-000005/DONE", "rollouts/step-000001.parquet"} <= set(names(new))
