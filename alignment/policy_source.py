"""Which weights a name means: a run's best checkpoint, a checkpoint, an embedded model, a model folder, a hub's.

Of a supervised fine-tuning it is the model that it wrote: its checkpoints hold what was trained, which may be adapters.
Runs, checkpoints and model folders may lie under s3://; then a copy is loaded, which `alignment.model_cache` keeps.
"""

import contextlib
import hashlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.config import Config
from alignment.config_sections import RunSection
from alignment.embedded import OnNote, policy_folder
from alignment.errors import CheckpointError, ConfigError, ModelError
from alignment.foreign_json import parse_object, read_object
from alignment.run_folder import RunFolder
from alignment.s3 import is_s3
from alignment.types import Checkpoint
from alignment.workspace import find_run, local_root, pull_prompts
from models.registry import PREFIX, located

if TYPE_CHECKING:
    from models.policy import PromptFormat

_HELD = contextlib.ExitStack()
"""Keeps the copies that this process has loaded from being removed by another one that needs the space."""


@dataclass(frozen=True, slots=True)
class PolicySource:
    """What to load, and where it comes from.

    `checkpoint.uri` is a folder, an s3:// URI or a name, the same on every node; of a model folder its `step` is 0 and
    its `sha256` that of the weights, empty for a hub's. `folder` is what this node loads: a folder or a hub's name.
    `run` is the run whose prompts it has seen, if known; `run_config` what it was trained with.
    """

    checkpoint: Checkpoint
    folder: str
    run: Path | None
    run_config: dict[str, Any] | None


def base_folder(config: Config, on_note: OnNote | None = None) -> Path | str:
    """The folder (or hub name) of `policy.model`. Raises ModelError, StorageError."""
    return model_folder(config.policy.model, config.run, key="policy.model", on_note=on_note)


def model_folder(name: str, storage: RunSection, *, key: str, on_note: OnNote | None = None) -> Path | str:
    """The folder (or hub name) to load a model from that is no run: what is under s3:// is fetched into the cache.

    `key` is what errors call the name; `storage` says where copies are kept. Raises ModelError, StorageError.
    """
    if name.startswith(PREFIX):
        name = located(storage.root, name, key=key)
    if not is_s3(name):
        return policy_folder(name, local_root(storage) / "cache", on_note, key=key)
    run = find_run("", name)
    if run:
        raise ModelError(
            f"{key} ({name}): is a run; name a checkpoint of it, {run}/checkpoints/step-…, or a model folder"
        )
    found = _fetched(name.rstrip("/"), storage, key, on_note)
    if not (found / "config.json").is_file():
        raise ModelError(f"{key} ({name}): holds no config.json, so it is no Hugging Face model folder")
    return found


def find_policy(
    name: str, *, root: str | Path, key: str, on_note: OnNote | None = None, storage: RunSection | None = None
) -> PolicySource:
    """The policy that `name`, the value of the config key or option `key`, means.

    `root` is the run root: a run may be named by its id there. Of a run the best checkpoint by validation is taken.
    `storage` says where copies of what is under s3:// are kept.
    Raises CheckpointError where one is not whole, ModelError for an unknown name, StorageError.
    """
    from models.checkpoints import folder_digest

    root, storage = str(root), storage or RunSection(root=str(root))
    if name.startswith(PREFIX):
        name = located(root, name, key=key)
    found = _in_s3(name, root, storage, key, on_note) or _in_folder(name, root, key)
    if found is not None:
        return found
    if Path(name).name == "latest":  # no model of a hub is called that
        raise ConfigError(f"{key} ({name}): there is no run in {root} yet; name a run, a checkpoint or a model")
    source = policy_folder(name, local_root(storage) / "cache", on_note, key=key)
    digest = folder_digest(source) if isinstance(source, Path) else ""
    # Of a root in S3 the cache is this node's alone, so the name stands for what was made from it there.
    uri = name if is_s3(root) else str(source)
    return PolicySource(Checkpoint(uri, digest, 0), str(source), None, None)


def _in_folder(name: str, root: str, key: str) -> PolicySource | None:
    """A run, or a checkpoint, of a local folder."""
    from models.checkpoints import best_checkpoint, verify

    for path in (Path(name).expanduser(), *(() if is_s3(root) else (Path(root) / name,))):
        if (path / "checkpoints").is_dir():
            run = RunFolder(path.resolve())
            if (run.path / "examples").is_dir():
                return _fine_tuned(run, f"{key} ({name})")
            checkpoint = best_checkpoint(run.checkpoints, run.validations(), run.failed_step())
            if checkpoint is None:
                raise CheckpointError(f"{key} ({name}): {run.path} has no finished checkpoint: resume that run")
            return _of_a_run(checkpoint)
        if (path / "manifest.json").is_file():
            _check_whole_model(path, f"{key} ({name})", str(path))
            return _of_a_run(verify(path.resolve()))
    return None


