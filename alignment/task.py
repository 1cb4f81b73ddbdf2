"""What every task of a run has around its work: a device check, a tested reward server, W&B, and a clock."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.config import Config
from alignment.errors import ConfigError
from alignment.launch import run_workers
from alignment.progress import FitLines
from alignment.reward_repository import local_repository
from alignment.reward_server import RewardServer, external_url, reward_server
from alignment.run_folder import RunFolder
from alignment.run_state import at_work
from alignment.scorers_file import read_scorers, reward_references
from alignment.tracking import Tracker, tracked
from alignment.types import RewardModelRef
from alignment.workspace import local_root

if TYPE_CHECKING:
    from alignment.ensemble import Ensemble
    from alignment.score_cache import ScoreCache
    from alignment.scoring import RewardClient

COMMAND_STARTED = "RS_COMMAND_STARTED"
"""Environment variable: Unix time at which the `run` or `resume` command began; else a task counts from its own."""
START_S = 300.0
"""How long a local reward server may take to load its model."""


def claim_devices(config: Config) -> None:
    """Settle what this process and its children compute on. Raises ConfigError where the node has too few GPUs."""
    if config.resources.gpu:
        import torch

        if config.resources.gpu > torch.cuda.device_count():
            raise ConfigError(
                f"resources.gpu ({config.resources.gpu}) is more than the {torch.cuda.device_count()} GPUs that torch "
                "sees here: run on a larger node, or set resources.gpu=0 for the CPU"
            )
    # DeepSpeed, which transformers imports, would otherwise look for an accelerator and warn that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if config.resources.gpu else "cpu")


def ends_at(config: Config) -> list[str]:
    """Workers' arguments for `loop.max_time_per_run`."""
    end = _end_of_time(config)
    return [] if end is None else ["--ends-at", str(end)]


def time_left(config: Config) -> float | None:
    """Seconds until `loop.max_time_per_run` is over; None where it has no bound."""
    end = _end_of_time(config)
    return None if end is None else end - time.time()


def _end_of_time(config: Config) -> float | None:
    """Unix time at which `loop.max_time_per_run` is over."""
    seconds = config.max_seconds_per_run
    return None if seconds is None else float(os.environ.get(COMMAND_STARTED, time.time())) + seconds


def fit_on_workers(worker: str, config: Config, folder: RunFolder, progress: FitLines) -> str | None:
    """Run a training's worker module on all workers, from the last checkpoint in `folder` if there is one.

    Returns after which step it stopped and why, None where it came to its end. Raises the worker's AlignmentError.
    """
    stopped: list[str] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["kind"] == "checkpoint":
            folder.send()
        if event["kind"] == "stopped":
            stopped.append(f"stopped after step {event['step']}: {event['reason']}")
        progress.update(event)

    run_workers(
        worker,
        ["--folder", str(folder.path), *ends_at(config)],
        num_workers=config.num_workers,
        on_event=on_event,
        check=lambda: None,
        grace_s=config.loop.stop_grace_s,
    )
    return stopped[0] if stopped else None


@dataclass(frozen=True, slots=True)
class ScoringModels:
    """The models that score a run's responses: `members` make the reward, the first by itself in most runs."""

    members: tuple[RewardModelRef, ...]
    shadows: tuple[RewardModelRef, ...]

    @property
    def all(self) -> tuple[RewardModelRef, ...]:
        """Members, then shadows."""
        return (*self.members, *self.shadows)


def scoring_models(config: Config, run: RunFolder, reward: RewardModelRef) -> ScoringModels:
    """The run's reward model, and what `reward_ensemble` puts beside it as the run's scorers.json pins it."""
    others: dict[str, list[RewardModelRef]] = {"members": [], "shadows": []}
    if config.reward_ensemble.members or config.reward_ensemble.shadows:
        saved = read_scorers(run)
        others = {key: reward_references(run, saved, key) for key in others}
    return ScoringModels((reward, *others["members"]), tuple(others["shadows"]))


@contextmanager
def served(config: Config, run: RunFolder, reward: RewardModelRef) -> Iterator[RewardServer]:
    """The reward server of this task: external where `reward.url` is set, else a child that ends with it.

    What lies in S3 is served from a local copy that is checked first.
    """
    models = scoring_models(config, run, reward).all
    with ExitStack() as stack:
        repository = Path()  # of an external server nobody reads one
        if config.reward.url is None:
            versions = [(model.name, model.version) for model in models]
            repository = stack.enter_context(local_repository(reward.repository, versions, config.run))
        yield stack.enter_context(
            reward_server(
                repository=repository,
                name=reward.name,
                version=reward.version,
                url=external_url(config.reward.url),
                grpc_port=config.reward.grpc_port,
                log=run.path / "logs" / "triton.log",
                threads=config.resources.threads,
                also=[f"{other.name}/{other.version}" for other in models[1:]],
            )
        )


