"""Whole runs of the smoke preset: real Metaflow, real workers, real DeepSpeed, a real Triton server."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

import older_rs_flow
from alignment.launch import run_workers
from alignment.rollout_table import COLUMNS
from alignment.tracked_metrics import is_known
from flow_runs import ROOT, Place, processes_naming, wait_for
from models.checkpoints import verify
from test_tracking import read_runs, told

# Steps of about a second, so that a kill finds one under way; RS step 5 is in the second iteration.
SETTINGS = {
    "rollouts__num_rollout_samples": 16,
    "rollouts__max_new_tokens": 48,
    "training__global_batch_size": 16,
    "loop__max_steps": 6,
    "loop__steps_per_iteration": 3,
    "loop__val_check_interval": 3,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("flow"))


@pytest.fixture(scope="module")
def undisturbed(place):
    """A run of two iterations that nothing disturbs, W&B offline."""
    return place.run("run", wandb__mode="offline", **SETTINGS)


def test_the_run_leaves_the_files_it_promises(undisturbed):
    folder = undisturbed.folder
    for name in ("report.json", "report.html", "config.json", "metrics.jsonl"):
        assert (folder / name).stat().st_size > 0
    files = sorted(p.name for p in (folder / "rollouts").iterdir())
    assert files == [f"step-{step:06d}.parquet" for step in range(1, 7)]
    table = parquet.read_table(folder / "rollouts" / "step-000004.parquet")
    assert table.column_names == list(COLUMNS)
    assert table.num_rows == 16 * 4
    assert sum(table["selected"].to_pylist()) == 16
    assert (folder.parent / "latest").resolve() == folder
    assert not (folder.parent / "progress" / f"{folder.name}.prom").exists()  # there is nothing left to watch
    assert undisturbed.output.count("Task is starting") == 6  # start, reward_model, iterate twice, evaluate, end
    assert f"{folder.name}/report.html" in undisturbed.output


def test_the_report_holds_every_promised_key(undisturbed):
    report = undisturbed.report
    assert {"run_id", "steps", "validation", "evaluation", "reward_model", "judge", "seconds", "checkpoint"} <= set(
        report
    )
    assert [s["step"] for s in report["steps"]] == [1, 2, 3, 4, 5, 6]
    assert [v["step"] for v in report["validation"]] == [0, 3, 6]
    step = set(report["steps"][0])
    assert {"reward_mean", "selected_reward_mean", "response_length_mean", "truncated_fraction", "loss"} <= step
    assert {"grad_norm", "lr", "seconds"} <= step
    evaluation = report["evaluation"]
    assert evaluation["prompts"] == 16
    assert {"kl_to_base", "kl_to_base_ci95", "distinct_2", "judge_mean"} <= set(evaluation["aligned"])
    assert evaluation["aligned"]["kl_to_base"] > 0
    assert {"n", "win_rate", "judge_win_rate", "kl_bound"} == set(evaluation["best_of_n"])
    assert report["run_id"] == undisturbed.folder.name
    assert [link["step"] for link in report["lineage"]["chain"]][-1] <= report["checkpoint"]["step"]
    assert report["lineage"]["chain"][0]["weights_sha256"] == report["checkpoint"]["sha256"]
    assert list(evaluation["best_of_n_curve"]) == [str(k + 1) for k in range(evaluation["best_of_n"]["n"])]


def test_each_iteration_has_a_live_card_and_the_end_has_the_report(place, undisturbed):
    """As the client finds them; the first iteration's card was last written as that iteration ended."""
    script = (
        "import json; from metaflow import Flow, namespace; from metaflow.cards import get_cards; namespace(None); "
        "r = Flow('RSFlow').latest_run; tasks = sorted(r['iterate'], key=lambda t: t.data.iteration); "
        "print(json.dumps([[(c.id, c.get()) for c in get_cards(t)] for t in (*tasks, r['end'].task)]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=place.path, env=place.environment(),
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    ((first,), (second,), (end,)) = json.loads(out)
    assert first[0] == second[0] == "progress" and end[0] == "report"
    assert "RS step 3 of 6 is done" in first[1] and "RS step 6 of 6 is done" in second[1]
    assert "Samples of RS step 6" in second[1] and len(second[1]) < 200_000
    assert end[1] == (undisturbed.folder / "report.html").read_text()
    assert "card is no longer written" not in undisturbed.output


def test_selected_rollouts_are_the_best_of_their_prompt(undisturbed):
    rows = parquet.read_table(undisturbed.folder / "rollouts" / "step-000001.parquet").to_pylist()
    for prompt_id in {row["prompt_id"] for row in rows}:
        group = [row for row in rows if row["prompt_id"] == prompt_id]
        chosen = [row for row in group if row["selected"]]
        assert len(chosen) == 1
        assert round(chosen[0]["reward"], 4) == max(round(row["reward"], 4) for row in group)
    assert all(row["reason"] for row in rows)


def test_the_checkpoint_is_whole_and_transformers_loads_it(undisturbed):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = undisturbed.report["checkpoint"]
    assert verify(Path(checkpoint["uri"])).sha256 == checkpoint["sha256"]
    assert AutoModelForCausalLM.from_pretrained(checkpoint["uri"]).config.vocab_size > 0
    assert AutoTokenizer.from_pretrained(checkpoint["uri"]).eos_token


def test_metaflow_artifacts_lead_to_everything(place, undisturbed):
    script = (
        "from metaflow import Flow, namespace; namespace(None); r = Flow('RSFlow').latest_run; "
        "print([t.data.iteration for t in sorted(r['iterate'], key=lambda t: t.data.iteration)], "
        "r.data.checkpoint['uri'], r.data.reward_model_ref['version'], r.successful, sorted(r.user_tags))"
    )
    out = subprocess.run(  # no alignment on the path: artifacts are plain values
        [sys.executable, "-c", script], cwd=place.path, env=place.environment(),
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert out.split()[:2] == ["[1,", "2]"]
    outcome = {1: "improved", 0: "unclear", -1: "worse"}
    low, high = undisturbed.report["evaluation"]["win_rate_ci95"]
    tags = [f"outcome:{outcome[(low > 0.5) - (high < 0.5)]}", "reward_model:reward_model/1"]
    assert out.strip().endswith(f"1 True {tags}")


def test_the_reward_model_flow_finds_what_the_same_recipe_made(place, undisturbed):
    done = place.run("run", flow="reward_model_flow", **SETTINGS)
    assert done.status == 0, done.output
    assert "version 1 of reward_model was made by this recipe" in done.output
    assert "On toy:held_out_pairs the preferred answer gets the higher reward in 100.0% of 64 pairs" in done.output
    folder = place.root / "triton_repo" / "reward_model" / "1"
    card = json.loads((folder / "card.json").read_text())
    assert card["run_id"] == undisturbed.folder.name
    assert "reward_model" in (folder / "report.html").read_text()


def test_evaluating_the_run_again_finds_the_same(place, undisturbed):
    done = place.run("run", flow="evaluate_flow", evaluation__model=undisturbed.folder.name, **SETTINGS)
    assert done.status == 0, done.output
    assert "version 1 of reward_model was made by this recipe" in done.output
    assert "[##########] measuring KL 16/16" in done.output
    folder = (place.root / "evaluations" / "latest").resolve()
    assert f"evaluations/{folder.name}/report.html" in done.output and (folder / "report.html").stat().st_size > 0
    report, before = json.loads((folder / "report.json").read_text()), undisturbed.report
    rows, rows_before = (json.loads((f / "evaluation.json").read_text()) for f in (folder, undisturbed.folder))
    assert rows == [
        # A server that batches dynamically may differ in the last bits.
        row | {key: pytest.approx(row[key], abs=1e-5) for key in ("base_reward", "aligned_reward")}
        for row in rows_before
    ]
    assert set(report["evaluation"]) == set(before["evaluation"])
    assert report["evaluation"]["win_rate"] == before["evaluation"]["win_rate"]
    assert report["checkpoint"] == before["checkpoint"] and report["base"] == before["base"]
    assert (place.root / "latest").resolve() == undisturbed.folder  # an evaluation is no run to go on from


def test_one_wandb_run_over_all_processes(undisturbed):
    ids = {p.name.rsplit("-", 1)[1] for p in (undisturbed.folder / "wandb").glob("offline-run-*")}
    assert ids == {undisturbed.folder.name}
    rows = told(undisturbed.folder)
    assert [step for kind, step in rows if kind == "step"] == [s["step"] for s in undisturbed.report["steps"]]
    assert [step for kind, step in rows if kind == "validation"] == [
        v["step"] for v in undisturbed.report["validation"]
    ]
    histories = [row for found in read_runs(undisturbed.folder) for row in found["history"]]
    names = {name for row in histories for name in row}
    assert {name for name in names if not is_known(name) and not is_known(name.rpartition("/")[0])} == set()
    assert "train_rollouts/samples/path" in names and "train_rollouts/rewards/values" in names


def test_its_models_stand_in_wandb_by_reference(undisturbed):
    artifacts = [one for found in read_runs(undisturbed.folder) for one in found["artifacts"]]
    reward = [one for one in artifacts if one.type == "reward_model"]
    assert [(one.use_after_commit, set(one.aliases)) for one in reward] == [(True, {"version-1", "latest"})]
    assert reward[0].manifest.contents[0].digest == undisturbed.report["reward_model"]["digest"]
    best = undisturbed.report["checkpoint"]
    policy = [one for one in artifacts if one.type == "model" and "best" in one.aliases]
    assert [f"step-{best['step']:06d}" in one.aliases for one in policy] == [True]
    weights = next(entry for entry in policy[0].manifest.contents if entry.path == "model.safetensors")
    assert weights.ref == f"{Path(best['uri']).resolve().as_uri()}/model.safetensors"
    assert weights.digest == hashlib.sha256(Path(best["uri"], "model.safetensors").read_bytes()).hexdigest()
    assert not weights.local_path


def test_one_iteration_and_another_judge_give_the_same_weights(place, undisturbed):
    """Moments and randomness survive from one iteration to the next, and the judge never selects."""
    settings = {**SETTINGS, "loop__steps_per_iteration": 6, "judge__num_train_pairs": 32}
    other = place.run("run", **settings)
    assert other.output.count("/iterate/") < undisturbed.output.count("/iterate/")
    assert other.digest == undisturbed.digest
    assert [v["judge_mean"] for v in other.report["validation"]] != [
        v["judge_mean"] for v in undisturbed.report["validation"]
    ]


@pytest.mark.parametrize(
    "victim",
    ["terminal", pytest.param("metaflow", marks=pytest.mark.slow), pytest.param("worker", marks=pytest.mark.slow)],
)
def test_killed_and_resumed_equals_undisturbed(place, undisturbed, victim):
    """The run in a terminal was begun by a version whose config lacked some sections."""
    before = place.latest()
    command = place.command("rs_flow", "run", **SETTINGS)
    if victim == "terminal":
        command[1] = older_rs_flow.__file__
    started = place.begin(command)
    folder = wait_for(lambda: place.latest() if place.latest() != before else None, what="the run's folder")
    wait_for((folder / "checkpoints" / "step-000004" / "DONE").exists, what="checkpoint 4")
    assert (
        f'rs_run_total_steps{{run="{folder.name}"}} 6'
        in (folder.parent / "progress" / f"{folder.name}.prom").read_text()
    )
    if victim == "metaflow":
        started.kill()
    elif victim == "terminal":  # Ctrl-C reaches Metaflow and its task
        os.killpg(started.pid, signal.SIGINT)
    else:
        for pid in processes_naming(f"--folder {folder}"):
            os.kill(pid, signal.SIGKILL)
    output, _ = started.communicate(timeout=120)
    assert started.returncode != 0, output
    assert not (folder / "report.json").exists()
    # Nothing outlives its owner: neither workers nor the reward server.
    wait_for(lambda: not processes_naming(str(folder)), 60, "the end of all processes of the run")
    if victim == "terminal":
        older_rs_flow.make_older(folder / "config.json")
    resumed = place.resume()
    assert resumed.folder == folder  # the resume appends to the first run's folder
    assert "continuing after RS step" in resumed.output
    assert resumed.digest == undisturbed.digest
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [0, 3, 6]
    first, second = ([r["prompt_ids"] for r in _steps(f)] for f in (folder, undisturbed.folder))
    assert first == second


@pytest.mark.slow
def test_a_new_run_goes_on_from_the_latest(place, undisturbed):
    latest = place.latest()  # of this place's complete runs, whichever test came last
    steps = json.loads((latest / "report.json").read_text())["steps"]
    more = place.run("run", resume__from="latest", **{**SETTINGS, "loop__max_steps": 7})
    assert more.folder != latest
    assert "continuing after RS step 6" in more.output
    assert [s["step"] for s in more.report["steps"]] == list(range(1, 8))
    assert more.report["steps"][:6] == steps[:6]
    paid = sum(s["seconds"]["rollouts"] for s in more.report["steps"][6:])
    assert more.report["seconds"]["rollouts"] == pytest.approx(paid)  # the other run paid for the rest
    assert json.loads((more.folder / "config.json").read_text())["resume"]["from"] == str(latest)


def test_two_workers_take_the_same_decisions(place, undisturbed):
    two = place.run("run", resources__cpu_workers=2, training__zero_stage=2, **{**SETTINGS, "loop__max_steps": 3})
    ours, theirs = (
        parquet.read_table(f.folder / "rollouts" / "step-000001.parquet")
        .select(["prompt_id", "response", "selected"])
        .to_pylist()
        for f in (two, undisturbed)
    )
    assert ours == theirs
    losses = [[s["loss"] for s in _steps(f.folder)][:3] for f in (two, undisturbed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.slow
def test_the_phases_as_metaflow_steps_do_the_same_rs_step(place, undisturbed):
    """RSIterationFlow on a fresh run, then on the run that it began: the boundaries between the stages hold."""
    settings = {key: value for key, value in SETTINGS.items() if not key.startswith("loop__")}
    settings["phases__shards"] = 3
    first = place.run("run", flow="rs_iteration_flow", **settings)
    folder = first.folder
    rows, expected = (
        parquet.read_table(f / "rollouts" / "step-000001.parquet")
        .select(["prompt_id", "rollout_index", "response", "selected"])
        .to_pylist()
        for f in (folder, undisturbed.folder)
    )
    assert rows == expected
    assert _steps(folder)[0]["loss"] == pytest.approx(_steps(undisturbed.folder)[0]["loss"], abs=1e-5)
    # A retried update finds its checkpoint and trains nothing twice.
    before, records = verify(folder / "checkpoints" / "step-000001").sha256, _steps(folder)
    replay = ["--folder", str(folder), "--step", "1", "--scored", str(folder / "no" / "file")]
    run_workers("alignment.update_worker", replay, num_workers=1, on_event=lambda _: None, check=lambda: None)
    assert verify(folder / "checkpoints" / "step-000001").sha256 == before and _steps(folder) == records
    other = place.run("run", "--run_path", str(folder), flow="rs_iteration_flow", **settings, training__lr=0.5)
    assert other.status != 0 and "begun with another config" in other.output

    second = place.run("run", "--run_path", str(folder), flow="rs_iteration_flow", **settings)
    assert second.status == 0, second.output
    assert [s["step"] for s in _steps(folder)] == [1, 2]
    assert verify(folder / "checkpoints" / "step-000002").step == 2


def _steps(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sorted((r for r in records if r["kind"] == "step"), key=lambda r: r["step"])


def test_show_is_a_table_of_contents_and_loads_no_torch(place):
    done = place.execute([sys.executable, "-X", "importtime", str(ROOT / "flows" / "rs_flow.py"), "show"])
    for name in ("start", "reward_model", "iterate", "evaluate", "end"):
        assert f"Step {name}" in done.output
    imported = {line.rpartition("|")[2].strip() for line in done.output.splitlines() if line.startswith("import time:")}
    assert "metaflow" in imported
    assert not imported & {"torch", "transformers", "deepspeed"}
