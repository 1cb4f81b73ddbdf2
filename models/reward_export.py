"""Versions of a reward model in a Triton repository: written whole, found again by recipe, verified by digest.

    <repository>/<name>/config.pbtxt            of the model: written once, then the user's to tune
    <repository>/<name>/.claims/<n>             an empty folder: number n is taken
    <repository>/<name>/<n>/model.py            what Triton runs
    <repository>/<name>/<n>/weights/            safetensors, config.json, tokenizer
    <repository>/<name>/<n>/template.jinja      how a conversation becomes text
    <repository>/<name>/<n>/settings.json       max_tokens, token_budget
    <repository>/<name>/<n>/card.json           digest, accuracy, recipe digest, data counts

A version is built in a hidden folder and renamed into place, so that a server never sees half of one.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignment.atomic_files import disk_errors, settle_files, write_text
from alignment.errors import ConfigError, ModelError
from alignment.types import RewardModelRef
from models.quiet import quiet_transformers
from models.reward_model import render

TEMPLATE = Path(__file__).resolve().parent.parent / "triton_repo" / "reward_model"


def export_version(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    repository: Path,
    name: str,
    template: str,
    max_tokens: int,
    token_budget: int,
    card: dict[str, Any],
) -> RewardModelRef:
    """Write the model as the next free version and return its reference.

    `card` is stored with the digest added; its `accuracy` (a share, or None) and `recipe_digest` are read back
    by `read_version` and `find_version`. Exporters that run side by side get different versions.

    Raises ConfigError for a template or length that the model cannot serve, DiskError when writing fails.
    """
    render(template, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    check_length(model.config, tokenizer, max_tokens)
    folder = repository / name
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_config(folder, name)
        version = _claim(folder)
        build = folder / f".building-{version}"
        try:
            digest = _build(build, model, tokenizer, template, max_tokens, token_budget)
            _write_json(build / "card.json", {**card, "name": name, "version": version, "digest": digest})
            build.rename(folder / version)
        finally:
            shutil.rmtree(build, ignore_errors=True)
    return RewardModelRef(name, version, digest, str(repository), card.get("accuracy"))


def find_version(repository: Path, name: str, recipe_digest: str) -> RewardModelRef | None:
    """The newest version made by this recipe, verified; None where there is none. Raises ModelError."""
    for version in sorted(complete_versions(repository, name), key=int, reverse=True):
        if _read_card(repository / name / version).get("recipe_digest") == recipe_digest:
            return read_version(repository, name, version)
    return None


def read_version(repository: Path, name: str, version: str) -> RewardModelRef:
    """A version's reference, after its weights were found to match the digest on its card. Raises ModelError."""
    folder = repository / name / version
    if not folder.is_dir():
        known = ", ".join(complete_versions(repository, name)) or "none"
        raise ModelError(
            f"reward.version ({version}): {folder} does not exist; versions there: {known}. "
            "`python flows/rs_flow.py run` exports one"
        )
    card = _read_card(folder)
    digest = _digest(folder / "weights")
    if digest != card.get("digest"):
        raise ModelError(
            f"{folder / 'weights'} has the digest {digest}, its card.json says {card.get('digest')}: "
            f"the weights are damaged or were changed; delete {folder} and export again"
        )
    return RewardModelRef(name, version, digest, str(repository), card.get("accuracy"))


def complete_versions(repository: Path, name: str) -> list[str]:
    """Exported versions of a model, oldest first. The bare template, which has no weights, is none."""
    folder = repository / name
    if not folder.is_dir():
        return []
    found = (entry.name for entry in folder.iterdir() if entry.name.isdigit() and (entry / "card.json").is_file())
    return sorted(found, key=int)


def _build(
    build: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_tokens: int,
    token_budget: int,
) -> str:
    """Fill a version's folder, the card apart; returns the digest of its weights."""
    (build / "weights").mkdir(parents=True)
    with quiet_transformers():
        model.save_pretrained(build / "weights")
        tokenizer.save_pretrained(build / "weights")
    shutil.copyfile(TEMPLATE / "1" / "model.py", build / "model.py")
    # Bytes, so that line ends inside the template stay as they are.
    (build / "template.jinja").write_bytes(template.encode("utf-8"))
    _write_json(build / "settings.json", {"max_tokens": max_tokens, "token_budget": token_budget})
    settle_files(build)
    return _digest(build / "weights")


def _claim(folder: Path) -> str:
    """Take the next number. mkdir is atomic, also on network file systems; an abandoned claim skips a number."""
    claims = folder / ".claims"
    claims.mkdir(exist_ok=True)
    taken = [int(e.name) for parent in (folder, claims) for e in parent.iterdir() if e.name.isdigit()]
    number = max(taken, default=0) + 1
    while True:
        try:
            (claims / str(number)).mkdir()
            return str(number)
        except FileExistsError:
            number += 1


def _write_config(folder: Path, name: str) -> None:
    """Copy config.pbtxt with the model's name; one that stands is kept, since users tune it."""
    if (folder / "config.pbtxt").exists():
        return
    text = (TEMPLATE / "config.pbtxt").read_text(encoding="utf-8")
    write_text(folder / "config.pbtxt", text.replace('name: "reward_model"', f'name: "{name}"', 1))


def _digest(weights: Path) -> str:
    """sha256 over the safetensors files in the order of their names; of one file, what `sha256sum` prints."""
    files = sorted(weights.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{weights} holds no safetensors file; delete {weights.parent} and export again")
    sha = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


def _read_card(folder: Path) -> dict[str, Any]:
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder / 'card.json'} cannot be read ({error}); delete {folder} and export again"
        ) from error
    if not isinstance(card, dict):
        raise ModelError(f"{folder / 'card.json'} is not a JSON object; delete {folder} and export again")
    return card


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
    """`max_tokens` must fit the model's positions. Raises ConfigError."""
    longest = min(getattr(config, "max_position_embeddings", max_tokens), tokenizer.model_max_length)
    if max_tokens > longest:
        raise ConfigError(f"reward.max_tokens ({max_tokens}) must be <= {longest}, the longest text this model reads")