def _in_s3(name: str, root: str, storage: RunSection, key: str, on_note: OnNote | None) -> PolicySource | None:
    """A run, a checkpoint or a model folder under s3://; None for any other name."""
    from alignment.s3_objects import read_bytes
    from models.checkpoints import folder_digest

    run = find_run(root, name)
    if run is None and not is_s3(name):
        return None
    uri = name.rstrip("/")
    if run is not None:
        fine_tuned = read_bytes(f"{run}/model/config.json")
        uri = f"{run}/model" if fine_tuned else f"{run}/checkpoints/{_best_name(run, f'{key} ({name})')}"
    folder = _fetched(uri, storage, key, on_note)
    _check_whole_model(folder, f"{key} ({name})", uri)
    if not (folder / "manifest.json").is_file():
        config = read_bytes(f"{run}/config.json") if run else None
        source = Checkpoint(uri, folder_digest(folder), 0)
        return PolicySource(source, str(folder), None, parse_object(config[0]) if config else None)
    return _of_a_run_in_s3(uri, folder, storage)


def _of_a_run_in_s3(uri: str, folder: Path, storage: RunSection) -> PolicySource:
    """A checkpoint, whose run need not lie where it was."""
    from models.checkpoints import verify

    verified = verify(folder, name=uri.rpartition("/")[2])
    checkpoint = Checkpoint(uri, verified.sha256, verified.step)
    in_run = re.fullmatch(r"(s3://.+)/checkpoints/step-\d+", uri)
    run = find_run("", in_run[1]) if in_run else None
    seen = pull_prompts(storage, run) if run else None
    return PolicySource(checkpoint, str(folder), seen, _config_in(folder / "run_config.json"))


def _best_name(run: str, what: str) -> str:
    """The name of the best checkpoint by validation of a run under s3://, else of its newest."""
    from alignment.s3_objects import list_objects, read_bytes
    from models.checkpoints import before, kept_folders

    objects = [stored.uri.removeprefix(f"{run}/checkpoints/") for stored in list_objects(f"{run}/checkpoints/")]
    names = sorted(name.removesuffix("/DONE") for name in objects if name.endswith("/DONE"))
    if not names:
        raise CheckpointError(f"{what}: {run} has no finished checkpoint: resume that run")
    with tempfile.TemporaryDirectory() as place:
        metrics = read_bytes(f"{run}/metrics.jsonl")
        (Path(place) / "metrics.jsonl").write_bytes(metrics[0] if metrics else b"")
        copy = RunFolder(Path(place))
        validations, failed = copy.validations(), copy.failed_step()
    folders = before([Path(name) for name in names], failed) or [Path(name) for name in names]
    best = kept_folders(folders, keep_last=1, keep_best=1, validations=validations) - {folders[-1]}
    newest_is_best = kept_folders(folders[-1:], keep_last=1, keep_best=1, validations=validations)
    return (best or newest_is_best).pop().name


def _fetched(uri: str, storage: RunSection, key: str, on_note: OnNote | None) -> Path:
    """This node's copy of a model under s3://, held until the process ends. Raises ModelError, StorageError."""
    from alignment.model_cache import cached_folder
    from alignment.s3_objects import list_objects, read_bytes

    done = read_bytes(f"{uri}/DONE")
    objects = [] if done else list_objects(f"{uri}/")
    if done is None and not objects:
        raise ModelError(f"{key} ({uri}): there is nothing of that name; check the bucket and the prefix")
    listed = "\n".join(f"{stored.uri} {stored.size} {stored.etag}" for stored in objects)
    digest = done[0].decode(errors="replace").strip() if done else hashlib.sha256(listed.encode()).hexdigest()
    return _HELD.enter_context(cached_folder(uri, digest, round(storage.cache_limit_gb * 1e9), on_note=on_note))


def _check_whole_model(folder: Path, what: str, uri: str) -> None:
    if not (folder / "config.json").is_file():
        said = f"{what}: {uri} holds what a fine-tuning trained and no whole model: name its run"
        another = f", or write the model by `python -m alignment.sft_stage {uri} FOLDER`"
        raise CheckpointError(said if is_s3(uri) else said + another)


def loadable(uri: str, run: RunFolder, storage: RunSection, key: str) -> str:
    """What this node loads for a `checkpoint.uri` that another task of `run` may have found."""
    local = run.local(uri)
    return local if local != uri else str(model_folder(uri, storage, key=key))


def prompt_format_of(source: PolicySource, asked: "PromptFormat | None") -> "PromptFormat":
    """How a policy reads prompts: as asked, else as trained, else as a chat where its tokenizer has a template."""
    if asked is not None:
        return asked
    trained = ((source.run_config or {}).get("policy") or {}).get("prompt_format")
    if trained in ("text", "chat"):
        form: PromptFormat = trained
        return form
    from models.policy import load_reader

    return "chat" if load_reader(source.folder, prompt_format="text").tokenizer.chat_template else "text"


def _fine_tuned(run: RunFolder, what: str) -> PolicySource:
    """The model that a supervised fine-tuning wrote at its end."""
    from models.checkpoints import folder_digest

    model = run.path / "model"
    if not (model / "config.json").is_file():
        raise CheckpointError(f"{what}: the fine-tuning {run.path} has not written its model: resume it")
    config = _config_in(run.config)
    return PolicySource(Checkpoint(str(model), folder_digest(model), 0), str(model), None, config)


def _of_a_run(checkpoint: Checkpoint) -> PolicySource:
    folder = Path(checkpoint.uri)
    run = folder.parent.parent
    config = _config_in(folder / "run_config.json")
    return PolicySource(checkpoint, str(folder), run if (run / "prompts").is_dir() else None, config)


def _config_in(path: Path) -> dict[str, Any]:
    return read_object(path, CheckpointError, "name a run or a checkpoint that this program wrote")
