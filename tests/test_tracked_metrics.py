"""What is drawn of a run: numbers by their names, histograms and tables of bounded size, models by reference."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from alignment import tracked_samples
from alignment.run_folder import RunFolder
from alignment.tracked_metrics import HISTOGRAMS, METRICS, SAMPLES, is_known, points
from alignment.tracked_models import checkpoints, reward_models
from alignment.tracked_samples import samples_table, step_histograms
from alignment.types import Decision, ScoredRollout
from models.checkpoints import seal, staging_folder

ROOT = Path(__file__).resolve().parent.parent


def test_the_docs_have_each_metric_with_its_meaning() -> None:
    text = (ROOT / "docs" / "dashboards.md").read_text()
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", text, re.MULTILINE))
    expected = {metric.name: metric.meaning for metric in METRICS} | HISTOGRAMS
    assert {name: meaning for name, meaning in rows.items() if "/" in name and name != SAMPLES} == expected


def test_several_of_a_kind_are_drawn_by_their_names() -> None:
    record: dict[str, Any] = {"kind": "step", "reward_mean": 1.0, "selected_reward_mean": None, "loss": math.nan}
    record |= {"seconds": {"rollouts": 1.0, "update": 0.0}, "gpu_memory_bytes": 3_000_000_000, "response_tokens": 5}
    record |= {"best_of_n": [float(n) for n in range(1, 11)], "shadow_means": {"strict/2": 0.5}}
    assert points(record) == {
        "train_rollouts/global_rewards": 1.0,
        **{f"train_rollouts/best_of_n/{n}": float(n) for n in (1, 2, 4, 8, 10)},
        "train_rollouts/shadow_means/strict/2": 0.5,
        "train_optim/response_tokens": 5.0,
        "train_optim/gpu_memory_gb": 3.0,
        "timers/rollout_time": 1.0,
        "timers/train_time": 0.0,
    }
    assert all(is_known(name) for name in points(record))
    assert not is_known("train_rollouts/reward_mean")
    one = points({**record, "best_of_n": [1.0], "selected_reward_mean": 1.5})
    assert (one["train_rollouts/best_of_n/1"], one["train_rollouts/selection_lift"]) == (1.0, 0.5)


def test_each_number_of_a_step_stands_in_the_table() -> None:
    """Those of the record that are left out are not for drawing."""
    from alignment.records import step_record
    from alignment.types import StepUpdate

    class Judge:
        """A judge by hand."""

        def score(self, texts: list[str]) -> list[float]:
            return [0.0 for _ in texts]

    scored = rollouts(1, 1)
    update = StepUpdate(optimizer_steps=1, response_tokens=4, loss=1.0, kl=None, grad_norm=1.0, lr=1.0)
    record = step_record(1, scored, decisions(scored), update, {"rollouts": 1.0}, judge=Judge(), scoring_server={})  # type: ignore[arg-type]
    drawn = {metric.path.partition(".")[0] for metric in METRICS if metric.record == "step"}
    assert set(record) - drawn == {"kind", "step", "num_selected_references", "gpu_memory_bytes", "prompt_ids"}


def rollouts(prompts: int, samples: int, response: str = "yes") -> list[ScoredRollout]:
    return [
        ScoredRollout(
            prompt_id=f"p{i}",
            rollout_index=k,
            response=response,
            response_ids=(1,) * (k + 1),
            finish_reason="stop",
            reward=float(k),
        )
        for i in range(prompts)
        for k in range(samples)
    ]


def decisions(scored: list[ScoredRollout]) -> list[Decision]:
    return [Decision(r.prompt_id, r.rollout_index, r.rollout_index == 1, f"rank {r.rollout_index}") for r in scored]


def stored(folder: Path, scored: list[ScoredRollout]) -> Path:
    return RunFolder(folder).write_rollouts(1, scored, decisions(scored))


def test_histograms_count_all_rewards_and_lengths(tmp_path: Path) -> None:
    found = step_histograms(stored(tmp_path, rollouts(2, 3)))
    assert set(found) == set(HISTOGRAMS)
    rewards = found["train_rollouts/rewards"]
    assert (sum(rewards.counts), rewards.edges[0], rewards.edges[-1], len(rewards.counts)) == (6, 0.0, 2.0, 32)
    assert (rewards.total, rewards.squares) == (6.0, 10.0)  # 2 · (0 + 1 + 2) and 2 · (0 + 1 + 4)
    assert found["train_rollouts/selected_rewards_histogram"].total == 2.0
    assert found["train_rollouts/response_lengths"].total == 12.0
    assert step_histograms(tmp_path / "none.parquet") == {}


def test_a_table_has_every_response_of_a_few_prompts_and_its_decision(tmp_path: Path) -> None:
    table = samples_table(stored(tmp_path, rollouts(5, 3, "x" * 3000)), 2)
    assert table is not None
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [(row["prompt_id"], row["rollout_index"]) for row in rows] == [
        (p, k) for p in ("p0", "p1") for k in range(3)
    ]
    assert [(row["reward"], row["selected"], row["reason"]) for row in rows[:2]] == [
        (0.0, False, "rank 0"), (1.0, True, "rank 1")
    ]  # fmt: skip
    assert {len(row["response"]) for row in rows} == {2001}
    assert samples_table(tmp_path / "rollouts" / "step-000001.parquet", 0) is None


@pytest.mark.parametrize(("prompts", "samples", "rows"), [(4, 2, 6), (4, 5, 5), (1, 9, 9)])
def test_a_table_is_bounded(
    prompts: int, samples: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracked_samples, "ROWS", 6)
    table = samples_table(stored(tmp_path, rollouts(prompts, samples)), 4)
    assert table is not None and len(table.rows) == rows  # all of one prompt, however many


def checkpoint(run: RunFolder, step: int) -> None:
    staging = staging_folder(run.checkpoints, step)
    staging.mkdir(parents=True)
    (staging / "model.safetensors").write_bytes(b"weights")
    details = {"ranks": 1, "zero_stage": 0, "run_id": "r", "parent": {"model": "base"}}
    seal(run.checkpoints, step, config={}, details=details)


def test_models_are_referred_to_with_the_digests_of_their_manifests(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run-7")
    run.checkpoints.mkdir(parents=True)
    checkpoint(run, 2)
    (policy,) = checkpoints(run, {2: ("best",)})
    manifest = json.loads((run.checkpoints / "step-000002" / "manifest.json").read_text())
    weights = policy.files["model.safetensors"]
    assert weights.uri == (run.checkpoints / "step-000002" / "model.safetensors").as_uri()
    assert weights.sha256 == manifest["files"]["model.safetensors"]["sha256"] and weights.bytes == 7
    assert (policy.name, policy.aliases, policy.details["parent"]) == (
        "policy-run-7", ("step-000002", "best"), {"model": "base"}
    )  # fmt: skip
    reward = {"name": "rm", "version": "3", "digest": "ab" * 32, "repository": "s3://bucket/repo", "accuracy": 0.8}
    run.scorers.write_text(json.dumps({"reward_model": reward, "judge": {}, "shadows": [{**reward, "digest": ""}]}))
    (used,) = reward_models(run)  # an external server's digest is not known
    assert used.files["card.json"].uri == "s3://bucket/repo/rm/3/card.json" and used.is_input
    assert used.aliases == ("version-3",)
