"""Weights & Biases: one W&B run per run, logged from as many processes as the run has.

Every process of a run opens the same W&B run (its id is the run id), so all charts are drawn against the
project's own `rs/step`: W&B counts its own steps anew in each process. Which records have been logged is
noted in `<folder>/wandb/logged.txt`, so that a step that is replayed after a crash is not drawn twice.

Tracking never stops a run: whatever fails is said once on standard error, and the run goes on without it.
The names follow NeMo-Aligner's: `train_rollouts/`, `train_optim/`, `val_rollouts/`, `timers/`; `scoring_server/` is
Triton's statistics.
"""

import contextlib
import netrc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from alignment.over_optimisation import Alarm

Mode = Literal["auto", "online", "offline", "disabled"]

INIT_SECONDS = 30.0
"""Seconds that W&B's server may take to answer at the start."""
FINISH_SECONDS = 60.0
"""Seconds that the upload of what is left may take at the end; the data also lie on the disk."""

STEP_NAMES = {
    "train_rollouts/global_rewards": "reward_mean",
    "train_rollouts/selected_rewards": "selected_reward_mean",
    "train_rollouts/judge_mean": "judge_mean",
    "train_rollouts/selected_judge_mean": "selected_judge_mean",
    "train_rollouts/global_response_lengths_mean": "response_length_mean",
    "train_rollouts/truncated_fraction": "truncated_fraction",
    "train_rollouts/duplicate_fraction": "duplicate_fraction",
    "train_rollouts/num_rollouts": "num_rollouts",
    "train_rollouts/num_selected": "num_selected",
    "train_rollouts/tokens_per_second": "tokens_per_second",
    "train_optim/loss": "loss",
    "train_optim/kl": "kl",
    "train_optim/grad_norm": "grad_norm",
    "train_optim/lr": "lr",
    "train_optim/response_tokens": "response_tokens",
}
"""Name in W&B of each number of a "step" record."""
TIMER_NAMES = {"timers/rollout_time": "rollouts", "timers/scoring_time": "scoring", "timers/train_time": "update"}
"""Name in W&B of each entry of a step's `seconds`."""
FAMILIES = ("train_rollouts", "train_optim", "val_rollouts", "timers", "scoring_server", "scoring_cache")