def reward_client(
    config: Config, url: str, name: str, version: str, *, check: Callable[[], None] | None = None
) -> "RewardClient":
    """A client of the server at `url` that scores with this model and version; `check` as in `RewardClient`."""
    from alignment.scoring import RewardClient

    reward = config.reward
    return RewardClient(url, name, version, reward.timeout_s, patience_s=reward.patience_s, check=check)


@contextmanager
def scoring_clients(
    config: Config, url: str, models: ScoringModels, *, check: Callable[[], None] | None = None
) -> Iterator["Ensemble"]:
    """A client of each model at `url`, with its kept scores under `reuse.scores`; `check` as in `RewardClient`."""
    from alignment.ensemble import Ensemble

    with ExitStack() as stack:  # the first closes last, since what it does in the background waits for the others
        clients = [
            stack.enter_context(reward_client(config, url, model.name, model.version, check=check))
            for model in models.all
        ]
        count = len(models.members)
        yield Ensemble(
            tuple(clients[:count]),
            config.member_weights,
            config.reward_ensemble.combine,
            tuple(clients[count:]),
            tuple(score_cache(config, model) for model in models.all) if config.reuse.scores else (),
        )


def score_cache(config: Config, model: RewardModelRef) -> "ScoreCache":
    """The scores that runs of this root keep of an exported version. Raises ModelError."""
    from alignment.reward_repository import card_of
    from alignment.score_cache import ScoreCache, export_digest

    return ScoreCache(local_root(config.run) / "scores" / f"{export_digest(card_of(model))}.jsonl")


def check_scoring(
    config: Config, client: "RewardClient", reward: RewardModelRef, on_note: Callable[[str], None]
) -> None:
    """Wait until the server answers, and see that its scores can be trusted. Raises RewardServerError.

    The export is read while a local server loads it.
    """
    from alignment.reward_selftest import check_export, self_test

    on_disk = (
        check_export(reward, config.run)
        if config.reward.url is None
        else "its weights, head included, are out of sight"
    )
    client.wait_ready(ready_timeout_s(config))
    over_the_wire = self_test(client, reward.version)
    on_note(f"self-test of {reward.name} version {reward.version} at {client.url}: {on_disk}; {over_the_wire}")


@contextmanager
def tested_clients(
    config: Config, run: RunFolder, server: RewardServer, reward: RewardModelRef, on_note: Callable[[str], None]
) -> Iterator["Ensemble"]:
    """Clients of this task's server, whose models have passed their self-tests. Raises RewardServerError."""
    models = scoring_models(config, run, reward)
    with scoring_clients(config, server.url, models, check=server.check) as ensemble:
        for client, model in zip(ensemble.clients, models.all, strict=True):
            check_scoring(config, client, model, on_note)
        yield ensemble


def tracker(config: Config, run: RunFolder) -> AbstractContextManager[Tracker]:
    """What the run is drawn with, its one W&B run above all, joined by this process."""
    from models.checkpoints import finished

    own = config.wandb
    return tracked(
        run,
        mode=own.mode,
        project=own.project,
        sample_prompts=own.sample_prompts,
        tensorboard=config.tensorboard.enabled,
        config=config.model_dump(mode="json"),
        until=max((int(folder.name.removeprefix("step-")) for folder in finished(run.checkpoints)), default=0),
    )


def ready_timeout_s(config: Config) -> float:
    """How long to wait for the reward server: an external one is there or not, a local one has to start."""
    return config.reward.timeout_s if config.reward.url else START_S


class TaskClock:
    """What a task's seconds went to, marked as it goes: `starting` until its work began, `saving` its checkpoints,
    and `ending` after the last of them."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._saved_at = self._begun
        self._found: dict[str, Any] = {}

    def work_begins(self) -> None:
        """The first call counts."""
        self._found.setdefault("starting", time.monotonic() - self._begun)

    def saved(self, seconds: float) -> None:
        """A checkpoint was written just now, in so many seconds."""
        self._saved_at = time.monotonic()
        self._found["saving"] = self._found.get("saving", 0.0) + seconds
        self._found["checkpoints"] = self._found.get("checkpoints", 0) + 1

    def record(self, name: str) -> dict[str, Any]:
        """The "task" record of metrics.jsonl."""
        now = time.monotonic()
        ending = {"ending": now - self._saved_at} if "saving" in self._found else {}
        return {"kind": "task", "name": name, "seconds": now - self._begun, **self._found, **ending}


@contextmanager
def timed_task(run: RunFolder, name: str) -> Iterator[TaskClock]:
    """Adds a "task" record with the seconds that the body took, once it has ended well; the body may mark them."""
    clock = TaskClock()
    with at_work(run, name):
        yield clock
        run.append_metrics(clock.record(name))
