"""Targets of the fuzzing: weights, model folders, exports and the registry."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as save_tensors

from alignment.embedded import policy_folder, reward_model_folder
from fuzz_mutations import mutated_bytes, mutated_json
from fuzz_targets import Target, copy_once, said
from models.checkpoints import folder_digest, read_optimizer_state
from models.judge import HASH_SIZE, load_judge
from models.policy import load_policy
from models.registry import Entry, aliases, entries, fetch, find, names
from models.reward_export import find_version, read_version, weights_digest
from models.reward_model import load_reward_model
from models.tensor_shapes import tensor_shapes

SHA = "0" * 64


def model_targets(place: Path) -> list[Target]:
    """Weights, model folders, exports and the registry."""
    tensors = save_tensors({"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)})
    judge = save_tensors({name: np.zeros(2 * HASH_SIZE, np.float32) for name in ("scale", "weights")})
    card = {"name": "rm", "version": "1", "digest": SHA, "accuracy": 0.75, "recipe_digest": "r", "data": {"pairs": 3}}
    _write_export(place / "triton_repo" / "rm", card)
    weights = place / "triton_repo" / "rm" / "1" / "weights"
    entry = Entry("policy", 1, "policy", str(weights), folder_digest(weights), "2026-01-01", "run", {"step": 1})
    export = replace(entry, name="reward_model", kind="reward_model", uri=str(weights.parent))
    policy, reward = policy_folder("tiny", place / "cache"), reward_model_folder("tiny", place / "cache")

    def read_tensors(data: bytes, folder: Path) -> object:
        (folder / "optimizer").mkdir(exist_ok=True)
        (folder / "optimizer" / "rank-00000.safetensors").write_bytes(data)
        return read_optimizer_state(folder, 0)

    def read_shapes(data: bytes, folder: Path) -> object:
        (folder / "model.safetensors").write_bytes(data)
        return tensor_shapes(folder)

    def read_judge(data: bytes, folder: Path) -> object:
        (folder / "judge.json").write_text(json.dumps({"format": 1, "hash_size": HASH_SIZE}))
        (folder / "judge.safetensors").write_bytes(data)
        return load_judge(folder).score(["a"])

    def read_card(data: bytes, folder: Path) -> object:
        repository = copy_once(place / "triton_repo", folder / "triton_repo")
        (repository / "rm" / "1" / "card.json").write_bytes(data)
        return read_version(repository, "rm", "1"), find_version(repository, "rm", "r")

    def read_entry(data: bytes, folder: Path) -> object:
        name = "reward_model" if b"reward_model" in data else "policy"
        path = folder / "registry" / name / "1.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        (folder / "registry" / name / "aliases").mkdir(exist_ok=True)
        (folder / "registry" / name / "aliases" / "promoted").write_bytes(b"1" if len(data) % 5 else data[-9000:])
        shutil.rmtree(folder / "fetched", ignore_errors=True)
        root = str(folder)
        return (
            said(lambda: [names(root), entries(root, name)]),
            aliases(root, name),
            find(root, name),
            fetch(root, name, folder / "fetched"),
        )

    return [
        Target("optimizer state", 1500, lambda rng: mutated_bytes(rng, [tensors]), read_tensors),
        Target("tensor shapes", 1500, lambda rng: mutated_bytes(rng, [tensors]), read_shapes),
        Target("judge", 200, lambda rng: mutated_head(rng, judge), read_judge),
        Target("card", 1000, lambda rng: mutated_json(rng, [card]), read_card),
        Target("registry", 1000, lambda rng: mutated_json(rng, [asdict(entry), asdict(export)]), read_entry),
        _folder_target("policy folder", 500, policy, lambda folder: load_policy(folder, prompt_format="chat")),
        _folder_target("reward folder", 500, reward, lambda folder: load_reward_model(str(folder))),
    ]


def mutated_head(rng: random.Random, data: bytes) -> bytes:
    """Damage in the first bytes of a file that is large, or behind them."""
    if rng.random() < 0.7:
        return mutated_bytes(rng, [data[:300]]) + data[300:]
    return data[:400] + bytes([rng.randrange(256)]) * 8 + data[408:]


def _write_export(folder: Path, card: dict[str, Any]) -> None:
    (folder / "1" / "weights").mkdir(parents=True)
    (folder / "config.pbtxt").write_text('name: "rm"')
    (folder / "1" / "weights" / "model.safetensors").write_bytes(save_tensors({"a": np.ones(2, np.float32)}))
    card["digest"] = weights_digest(folder / "1")
    (folder / "1" / "card.json").write_text(json.dumps(card))


def _folder_target(name: str, inputs: int, source: Path | str, load: Callable[[Path], object]) -> Target:
    """A model folder in which one file is damaged; which one is the input's first byte."""
    files = sorted(path for path in Path(source).iterdir() if path.is_file() and path.name != ".lock")

    def make(rng: random.Random) -> bytes:
        index = rng.randrange(len(files))
        data = files[index].read_bytes()
        is_json = files[index].suffix == ".json"
        changed = mutated_json(rng, [json.loads(data)]) if is_json and rng.random() < 0.8 else mutated_head(rng, data)
        return bytes([index]) + changed

    def read(data: bytes, folder: Path) -> object:
        copied = copy_once(Path(source), folder / "model")
        damaged = copied / files[data[0]].name
        damaged.write_bytes(data[1:])
        try:
            return load(copied)
        finally:
            shutil.copyfile(files[data[0]], damaged)

    return Target(name, inputs, make, read)
