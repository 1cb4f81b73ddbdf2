"""Which weights a name means: a run's best checkpoint, a checkpoint, an embedded model, a model folder, a hub's.

Of a supervised fine-tuning it is the model that it wrote: its checkpoints hold what was trained, which may be adapters.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.embedded import OnNote, policy_folder
from alignment.errors import CheckpointError, ConfigError
from alignment.run_folder import RunFolder
from alignment.types import Checkpoint

if TYPE_CHECKING:
    from models.policy import PromptFormat


@dataclass(frozen=True, slots=True)
class PolicySource:
    """What to load, and where it comes from.

    `checkpoint.uri` is a folder or a hub name; of a model folder its `step` is 0 and its `sha256` that of the weights,
    empty for a hub's. `run` is the run whose prompts it has seen, if known; `run_config` what it was trained with.
    """

    checkpoint: Checkpoint
    run: Path | None
    run_config: dict[str, Any] | None


def find_policy(name: str, *, root: str | Path, key: str, on_note: OnNote | None = None) -> PolicySource:
    """The policy that `name`, the value of the config key or option `key`, means.

    `root` is the run root: a run may be named by its id there. Of a run the best checkpoint by validation is taken.
    Raises CheckpointError where one is not whole, ModelError for an unknown name.
    """
    from models.checkpoints import best_checkpoint, folder_digest, verify

    for path in (Path(name).expanduser(), Path(root) / name):
        if (path / "checkpoints").is_dir():
            run = RunFolder(path.resolve())
            if (run.path / "examples").is_dir():
                return _fine_tuned(run, f"{key} ({name})")
            checkpoint = best_checkpoint(run.checkpoints, run.validations())
            if checkpoint is None:
                raise CheckpointError(f"{key} ({name}): {run.path} has no finished checkpoint: resume that run")
            return _of_a_run(checkpoint)
        if (path / "manifest.json").is_file():
            if not (path / "config.json").is_file():
                raise CheckpointError(
                    f"{key} ({name}): {path} holds what a fine-tuning trained and no whole model: name its run, or "
                    f"write the model by `python -m alignment.sft_stage {path} FOLDER`"
                )
            return _of_a_run(verify(path.resolve()))
    if name == "latest":
        raise ConfigError(f"{key} (latest): there is no run in {root} yet; name a run, a checkpoint or a model")
    source = policy_folder(name, Path(root) / "cache", on_note, key=key)
    digest = folder_digest(source) if isinstance(source, Path) else ""
    return PolicySource(Checkpoint(str(source), digest, 0), None, None)


def prompt_format_of(source: PolicySource, asked: "PromptFormat | None") -> "PromptFormat":
    """How a policy reads prompts: as asked, else as trained, else as a chat where its tokenizer has a template."""
    if asked is not None:
        return asked
    trained = ((source.run_config or {}).get("policy") or {}).get("prompt_format")
    if trained in ("text", "chat"):
        form: PromptFormat = trained
        return form
    from models.policy import load_reader

    return "chat" if load_reader(source.checkpoint.uri, prompt_format="text").tokenizer.chat_template else "text"


def _fine_tuned(run: RunFolder, what: str) -> PolicySource:
    """The model that a supervised fine-tuning wrote at its end."""
    from models.checkpoints import folder_digest

    model = run.path / "model"
    if not (model / "config.json").is_file():
        raise CheckpointError(f"{what}: the fine-tuning {run.path} has not written its model: resume it")
    return PolicySource(Checkpoint(str(model), folder_digest(model), 0), None, json.loads(run.config.read_text()))


def _of_a_run(checkpoint: Checkpoint) -> PolicySource:
    folder = Path(checkpoint.uri)
    run = folder.parent.parent
    config = json.loads((folder / "run_config.json").read_text())
    return PolicySource(checkpoint, run if (run / "prompts").is_dir() else None, config)