class Tracker:
    """Logs the records of metrics.jsonl and the report. Without a W&B run it does nothing."""

    def __init__(self, run: Any | None, logged: Path) -> None:
        self._run = run
        self._logged = logged

    def log_step(self, record: Mapping[str, Any]) -> None:
        """Logs a "step" record: all rollouts beside the selected ones, optimizer, timers, reward server."""
        values = {name: record[key] for name, key in STEP_NAMES.items()}
        values |= {name: record["seconds"][key] for name, key in TIMER_NAMES.items()}
        values |= {f"scoring_server/{key}": value for key, value in record["scoring_server"].items()}
        values |= {f"scoring_cache/{key}": value for key, value in record.get("scoring_cache", {}).items()}
        for key in ("member_means", "selected_member_means", "shadow_means", "selected_shadow_means"):
            values |= {f"train_rollouts/{key}/{model}": mean for model, mean in record.get(key, {}).items()}
        self._log("step", record["step"], values)

    def log_validation(self, record: Mapping[str, Any]) -> None:
        """Logs a "validation" record."""
        values = {"val_rollouts/global_rewards": record["reward_mean"], "val_rollouts/judge": record["judge_mean"]}
        for key in ("member_means", "shadow_means"):
            values |= {f"val_rollouts/{key}/{model}": mean for model, mean in record.get(key, {}).items()}
        self._log("validation", record["step"], values | {"timers/validation_time": record["seconds"]})

    def alert(self, alarm: Alarm) -> None:
        """Sends an alarm as a W&B alert, once."""

        def send(run: Any) -> None:
            run.alert(title=f"RS step {alarm.step}: {alarm.who} does not follow the reward", text=alarm.text)

        self._once(f"alarm {alarm.step} {alarm.who}", send)

    def log_summary(self, report: Mapping[str, Any]) -> None:
        """Puts the report's result into the W&B run's summary, as `evaluation/win_rate` and so on."""
        keys = ("evaluation", "reward_model", "judge", "seconds", "checkpoint")
        values = {k: v for key in keys for k, v in _flat(key, report[key])}
        if "promotion" in report:
            values["promotion/verdict"] = report["promotion"]["verdict"]
        self._guarded(lambda run: run.summary.update(values))

    def _log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        present = {name: value for name, value in values.items() if value is not None}
        self._once(f"{kind} {step}", lambda run: run.log({"rs/step": step, **present}))

    def _once(self, mark: str, action: Callable[[Any], None]) -> None:
        """Runs `action` on the W&B run unless `mark` says that it was done."""

        def marked(run: Any) -> None:
            if self._logged.exists() and mark in self._logged.read_text().splitlines():
                return
            action(run)
            with open(self._logged, "a") as file:
                file.write(mark + "\n")

        self._guarded(marked)

    def _guarded(self, action: Callable[[Any], None]) -> None:
        """Runs `action` on the W&B run; its first failure is told and ends the tracking."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # W&B's faults are of many types; none of them may stop a run
            _say(f"{_one_line(error)}; the run goes on without W&B")
            self._run = None


@contextlib.contextmanager
def tracked(run_id: str, *, mode: Mode, project: str, config: Mapping[str, Any], folder: Path) -> Iterator[Tracker]:
    """Opens the W&B run `run_id` in `folder` for the time of the body.

    `auto` is online where an API key is configured (WANDB_API_KEY or a netrc entry), else offline: then
    `wandb sync <folder>/wandb/offline-run-*` uploads it later. If W&B does not answer, the run is tracked
    offline. `disabled` does not import wandb. Raises nothing of W&B's.
    """
    if mode == "disabled":
        yield Tracker(None, folder)
        return
    run = _open(run_id, mode, project, config, folder)
    try:
        yield Tracker(run, folder / "wandb" / "logged.txt")
    finally:
        if run is not None:
            _finish(run, failed=sys.exc_info()[0] is not None, folder=folder)


def _open(run_id: str, mode: Mode, project: str, config: Mapping[str, Any], folder: Path) -> Any | None:
    """The W&B run, online or offline; None where even the latter fails."""
    online = mode in ("auto", "online") and has_credentials()
    if mode == "online" and not online:
        _say("wandb.mode is online but no API key is configured (set WANDB_API_KEY or run `wandb login`): offline")
    if online:
        try:
            return _init(run_id, "online", project, config, folder)
        except Exception as error:  # of many types: no network, a refused key, a quota
            _say(f"{_one_line(error)}; the run is tracked offline")
            _forget_failed_start()
    try:
        return _init(run_id, "offline", project, config, folder)
    except Exception as error:  # of many types: no wandb, no disk
        _say(f"{_one_line(error)}; the run goes on without W&B")
        return None


def _forget_failed_start() -> None:
    """Ends W&B's service process, which otherwise holds the run id of the failed start as in use."""
    with contextlib.suppress(Exception):  # what it could say has been said
        import wandb

        wandb.teardown()


def _init(
    run_id: str, mode: Literal["online", "offline"], project: str, config: Mapping[str, Any], folder: Path
) -> Any:
    import wandb

    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    wandb.setup(wandb.Settings(silent=True))  # the log-in speaks before the run's own settings hold
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
    )
    run = wandb.init(
        id=run_id,
        name=run_id,
        project=project,
        config=dict(config),
        dir=str(folder),
        resume="allow",
        mode=mode,
        settings=settings,
    )
    run.define_metric("rs/step")
    for family in FAMILIES:
        run.define_metric(f"{family}/*", step_metric="rs/step")
    return run


def _finish(run: Any, *, failed: bool, folder: Path) -> None:
    try:
        run.finish(exit_code=int(failed))
    except Exception as error:  # of many types, a time-out above all
        _say(f"{_one_line(error)}; what was not uploaded is in {folder / 'wandb'}: `wandb sync` it")


def has_credentials() -> bool:
    """Whether W&B would find a key for its server without asking. Reads no more than that."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return path.is_file() and netrc.netrc(path).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError) as error:
        _say(f"cannot read {path} ({type(error).__name__}): no API key taken from it")
        return False


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Nested dicts as `a/b/c`; an interval as `…/low` and `…/high`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}/{key}", inner)
    elif isinstance(value, list | tuple):
        yield from zip((f"{prefix}/low", f"{prefix}/high"), value, strict=False)
    else:
        yield prefix, value


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _say(text: str) -> None:
    print(f"W&B: {text}", file=sys.stderr, flush=True)
