"""Targets of the fuzzing: what a run leaves, and the lineage over it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import save as save_tensors

from alignment import lineage
from alignment.config import load_config
from alignment.preparation import load_prompts
from alignment.run_folder import RunFolder
from alignment.scorers_file import checked_scorers
from alignment.sft_data import _write_examples, read_examples
from alignment.types import Decision, JudgeRef, RewardModelRef, ScoredRollout, TokenSequence
from fuzz_mutations import mutated_bytes, mutated_json, mutated_lines
from fuzz_targets import MESSAGES, SMOKE, Target, copy_once, said
from models.checkpoints import seal, staging_folder, verify

SHA = "0" * 64


def rollout(index: int) -> ScoredRollout:
    return ScoredRollout(
        prompt_id="p:1",
        rollout_index=index,
        response=f"r{index}",
        finish_reason="stop",
        prompt="p",
        reward=0.5 * index,
        response_ids=(1, 2),
        log_probs=(-1.0, -2.0),
        reward_model="reward_model",
        reward_model_version="1",
    )


def run_targets(place: Path) -> list[Target]:
    """What a run leaves: rollouts, examples, metrics, prompts, references, manifests, and the lineage over them."""
    run = whole_run(place / "run")
    rollouts, manifest = (
        run.rollouts_file(1).read_bytes(),
        json.loads((run.checkpoints / "step-000001/manifest.json").read_text()),
    )
    _write_examples(place / "examples" / "train-000.parquet", [("a:1", TokenSequence((1, 2, 3), (False, True, True)))])
    examples = (place / "examples" / "train-000.parquet").read_bytes()
    config, scorers = load_config(SMOKE), json.loads(run.scorers.read_text())
    metrics = [{"kind": "step", "step": 1, "loss": 0.5}, {"kind": "validation", "step": 1, "reward_mean": 0.1}]
    stored = [{"id": "p:1", "messages": [MESSAGES[0]], "reference": "b"}, {"id": "p:2", "messages": MESSAGES}]

    def placed(name: str, read: Callable[[RunFolder], object]) -> Callable[[bytes, Path], object]:
        def from_file(data: bytes, folder: Path) -> object:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
            return read(RunFolder(folder))

        return from_file

    def read_metrics(run: RunFolder) -> object:
        before = run.metrics.read_bytes()
        run.append_metrics({"kind": "step", "step": 9})
        run.metrics.write_bytes(before)
        run.validations()
        return run.truncate_metrics(1)

    def read_manifest(data: bytes, folder: Path) -> object:
        copied = copy_once(run.checkpoints / "step-000001", folder / "step-000001")
        (copied / "manifest.json").write_bytes(data)
        (copied / "DONE").write_text(hashlib.sha256(data).hexdigest())
        return verify(copied)

    def read_lineage(data: bytes, folder: Path) -> object:
        copied = copy_once(run.path, folder / "run")
        checkpoint = copied / "checkpoints" / "step-000001"
        (checkpoint / "manifest.json").write_bytes(data)
        (checkpoint / "DONE").write_text(hashlib.sha256(data).hexdigest())
        return said(
            lambda: [lineage.main([str(copied), *more]) for more in ([], ["--verify"], ["--diff", str(copied)])]
        )

    def read_rollouts(data: bytes, folder: Path) -> object:
        copied = RunFolder(copy_once(run.path, folder / "run"))
        copied.rollouts_file(1).write_bytes(data)
        return said(lambda: [lineage.main([str(copied.path), "--step", "1"]), copied.read_rollouts(1)])

    return [
        Target("rollouts", 2000, lambda rng: mutated_bytes(rng, [rollouts]), read_rollouts),
        Target(
            "examples", 300, lambda rng: mutated_bytes(rng, [examples]),
            placed("examples/train-000.parquet", lambda folder: list(read_examples(config, folder.path).train[0])),
        ),
        Target("metrics", 600, lambda rng: mutated_lines(rng, metrics), placed("metrics.jsonl", read_metrics)),
        Target(
            "stored prompts", 300, lambda rng: mutated_lines(rng, stored),
            placed("prompts/train.jsonl", lambda folder: load_prompts(folder.path, "train")),
        ),
        Target("scorers", 1000, lambda rng: mutated_json(rng, [scorers]), placed("scorers.json", checked_scorers)),
        Target("manifest", 2000, lambda rng: mutated_json(rng, [manifest]), read_manifest),
        Target("lineage", 1000, lambda rng: mutated_json(rng, [manifest]), read_lineage),
    ]  # fmt: skip


def whole_run(path: Path) -> RunFolder:
    """A run's folder of one RS step, put together by hand, whose files go together."""
    run = RunFolder(path)
    for folder in (run.checkpoints, run.prompts, run.rollouts, run.lineage, path / "judge"):
        folder.mkdir(parents=True)
    values = load_config(SMOKE).model_dump(mode="json")
    run.config.write_text(json.dumps(values))
    run.metrics.write_text("")
    (run.prompts / "train.jsonl").write_text("")
    reward = RewardModelRef("reward_model", "1", SHA, str(path / "triton_repo"), 0.75)
    run.scorers.write_text(
        json.dumps({"reward_model": asdict(reward), "judge": asdict(JudgeRef("judge", "judge", 0.7))})
    )
    scored = [rollout(index) for index in range(4)]
    run.write_rollouts(1, scored, [Decision("p:1", r.rollout_index, r.rollout_index == 3, "best") for r in scored])
    staging = staging_folder(run.checkpoints, 1)
    (staging / "optimizer").mkdir(parents=True)
    tensors = save_tensors({"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)})
    (staging / "model.safetensors").write_bytes(tensors)
    (staging / "optimizer" / "rank-00000.safetensors").write_bytes(tensors)
    details = {
        "ranks": 1,
        "zero_stage": 0,
        "run_id": path.name,
        "created": "2026-01-01",
        "parent": {"model": "tiny", "weights_sha256": SHA},
        "reward_model": {"name": "reward_model"},
        "judge": {"name": "judge", "files": {}},
        "selection": {"strategy": "top_per_prompt"},
        "position": {"seed": 0, "rs_steps": 1, "prompts_read": 4, "epoch": 0},
        "data": {"train.jsonl": SHA},
        "rollouts": {"step-000001.parquet": SHA},
        "metrics_sha256": SHA,
        "code": {"sha256": SHA, "commit": None, "dirty": None},
        "packages": {"torch": "2"},
    }
    seal(run.checkpoints, 1, config=values, details=details)
    shutil.copyfile(run.checkpoints / "step-000001" / "manifest.json", run.lineage / "step-000001.json")
    return run
