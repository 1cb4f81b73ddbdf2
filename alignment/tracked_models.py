"""The models of a run as artifacts by reference: the reward models that it used, and the checkpoints that it made.

Nothing is uploaded, and nothing is read but manifests. A file's digest is the sha256 that its checkpoint's manifest
has: W&B's own, an MD5, would read gigabytes once more. So there is a new version just where the content is new. A
reward model is its version's card.json, under the digest of its weights. W&B's `download` compares MD5 and does not
fetch any of them: `evaluation.model` takes the URI.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.run_folder import RunFolder
from alignment.tracked_items import StoredFile, StoredModel

DETAILS = ("run_id", "created", "step", "weights_sha256", "parent", "reward_model", "judge", "selection", "position")
"""Of a checkpoint's manifest, what an artifact's metadata hold."""


def reward_models(run: RunFolder) -> list[StoredModel]:
    """The reward models of scorers.json whose digest is known, which an external server's is not."""
    if not run.scorers.is_file():
        return []
    found = json.loads(run.scorers.read_text())
    refs = [found["reward_model"], *found.get("members", ()), *found.get("shadows", ())]
    return [_reward_model(ref) for ref in refs if ref["digest"]]


def _reward_model(ref: Mapping[str, Any]) -> StoredModel:
    version = f"{ref['repository']}/{ref['name']}/{ref['version']}"
    return StoredModel(
        name=f"reward-model-{ref['name']}",
        kind="reward_model",
        files={"card.json": StoredFile(_uri(f"{version}/card.json"), ref["digest"], None)},
        details={**ref, "uri": version},
        aliases=(f"version-{ref['version']}",),
        is_input=True,
    )


def checkpoints(run: RunFolder, names: Mapping[int, tuple[str, ...]]) -> list[StoredModel]:
    """The run's finished checkpoints, oldest first; `names` are further aliases of those of some RS steps."""
    from models.checkpoints import finished, read_manifest

    rewards = run.validations()
    return [
        _checkpoint(run, folder, manifest, names.get(manifest["step"], ()), rewards.get(manifest["step"]))
        for folder in finished(run.checkpoints)
        for manifest in (read_manifest(folder),)
    ]


def _checkpoint(
    run: RunFolder, folder: Path, manifest: Mapping[str, Any], names: tuple[str, ...], reward: float | None
) -> StoredModel:
    uri = run.uri_of(folder)
    return StoredModel(
        name=f"policy-{run.path.name}",
        kind="model",
        files={
            name: StoredFile(_uri(f"{uri}/{name}"), entry["sha256"], entry["bytes"])
            for name, entry in manifest["files"].items()
        },
        details={
            "uri": uri,
            **{key: manifest[key] for key in DETAILS if key in manifest},
            "validation_reward": reward,
        },
        aliases=(folder.name, *names),
    )


def _uri(place: str) -> str:
    return place if "://" in place else Path(place).resolve().as_uri()
