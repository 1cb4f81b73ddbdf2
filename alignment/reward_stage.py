"""The reward model and the judge of a run: trained, measured, exported; reused where the same recipe made one."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignment.config import Config
from alignment.embedded import reward_model_folder
from alignment.errors import ConfigError
from alignment.launch import SOURCE_ROOT
from alignment.preferences import read_pairs
from alignment.preparation import cache_folder
from alignment.types import JudgeRef, Message, PreferencePair, RewardModelRef
from models.checkpoints import sha256_file

SERVED_CODE = SOURCE_ROOT / "triton_repo" / "reward_model" / "1" / "model.py"

Note = Callable[[str], None]


def prepare_reward_model(config: Config, on_note: Note) -> RewardModelRef:
    """The version that will score: an external server's, one that this recipe exported before, or a new one."""
    from models.reward_export import find_version, read_version

    reward = config.reward
    if reward.url:
        return _external(config)
    if reward.version:
        on_note(f"reward model: version {reward.version} scores, with the template and lengths of its export")
        return read_version(config.reward_repository, reward.name, reward.version)
    data = PairTexts(*(_texts(config, source, limit) for source, limit in _sources(config)))
    recipe = recipe_digest(config, data)
    found = find_version(config.reward_repository, reward.name, recipe)
    if found:
        on_note(
            f"reward model: version {found.version} of {found.name} was made by this recipe, accuracy {found.accuracy}"
        )
        return found
    return _train_and_export(config, data, recipe, on_note)


@dataclass(frozen=True, slots=True)
class Texts:
    """The pairs of one source as the reward model reads them, and what was left out by reason."""

    chosen: list[str]
    rejected: list[str]
    left_out: dict[str, int]


@dataclass(frozen=True, slots=True)
class PairTexts:
    """Training and held-out texts; None where the config names no source."""

    train: Texts | None
    held_out: Texts | None


def recipe_digest(config: Config, data: PairTexts) -> str:
    """sha256 of what makes an export: settings, the base's files, the texts it learns from, the served code."""
    serving = {"name", "repository", "url", "version", "grpc_port", "timeout_s", "patience_s"}
    values = config.reward.model_dump(mode="json", exclude=serving)
    recipe = [
        values,
        config.seed,
        _base_files(reward_model_folder(config.reward.model, cache_folder(config))),
        sha256_file(SERVED_CODE),
        *(asdict(texts) if texts else None for texts in (data.train, data.held_out)),
    ]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _base_files(source: Path | str) -> dict[str, str]:
    """Name and sha256 of each file of a model folder; of a hub's model, its revision."""
    if not isinstance(source, Path):
        from transformers import AutoConfig

        return {source: str(AutoConfig.from_pretrained(source)._commit_hash)}
    return {path.name: sha256_file(path) for path in sorted(source.iterdir()) if path.is_file()}


def _train_and_export(config: Config, data: PairTexts, recipe: str, on_note: Note) -> RewardModelRef:
    import torch

    from models.memory import keep_freed_memory
    from models.reward_export import export_version
    from models.reward_model import load_reward_model, pairwise_accuracy, train_reward_model

    reward = config.reward
    torch.set_num_threads(config.resources.threads)
    keep_freed_memory()
    folder = reward_model_folder(reward.model, cache_folder(config))
    model, tokenizer = load_reward_model(str(folder), seed=config.seed, require_head=not data.train)
    model = model.to(torch.device("cuda" if config.resources.gpu else "cpu"))  # type: ignore[arg-type]
    card: dict[str, Any] = {"recipe_digest": recipe, "base": reward.model}
    if data.train:
        card["train_pairs"] = _described(reward.train_pairs, data.train)
        card["losses"] = train_reward_model(
            model,
            tokenizer,
            data.train.chosen,
            data.train.rejected,
            lr=reward.lr,
            batch_size=reward.batch_size,
            epochs=reward.epochs,
            max_tokens=reward.max_tokens,
            seed=config.seed,
            on_step=_every_eighth(on_note),
        )
    if data.held_out:
        card["held_out_pairs"] = _described(reward.held_out_pairs, data.held_out)
        card["accuracy"] = pairwise_accuracy(
            model, tokenizer, data.held_out.chosen, data.held_out.rejected, max_tokens=reward.max_tokens
        )
    ref = export_version(
        model,
        tokenizer,
        repository=config.reward_repository,
        name=reward.name,
        template=reward.template,
        max_tokens=reward.max_tokens,
        token_budget=reward.token_budget,
        card=card,
    )
    on_note(f"reward model: exported version {ref.version} to {ref.repository}, held-out accuracy {ref.accuracy}")
    return ref


def prepare_judge(config: Config, folder: Path, on_note: Note) -> JudgeRef:
    """Train the judge, measure it, save it in the run folder."""
    from models.judge import pairwise_accuracy, train_judge

    judge, cache = config.judge, cache_folder(config)
    pairs, _ = read_pairs(judge.train_pairs, cache, limit=judge.num_train_pairs)
    held_out, _ = read_pairs(judge.held_out_pairs, cache, limit=config.reward.num_held_out_pairs)
    trained = train_judge(_plain(pairs, "chosen"), _plain(pairs, "rejected"), seed=config.seed)
    accuracy = pairwise_accuracy(trained, _plain(held_out, "chosen"), _plain(held_out, "rejected"))
    trained.save(folder)
    on_note(f"judge: trained on {len(pairs)} pairs of {judge.train_pairs}, held-out accuracy {accuracy:.3f}")
    name = f"n-gram judge trained on {judge.train_pairs}"
    return JudgeRef(name=name, uri=str(folder), accuracy=accuracy, details={"held_out": judge.held_out_pairs})


def _external(config: Config) -> RewardModelRef:
    """A reference to the model behind `reward.url`, whose weights this run never sees."""
    from alignment.task import reward_client

    reward = config.reward
    if reward.url is None:
        raise ConfigError("reward.url is not set")
    with reward_client(config, reward.url, reward.version) as client:
        return RewardModelRef(reward.name, client.model_version, "", "", None)


def _sources(config: Config) -> list[tuple[str | None, int]]:
    reward = config.reward
    return [(reward.train_pairs, reward.num_train_pairs), (reward.held_out_pairs, reward.num_held_out_pairs)]


def _texts(config: Config, source: str | None, limit: int) -> Texts | None:
    """The first `limit` pairs of a source as the reward model reads them."""
    from models.reward_model import render

    if source is None:
        return None
    pairs, counts = read_pairs(source, cache_folder(config), limit=limit)
    template = config.reward.template
    return Texts(
        [render(template, [*p.prompt, _answer(p.chosen)]) for p in pairs],
        [render(template, [*p.prompt, _answer(p.rejected)]) for p in pairs],
        {str(reason): count for reason, count in counts.items()},
    )


def _described(source: str | None, texts: Texts) -> dict[str, Any]:
    return {"source": source, "used": len(texts.chosen), "left_out": texts.left_out}


def _plain(pairs: Sequence[PreferencePair], side: str) -> list[str]:
    from models.judge import judge_text

    return [judge_text([*p.prompt, _answer(getattr(p, side))]) for p in pairs]


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _every_eighth(on_note: Note) -> Callable[[int, int, float], None]:
    def report(done: int, total: int, loss: float) -> None:
        if done % max(1, total // 8) == 0:
            on_note(f"reward model: step {done}/{total}, loss {loss:.3f}")

    return report
