"""What every flow file shares: where the source tree is, the config option, `--set`, and plain error messages.

In a checkout the flows stand in `flows/` beside `alignment/`; in a code package Metaflow lays the flow's
folder flat at the archive's root, and `alignment/` stands beside the flow file itself.
"""

import getpass
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
SOURCE_ROOT = _HERE if (_HERE / "alignment").is_dir() else _HERE.parent
"""The folder that holds `alignment/`, `models/`, `infra/`, `triton_repo/` and `configs/`."""

PACKAGED = [str(SOURCE_ROOT / name) for name in ("alignment", "models", "infra", "triton_repo", "configs")]
SUFFIXES = ".py,.pbtxt,.yaml,.json,.jinja"
"""What travels to remote tasks: code and templates, never weights."""

CONFIG_HELP = "preset, a YAML file; any field can be overridden by --set section.field=value (repeatable)"
INPUTS = (
    *(("policy", "model"), ("reward", "model"), ("prompts", "train"), ("prompts", "held_out")),
    *(
        ("reward_training", "train"),
        ("reward_training", "held_out"),
        ("judge", "train_pairs"),
        ("judge", "held_out_pairs"),
        ("sft", "validation"),
        ("training", "sft_mix"),
    ),
    *(("evaluation", "model"), ("evaluation", "base"), ("evaluation", "prompts"), ("evaluation", "lm_eval_tasks")),
)
"""Fields that may name local files."""
OVERTIME_S = 15.0
"""Seconds beyond its time limit after which a step is ended by force."""
WATCH_STDIN = "--watch-stdin"
"""Option of a flow that another run's step starts: end when standard input ends, as it does with that step; by force
the seconds later that stand behind it."""
COMMAND_STARTED = "RS_COMMAND_STARTED"
"""What `alignment.task` counts loop.max_time_per_run from: set here, before anything takes time."""
DEFAULT_PRESET = str(SOURCE_ROOT / "configs" / "imdb_sentiment.yaml")

if str(SOURCE_ROOT) not in sys.path:
    sys.path.insert(0, str(SOURCE_ROOT))

# Metaflow wants a user other than root, which a container rarely has, and looks for one when it is imported.
if "METAFLOW_USER" not in os.environ:
    try:
        _user = getpass.getuser()
    except (KeyError, OSError):  # a container's uid need not have a name
        _user = "root"
    os.environ["METAFLOW_USER"] = _user if _user != "root" else "local"


def parse_preset(text: str) -> dict[str, Any]:
    """Metaflow's parser for the `config` option: YAML or JSON text to a checked, complete, plain dict."""
    from alignment.config import parse_config
    from alignment.continuation import find_run_named, is_found
    from models.registry import PREFIX, located

    with plain_errors():
        config = parse_config(text)
        values = config.model_dump(mode="json")
        for section, field, name in (
            ("resume", "from", config.resume.from_),
            ("reuse", "rollouts", config.reuse.rollouts),
        ):
            # Other runs by their folder or URI: `latest` will soon be another one. A config that was resolved is parsed
            # again, when its source may be gone and is needed no more.
            key = f"{section}.{field}"
            values[section][field] = name if is_found(name) else find_run_named(key, name, config.run.root)
        if config.policy.model.startswith(PREFIX):  # an alias may soon be moved
            values["policy"]["model"] = located(config.run.root, config.policy.model, key="policy.model")
    # Tasks and resumes may work in another folder than the one in which the run was started.
    values["run"]["root"] = _absolute(values["run"]["root"])
    if values["run"]["workspace"]:
        values["run"]["workspace"] = _absolute(values["run"]["workspace"])
    if values["reward"]["repository"]:
        values["reward"]["repository"] = _absolute(values["reward"]["repository"])
    for section, name in INPUTS:
        source = values[section][name]
        values[section][name] = [_placed(one) for one in source] if isinstance(source, list) else _placed(source)
    values["sft"]["train"] = {_placed(name): weight for name, weight in values["sft"]["train"].items()}
    return values


def _placed(source: str | None) -> str | None:
    """A local file or folder by its absolute path; a built-in, an s3:// or a hub's name as it is."""
    return _absolute(source) if source and Path(source).expanduser().exists() else source


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().resolve())


