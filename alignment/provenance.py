"""Where a checkpoint comes from: parent, prompts, rollouts, reward model, code and packages, for its manifest.

`alignment.lineage` reads it back.
"""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from alignment.atomic_files import write_text
from alignment.config import Config
from alignment.launch import SOURCE_ROOT
from alignment.run_folder import RunFolder
from models.checkpoints import MOST_STEPS, finished, newest_checkpoint, read_manifest, sha256_file

PACKAGES = (
    *("torch", "transformers", "deepspeed", "peft", "safetensors", "tokenizers", "numpy", "pyarrow"),
    *("metaflow", "tritonclient", "nvidia-pytriton"),
)
SOURCES = ("alignment", "models", "infra", "triton_repo", "flows")


FileName = Annotated[str, Field(pattern=r"^[^/\x00-\x1f\x7f]+$", max_length=200)]
"""Of a file that lies in a folder itself. A folder, `..` say, is no file, so what it names is missing."""
Digests = dict[FileName, str]


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True)


class _Code(_Shape):
    sha256: str
    commit: str | None
    dirty: bool | None


class _Judge(_Shape):
    files: Digests


class _Selection(_Shape):
    strategy: str


class _Position(_Shape):
    seed: int
    prompts_read: int
    epoch: int


class _Parent(_Shape):
    model: str | None = None
    weights_sha256: str | None = None
    revision: str | None = None
    step: int | None = Field(None, ge=0, lt=MOST_STEPS)
    manifest_sha256: str | None = None


class _Reused(_Shape):
    run: str
    files: Digests


class ProvenanceShape(_Shape):
    """What `alignment.lineage` relies on in a manifest beside `models.checkpoints.ManifestShape`."""

    step: int = Field(ge=0, lt=MOST_STEPS)
    run_id: str
    weights_sha256: str
    created: str
    parent: _Parent
    reward_model: dict[str, Any]
    judge: _Judge
    selection: _Selection
    position: _Position
    data: Digests
    rollouts: Digests
    metrics_sha256: str
    code: _Code
    packages: dict[str, str]
    reused_rollouts: _Reused | None = None


def provenance(run: RunFolder, config: Config, step: int, base: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest of RS step `step` says of its origin; `base` describes the policy before the first step."""
    parent = _parent(run, base)
    steps = range(parent.get("step", 0) + 1, step + 1)
    samples = config.rollouts.num_rollout_samples
    num_prompts = _count_lines(run.prompts / "train.jsonl")
    return {
        "run_id": run.path.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parent": parent,
        "reward_model": _scorer(run, "reward_model"),
        **_ensemble(run),
        "judge": {**_scorer(run, "judge"), "files": judge_digests(run)},
        "selection": config.selection.model_dump(mode="json"),
        # All randomness is a function of these: there is no generator whose state could be saved.
        "position": {
            "seed": config.seed,
            "rs_steps": step,
            "prompts_read": step * samples,
            "epoch": step // (num_prompts // samples),
        },
        "data": {name: sha256_file(run.prompts / name) for name in sorted(p.name for p in run.prompts.glob("*.jsonl"))},
        "rollouts": _digests(run.rollouts_file(k) for k in steps),
        **_reused(run, config, steps),
        "metrics_sha256": metrics_digest(run, step),
        "code": code_version(),
        "packages": package_versions(),
    }


def keep_manifests(run: RunFolder) -> None:
    """Copy the manifests of finished checkpoints to `lineage/`, before any is pruned. Raises DiskError."""
    for folder in finished(run.checkpoints):
        kept = run.lineage / f"{folder.name}.json"
        if not kept.exists():  # a manifest never changes: a copy that differs is worth more than what it differs from
            write_text(kept, (folder / "manifest.json").read_text())


def forget_manifests(run: RunFolder, after_step: int) -> None:
    """Remove the manifests of steps that a run does again, since it goes on from the checkpoint of `after_step`."""
    for path in run.lineage.glob("step-*.json"):
        if path.name > f"step-{after_step:06d}.json":
            path.unlink()


def judge_digests(run: RunFolder) -> dict[str, str]:
    """sha256 of each file of the run's judge."""
    return {path.name: sha256_file(path) for path in sorted((run.path / "judge").glob("*"))}


def metrics_digest(run: RunFolder, step: int) -> str:
    """sha256 of what metrics.jsonl says of the steps up to `step` and of the validations before it."""
    last = {"step": step, "validation": step - 1}
    records = [r for r in run.read_metrics() if r.get("kind") in last and r["step"] <= last[r["kind"]]]
    plain = [{key: value for key, value in r.items() if key != "run_id"} for r in records]  # adopted ones have it
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def describe_base(source: str, folder: Path | str, model_config: Any) -> dict[str, Any]:
    """The policy that a run starts from: its name, and the sha256 of its weights or the hub's revision."""
    if not Path(folder).is_dir():
        return {"model": source, "revision": getattr(model_config, "_commit_hash", None)}
    sums = [sha256_file(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    return {
        "model": source,
        "weights_sha256": sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest(),
    }


@functools.cache
def code_version() -> dict[str, Any]:
    """sha256 over this program's sources, and the commit where they are a git checkout (with `dirty` if changed)."""
    sha = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((SOURCE_ROOT / folder).rglob("*.py")):
            sha.update(f"{path.relative_to(SOURCE_ROOT)}\n{sha256_file(path)}\n".encode())
    commit = _git("rev-parse", "HEAD")
    dirty = bool(_git("status", "--porcelain", "--", *SOURCES)) if commit else None
    return {"sha256": sha.hexdigest(), "commit": commit or None, "dirty": dirty}


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on, those that are installed here."""
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def _parent(run: RunFolder, base: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint that this one went on from, or the base."""
    newest = newest_checkpoint(run.checkpoints)
    if newest is None:
        return dict(base)
    manifest = read_manifest(Path(newest.uri))
    named = {key: manifest[key] for key in ("run_id", "step", "weights_sha256")}
    return {**named, "manifest_sha256": sha256_file(Path(newest.uri) / "manifest.json")}


def _scorer(run: RunFolder, name: str) -> dict[str, Any]:
    if not run.scorers.exists():  # a run that was put together by hand
        return {}
    found: dict[str, Any] = json.loads(run.scorers.read_text())[name]
    return _named(found)


def _ensemble(run: RunFolder) -> dict[str, Any]:
    """The other models that scored beside the reward model, where there are any."""
    found = json.loads(run.scorers.read_text()) if run.scorers.exists() else {}
    others = {kind: [_named(ref) for ref in found[kind]] for kind in ("members", "shadows") if kind in found}
    return {"reward_ensemble": others} if others else {}


def _named(ref: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in ref.items() if key in ("name", "version", "digest", "accuracy")}


def _digests(files: Iterable[Path]) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in files}


def _reused(run: RunFolder, config: Config, steps: Sequence[int]) -> dict[str, Any]:
    """Which run's policy drew the rollouts, and its files of them, where it was another run."""
    if config.reuse.rollouts is None:
        return {}
    files = _digests(run.reused_file(step) for step in steps)
    return {"reused_rollouts": {"run": config.reuse.rollouts, "files": files}}


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _git(*arguments: str) -> str:
    """What git prints of the source tree; "" where there is no git or no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(SOURCE_ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
