"""Going on from another run: `--set resume.from=RUN` begins a new run where RUN's last verified checkpoint stands.

What makes the task (seed, policy, prompts, reward model, judge) must be as it was, so that no prompt is repeated
or skipped and the rewards stay comparable. All else may change: the number of steps or workers, the learning
rate, the selection. The new run gets the prompts, scorers, rollouts, metrics and checkpoints so far, so that it
is complete by itself; files that never change are hard links where the disk allows it.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.atomic_files import disk_errors, write_json, write_text
from alignment.config import Config, parse_config
from alignment.errors import AlignmentError, CheckpointError, ConfigError
from alignment.links import link_out
from alignment.preparation import total_steps
from alignment.run_folder import RunFolder
from alignment.s3 import is_s3
from alignment.scorers_file import checked_scorers
from alignment.types import Checkpoint
from alignment.workspace import find_run, first_id_in_s3

SERVING = ("repository", "url", "version", "grpc_port", "timeout_s", "patience_s", "token_budget")
"""Keys of `reward` that say how a reward model is served, not which one it is."""


def task_of(config: Config) -> dict[str, Any]:
    """The keys, as dotted paths, that all checkpoints of a run and of those that go on from it have in common."""
    values = config.model_dump(mode="json")
    kept: dict[str, Any] = {
        "seed": values["seed"],
        **{
            f"{name}.{key}": value
            for name in ("policy", "prompts", "judge", "reward_ensemble")
            for key, value in values[name].items()
        },
        **{f"reward.{key}": value for key, value in values["reward"].items() if key not in SERVING},
        # Adapters go on from the base that they were added to, in their own shape.
        "training.lora_rank": config.training.lora_rank,
        **({"training.lora_alpha": config.training.lora_alpha} if config.training.lora_rank else {}),
        "rollouts.num_rollout_samples": config.rollouts.num_rollout_samples,
        "validation.num_prompts": config.validation.num_prompts,
        "evaluation.num_prompts": config.evaluation.num_prompts,
        "evaluation.prompts": config.evaluation.prompts,
    }
    return kept


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """The keys in which two flat configs differ, as `key (theirs, ours)`."""
    keys = [*theirs, *(key for key in ours if key not in theirs)]
    return [
        f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} here)" for key in keys if theirs.get(key) != ours.get(key)
    ]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of dicts with its keys as dotted paths."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def check_own(config: Config, run: RunFolder, checkpoint: Path) -> None:
    """Raise CheckpointError for a checkpoint that was made for another task, or by a run that this one is not.

    A checkpoint of another run is this one's if its manifest came with `resume.from`.
    """
    from models.checkpoints import read_manifest

    manifest, copy = checkpoint / "manifest.json", run.lineage / f"{checkpoint.name}.json"
    adopted = copy.is_file() and copy.read_bytes() == manifest.read_bytes()
    origin = read_manifest(checkpoint)["run_id"]
    if origin != run.path.name and not adopted:
        raise CheckpointError(
            f"{checkpoint} was written by the run {origin}: go on from it by --set resume.from={origin}"
        )
    path = checkpoint / "run_config.json"
    try:
        theirs = parse_config(path.read_text())
    except (OSError, AlignmentError) as error:
        raise CheckpointError(f"{path} cannot be read as a config: {error}") from error
    different = differences(task_of(theirs), task_of(config))
    if different:
        raise CheckpointError(f"{checkpoint} is a checkpoint of another task: {', '.join(different)}")


def adopt(config: Config, source: RunFolder, run: RunFolder) -> None:
    """Fill a new run's folder from the run that `resume.from` names; once, however often. Raises AlignmentError."""
    from models.checkpoints import before, finished

    if run.scorers.exists():  # written last: a first step that is done again must not undo what came after it
        return
    checkpoint = _last_good(source)
    if checkpoint is None:
        raise CheckpointError(f"resume.from ({source.uri}) has no finished checkpoint: resume that run, or start anew")
    different = differences(task_of(parse_config(source.config.read_text())), task_of(config))
    if different:
        raise ConfigError(
            f"resume.from ({source.uri}) was another task: {', '.join(different)}. Keep these keys, or start a new "
            f"run with policy.model={source.uri_of(Path(checkpoint.uri))}"
        )
    scorers = checked_scorers(source)
    _check_goes_on(config, source, checkpoint.step, scorers["reward_model"]["version"])
    with disk_errors(run.path):
        for name in ("prompts", "judge", "lineage", "reused"):
            link_tree(source.path / name, run.path / name)
        link(source.path / "excluded_prompts.jsonl", run.path / "excluded_prompts.jsonl")
        for step in range(1, checkpoint.step + 1):
            link(source.rollouts_file(step), run.rollouts_file(step))
        for folder in before(finished(source.checkpoints), checkpoint.step + 1):
            _adopt_checkpoint(folder, run.checkpoints / folder.name)
    _adopt_metrics(source, run, checkpoint.step)
    scorers["judge"]["uri"] = run.uri_of(run.path / "judge")
    write_json(run.scorers, scorers)


