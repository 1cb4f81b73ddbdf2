"""The reward model of a run: trained by its workers, measured, exported; reused where the same recipe made one."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.atomic_files import disk_errors
from alignment.config import Config
from alignment.embedded import reward_model_folder
from alignment.errors import AlignmentError, StoppedError
from alignment.launch import SOURCE_ROOT
from alignment.preparation import cache_folder
from alignment.progress import FitLines
from alignment.reward_data import TEST, RewardData, read_reward_data
from alignment.reward_repository import export_place, find_export, read_export
from alignment.reward_server import external_url
from alignment.run_folder import RunFolder
from alignment.task import fit_on_workers, reward_client
from alignment.types import RewardModelRef
from alignment.workspace import local_root
from models.checkpoints import sha256_file

SERVED_CODE = SOURCE_ROOT / "triton_repo" / "reward_model" / "1" / "model.py"
WORKER = "alignment.reward_worker"

Note = Callable[[str], None]


def prepare_reward_model(config: Config, on_note: Note, run_id: str = "") -> RewardModelRef:
    """The version that will score: an external server's, one that this recipe exported before, or a new one.

    `run_id` goes into a new version's card. Raises AlignmentError.
    """
    reward = config.reward
    if url := external_url(reward.url):
        return _external(config, url)
    if reward.version:
        on_note(f"reward model: version {reward.version} scores, with the template and lengths of its export")
        return read_export(config.reward_repository, reward.name, reward.version, config.run)
    data = read_reward_data(config)
    recipe = recipe_digest(config, data)
    folder = RunFolder(local_root(config.run) / "reward_training" / recipe[:16])
    with _alone(folder, on_note):
        found = find_export(config.reward_repository, reward.name, recipe, config.run)
        if found:
            on_note(
                f"reward model: version {found.version} of {found.name} was made by this recipe, "
                f"accuracy {found.accuracy}"
            )
            ref = found
        else:
            if data.train:
                train(config, folder, on_note)
            ref = _measure_and_export(config, folder, data, {"recipe_digest": recipe, "run_id": run_id}, on_note)
            on_note(
                f"reward model: exported version {ref.version} to {ref.repository}, held-out accuracy {ref.accuracy}"
            )
        shutil.rmtree(folder.path, ignore_errors=True)  # the export holds the weights, its card the records
    return ref


@contextmanager
def _alone(folder: RunFolder, on_note: Note) -> Iterator[None]:
    """Of all that want this recipe's model at once, one makes it while the others wait to find it."""
    beside = RunFolder(folder.path.with_suffix(".lock"))
    with disk_errors(beside.path):
        beside.path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(beside.lock())
        except AlignmentError as error:
            on_note(f"reward model: waiting, since another process makes it ({error})")
            stack.enter_context(beside.lock(wait_s=math.inf))
        yield


