"""The disaggregated executor on runs under s3://: phases that share no folder. moto stands in for S3."""

import io
import json
import os
import shutil
import signal

import pyarrow.parquet as parquet
import pytest

from alignment.run_folder import RunFolder
from alignment.s3_objects import read_bytes
from alignment.workspace import find_run
from flow_runs import Place, wait_for
from interruptions import served_bench
from s3_flow_runs import Node
from s3_servers import new_bucket, use
from test_disaggregated import ONCE_EACH, ONE_STEP, shards_done


@pytest.mark.long
def test_a_step_that_was_cut_off_is_ended_by_a_node_that_has_nothing(moto_server, tmp_path, monkeypatch):
    """Its first node is lost in the update. The other samples nothing anew, and ends as a local run does."""
    use(moto_server, monkeypatch)
    node = Node(tmp_path / "node", new_bucket())
    node.path.mkdir()
    with served_bench(tmp_path / "local" / "runs") as bench:
        settings = {**ONE_STEP, "reward__url": bench.url}
        local = Place(tmp_path / "local").run("run", flow="rs_iteration_flow", **settings)
        started = node.start("run", **settings)
        wait_for(lambda: node.processes("alignment.update_worker"), 300, "the update")
        os.kill(started.pid, signal.SIGKILL)
        output, _ = started.communicate(timeout=120)
        assert shards_done(output) == ONCE_EACH
        wait_for(lambda: not node.processes(), 90, "the end of all processes")
        shutil.rmtree(node.path / "cache")  # the copies of runs and models
        resumed = node.resume(RS_CACHE=str(tmp_path / "another"))
    assert resumed.status == 0, resumed.output
    assert not shards_done(resumed.output) and not node.processes()
    run = find_run(node.root, "latest")
    for name in ("rollouts/step-000001.parquet", "metrics.jsonl", "report.json"):
        assert read_bytes(f"{run}/{name}"), name
    rows, own = (
        parquet.read_table(source).select(["prompt_id", "rollout_index", "response", "selected", "reason"]).to_pylist()
        for source in (
            io.BytesIO(read_bytes(f"{run}/rollouts/step-000001.parquet")[0]),
            RunFolder(local.folder).rollouts / "step-000001.parquet",
        )
    )
    assert rows == own
    records = [json.loads(line) for line in read_bytes(f"{run}/metrics.jsonl")[0].splitlines()]
    assert [(r["kind"], r["step"]) for r in records if r["kind"] in ("step", "validation")] == [
        ("validation", 0), ("step", 1), ("validation", 1)
    ]  # fmt: skip
    manifest = json.loads(read_bytes(f"{run}/checkpoints/step-000001/manifest.json")[0])
    assert manifest["weights_sha256"] == local.digest