def _last_good(source: RunFolder) -> Checkpoint | None:
    """The run's last checkpoint; of a run that was rolled back the one that it went back to. Raises CheckpointError."""
    from alignment.rollback import standing_checkpoint
    from models.checkpoints import last_checkpoint

    failed = source.failed_step()
    if failed is None:
        return last_checkpoint(source.checkpoints)
    standing = standing_checkpoint(source)
    if standing.step >= failed:
        raise CheckpointError(
            f"resume.from ({source.uri}) has no checkpoint before its RS step {failed}, which failed badly: start anew"
        )
    return standing


def _check_goes_on(config: Config, source: RunFolder, done: int, version: str) -> None:
    """Raise ConfigError where the config asks for what a run that goes on cannot give."""
    total = total_steps(config, source.path)
    if total <= done:
        raise ConfigError(
            f"resume.from ({source.uri}) has {done} RS steps behind it, and this run is to have {total}: "
            "raise loop.max_steps or loop.max_epochs"
        )
    check_version(config, version, f"resume.from ({source.uri})")


def check_version(config: Config, version: str, source: str) -> None:
    """Raise ConfigError where the config asks for another reward model than the `version` that `source` scored with."""
    if config.reward.version not in ("", version):
        raise ConfigError(
            f"reward.version ({config.reward.version}) is not the {version} that {source} scored with: unset it, or "
            "start a new run"
        )


def first_id(root: str | Path, run_id: str, resumed_id: str | None) -> str:
    """The id that names the folder of a run: its own, or that of the run whose failed first step it does again.

    A resume of a resume finds the name through a link that is left under each resume's id.
    """
    if is_s3(str(root)):
        return first_id_in_s3(str(root), run_id, resumed_id)
    if resumed_id is None or not (Path(root) / resumed_id).is_dir():
        return run_id
    name = (Path(root) / resumed_id).resolve().name
    link = Path(root) / run_id
    with disk_errors(link):
        if not link.is_symlink():  # else this task is tried again
            link.symlink_to(name)
    return name


def is_found(name: str | None) -> bool:
    """Whether a run is named as `find_run_named` returns it, so that nothing has to be looked up."""
    name = name or ""
    return (is_s3(name) or Path(name).is_absolute()) and Path(name).name != "latest"


def find_source(config: Config) -> str | None:
    """The run that `resume.from` names; None without. Raises ConfigError where there is none, StorageError."""
    return find_run_named("resume.from", config.resume.from_, config.run.root)


def find_run_named(key: str, name: str | None, root: str) -> str | None:
    """The run that `name`, the value of `key`, means by its id under `root`, its folder or its URI; None without.

    Raises ConfigError where there is none, StorageError.
    """
    if name is None:
        return None
    found = find_run(root, name)
    if found:
        return found
    for path in (*(() if is_s3(root) else (Path(root) / name,)), Path(name).expanduser()):
        if (path / "config.json").is_file():
            return str(path.resolve())
    raise ConfigError(f"{key} ({name}): no run of that id in {root}, and no run folder of that name")


def _adopt_metrics(source: RunFolder, run: RunFolder, last: int) -> None:
    """The records up to RS step `last`, each with the id of the run whose time it took."""
    kinds = ("step", "validation")
    records = [r for r in source.read_metrics() if r.get("kind") in kinds and r["step"] <= last]
    lines = [json.dumps({"run_id": source.path.name, **record}) + "\n" for record in records]
    write_text(run.metrics, "".join(lines))


def _adopt_checkpoint(folder: Path, place: Path) -> None:
    """A finished checkpoint under the new run, whole or not at all."""
    if place.exists():
        return
    staging = place.with_name(f".{place.name}.adopted")
    shutil.rmtree(staging, ignore_errors=True)
    link_tree(folder, staging)
    staging.rename(place)


def link_tree(source: Path, place: Path) -> None:
    """`link` for all files of a folder, which need not be there. Raises CheckpointError for a link out of it."""
    if leads_out := link_out(source):
        raise CheckpointError(f"{leads_out} leads out of {source}: put a copy in its place, or remove it")
    for path in sorted(source.rglob("*")):
        if path.is_file():
            link(path, place / path.relative_to(source))


def link(source: Path, place: Path) -> None:
    """A second name for a file that is only ever replaced, never written into; a copy on another disk."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)