def recipe_digest(config: Config, data: RewardData) -> str:
    """sha256 of what makes an export: settings, the base's files, the texts it learns from, the served code."""
    serving = {"name", "repository", "url", "version", "grpc_port", "timeout_s", "patience_s", "instances"}
    recipe = [
        config.reward.model_dump(mode="json", exclude=serving),
        config.reward_training.model_dump(mode="json"),
        config.seed,
        _base_files(reward_model_folder(config.reward.model, cache_folder(config))),
        sha256_file(SERVED_CODE),
        data.digest,
    ]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def train(config: Config, folder: RunFolder, on_note: Note) -> None:
    """Train on all workers, from the last checkpoint in `folder` if there is one. Raises AlignmentError."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.config.write_text(config.model_dump_json(indent=2))
    stopped = fit_on_workers(WORKER, config, folder, FitLines(on_note, "reward", "reward model"))
    if stopped:
        raise StoppedError(
            f"the reward model's training {stopped}. The same command, or `resume`, goes on from its last "
            f"checkpoint in {folder.path}"
        )


def _measure_and_export(
    config: Config, folder: RunFolder, data: RewardData, card: dict[str, Any], on_note: Note
) -> RewardModelRef:
    import torch

    from alignment.reward_measure import measure
    from alignment.reward_page import reward_page
    from models.memory import keep_freed_memory
    from models.reward_export import Serving, export_version

    reward = config.reward
    torch.set_num_threads(config.resources.threads)
    keep_freed_memory()
    model, tokenizer, step = _trained_model(config, folder, has_trained=bool(data.train))
    sharded = config.reward_training.zero_stage == 3 or reward.device_map is not None
    if config.resources.gpu and sharded:
        on_note("reward model: measured on the CPU, since one GPU may not hold it")
    model = model.to(torch.device("cuda" if config.resources.gpu and not sharded else "cpu"))
    quality = measure(config, model, tokenizer, data.measured)
    primary = quality.get(TEST if config.reward_training.test_share else config.reward_training.held_out or "", {})
    card |= {
        "base": reward.model,
        "accuracy": primary["accuracy"]["value"] if "accuracy" in primary else None,
        "checkpoint_step": step,
        "quality": quality,
        **_described(config, tokenizer, data, folder),
    }
    serving = Serving(
        template=reward.template,
        max_tokens=reward.max_tokens,
        token_budget=reward.token_budget,
        over_long=reward.over_long,
        output=reward.output,
        mean=primary.get("reward_mean"),
        std=primary.get("reward_std"),
        merge_weights=config.merge_weights,
        dtype=reward.dtype,
        device_map=reward.device_map,
        runtime=reward.runtime,
        instances=reward.instances,
    )
    with export_place(config.reward_repository, reward.name) as (repository, claim):
        ref = export_version(
            model,
            tokenizer,
            repository=repository,
            name=reward.name,
            serving=serving,
            card=card,
            page=reward_page,
            claim=claim,
        )
    return replace(ref, repository=config.reward_repository)


def _trained_model(config: Config, folder: RunFolder, *, has_trained: bool) -> tuple[Any, Any, int]:
    """The plain model of the best checkpoint by validation, else of the last one; its tokenizer; its step."""
    from alignment.fitting import read_weights, validation_losses
    from alignment.reward_worker import trainable_model
    from models.adapters import load_trainable, merge_lora
    from models.checkpoints import best_checkpoint
    from models.reward_model import load_reward_model

    if not has_trained:
        source = reward_model_folder(config.reward.model, cache_folder(config))
        outputs = max(1, len(config.reward_training.attributes))
        return *load_reward_model(str(source), require_head=True, num_outputs=outputs), 0
    rewards = {step: -loss for step, loss in validation_losses(folder).items()}
    checkpoint = best_checkpoint(folder.checkpoints, rewards)
    assert checkpoint is not None  # training has just ended, or was at its end before
    model, tokenizer = trainable_model(config)
    load_trainable(model, read_weights(Path(checkpoint.uri)))
    return merge_lora(model) if config.reward_training.lora_rank else model, tokenizer, checkpoint.step


def _described(config: Config, tokenizer: Any, data: RewardData, folder: RunFolder) -> dict[str, Any]:
    """What a card says of settings, data and training."""
    from alignment.reward_measure import num_cut

    records = folder.read_metrics()
    sets = [("trained on", "train", data.train), *(("validated on", *item) for item in data.validation.items())]
    sets += [("measured on", *item) for item in data.measured.items()]
    return {
        "settings": config.reward_training.model_dump(mode="json"),
        "data": {
            "digest": data.digest,
            "sets": [
                {
                    "role": role,
                    "source": config.reward_training.train if name == "train" else name,
                    "examples": len(examples),
                    "left_out": data.left_out.get(name, {}),
                    "texts_cut": num_cut(config, tokenizer, examples),
                }
                for role, name, examples in sets
                if examples
            ],
        },
        "training": {
            "losses": [r["loss"] for r in records if r["kind"] == "step"],
            "validations": [
                {key: r[key] for key in ("step", "set", "loss", "accuracy")}
                for r in records
                if r["kind"] == "validation"
            ],
        },
    }


def _base_files(source: Path | str) -> dict[str, str]:
    """Name and sha256 of each file of a model folder; of a hub's model, its revision."""
    if not isinstance(source, Path):
        from transformers import AutoConfig

        return {source: str(AutoConfig.from_pretrained(source, trust_remote_code=False)._commit_hash)}
    return {path.name: sha256_file(path) for path in sorted(source.iterdir()) if path.is_file()}


def _external(config: Config, url: str) -> RewardModelRef:
    """A reference to the model behind `reward.url`, whose weights this run never sees."""
    with reward_client(config, url, config.reward.name, config.reward.version) as client:
        return RewardModelRef(config.reward.name, client.model_version, "", "", None)