def typed(values: Any) -> Any:
    """The dict-like value that a step sees as `self.config`, as the typed tree."""
    from alignment.config import validate_config

    return validate_config(values.to_dict() if hasattr(values, "to_dict") else dict(values))


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that a user can cure become Metaflow's own kind, which it prints without a traceback."""
    from metaflow.exception import MetaflowException

    from alignment.errors import AlignmentError

    try:
        yield
    except AlignmentError as error:
        kind = type(error).__name__
        raise type(kind, (MetaflowException,), {"headline": kind})(str(error)) from None


@contextmanager
def task(timeout_s: float | None = None) -> Iterator[None]:
    """Around a step's work: plain errors, and an end with Metaflow's scheduler, `kill -9` of that included.

    With `timeout_s` also an end by force a little later: Metaflow's @timeout raises an exception in the step, which
    never arrives in one that hangs outside Python, and it leaves the first task of a gang alone.
    """
    from alignment.lifeline import end_after, end_with_parent

    end_with_parent()
    with plain_errors(), end_after(timeout_s and timeout_s + OVERTIME_S):
        yield


def tag(text: str) -> None:
    """Tag the run that this step belongs to, for `Flow("RSFlow").runs(text)`.

    In a pod without a Metaflow service, Metaflow's records of the run are on the machine that started it: then there is
    no tag, and the log says so.
    """
    from metaflow import Run, current, namespace
    from metaflow.exception import MetaflowNotFound

    namespace(None)
    try:
        run = Run(f"{current.flow_name}/{current.run_id}")
    except MetaflowNotFound:
        print(f"the run is not tagged {text}: this task sees no Metaflow service that has records of it")
        return
    run.add_tag(text)


def fold_overrides(arguments: Sequence[str]) -> list[str]:
    """The command line with `--set section.field=value` and `--config config FILE` folded into one config value.

    Metaflow resolves decorators from the config before it reads parameters, so an override must be in the
    config by then to reach `@resources`. A resume keeps the config of the run that it continues.
    """
    from alignment.config import load_config

    rest, overrides, preset = [], [], DEFAULT_PRESET
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if word == "--set" or word.startswith("--set="):
            overrides.append(_value(word, queue))
        elif word == "--config=config" or (word == "--config" and queue[:1] == ["config"]):
            del queue[: word == "--config"]
            preset = queue.pop(0) if queue else sys.exit("--config config needs a file: --config config FILE")
            rest += ["--config", "config", preset]
        else:
            rest.append(word)
    if not overrides:
        return rest
    if "--config-value" in rest:
        sys.exit("--set cannot be combined with --config-value: put the value into the JSON itself")
    if "resume" in rest:
        sys.exit("--set cannot change a resumed run: a resume keeps its config; start a new run to change it")
    with _exit_on_error():
        resolved = load_config(preset, overrides).model_dump_json()
    if preset is not DEFAULT_PRESET:
        at = rest.index("--config")
        del rest[at : at + 3]
    return ["--config-value", "config", resolved, *rest]


def main(flow: Callable[[], object]) -> None:
    """Run a flow's command line."""
    from alignment.lifeline import interrupt_with_stdin

    if WATCH_STDIN in sys.argv:
        at = sys.argv.index(WATCH_STDIN)
        interrupt_with_stdin(float(sys.argv[at + 1]))
        del sys.argv[at : at + 2]
    # Metaflow starts the nodes of a local gang as `python`, which without an activated environment is another one.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    os.environ.setdefault(COMMAND_STARTED, str(time.time()))
    sys.argv[1:] = fold_overrides(sys.argv[1:])
    flow()


def _value(word: str, queue: list[str]) -> str:
    if "=" in word:
        return word.partition("=")[2]
    if not queue:
        sys.exit("--set needs a value: --set section.field=value, e.g. --set training.lr=1e-5")
    return queue.pop(0)


@contextmanager
def _exit_on_error() -> Iterator[None]:
    from alignment.errors import AlignmentError

    try:
        yield
    except AlignmentError as error:
        sys.exit(f"{type(error).__name__}: {error}")
