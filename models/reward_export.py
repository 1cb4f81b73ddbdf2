"""Versions of a reward model in a Triton repository: written whole, found again by recipe, verified by digest.

    <repository>/<name>/config.pbtxt            of the model: written once, then the user's to tune
    <repository>/<name>/.claims/<n>             an empty folder: number n is taken
    <repository>/<name>/<n>/model.py            what Triton runs
    <repository>/<name>/<n>/weights/            safetensors, config.json, tokenizer
    <repository>/<name>/<n>/model.onnx          the graph, where ONNX Runtime serves it
    <repository>/<name>/<n>/template.jinja      how a conversation becomes text
    <repository>/<name>/<n>/settings.json       lengths, output, placement: `Serving`
    <repository>/<name>/<n>/card.json           digest, accuracy, recipe digest, data counts

A version is built in a hidden folder and renamed into place, so that a server never sees half of one.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignment.atomic_files import disk_errors, settle_files, write_text
from alignment.errors import ConfigError, ModelError
from alignment.foreign_json import parse_object
from alignment.types import RewardModelRef
from models.onnx_export import ONNX_FILE, check_onnx, write_onnx
from models.quiet import quiet_transformers
from models.reward_model import render

TEMPLATE = Path(__file__).resolve().parent.parent / "triton_repo" / "reward_model"

ONE_PER_GPU = "{ kind: KIND_AUTO count: 1 }"
"""The template's instance group: one instance on each GPU, on the CPU where there is none."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a version is served. Written to settings.json, `template` and `instances` apart."""

    template: str
    """Jinja: how `messages` become the text that the model reads."""
    max_tokens: int
    """Longest conversation that the model reads, in tokens, special tokens included."""
    token_budget: int
    """Padded tokens of a micro-batch."""
    over_long: Literal["cut", "refuse"] = "cut"
    """A longer conversation loses the start of its prompt, or is refused; both are counted."""
    output: Literal["raw", "standardized"] = "raw"
    """Serve the reward r, or (r - mean) / std."""
    mean: float | None = None
    """Mean of r on held-out data."""
    std: float | None = None
    """Standard deviation of r there."""
    merge_weights: tuple[float, ...] = (1.0,)
    """r is the sum of the head's outputs, each times its weight. Shape: (A,)."""
    dtype: Literal["float32", "weights"] = "float32"
    """On GPUs: computed in float32, or in the type of the stored weights. A CPU computes in float32."""
    device_map: Literal["auto"] | None = None
    """None: an instance holds the whole model. "auto": one instance lays it over all GPUs."""
    runtime: Literal["torch", "onnxruntime"] = "torch"
    """What computes the forward pass; ONNX Runtime for encoders alone, in float32."""
    instances: int = 1
    """Copies on each GPU, or on the CPU where there is none. For config.pbtxt when a name is first exported."""


def export_version(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    repository: Path,
    name: str,
    serving: Serving,
    card: dict[str, Any],
    page: Callable[[Mapping[str, Any]], str] | None = None,
    claim: Callable[[Path], str] | None = None,
) -> RewardModelRef:
    """Write the model as the next free version and return its reference.

    `card` is stored with the digest added, and as `page` draws it; its `accuracy` (a share, or None) and
    `recipe_digest` are read back by `read_version` and `find_version`. Exporters that run side by side get different
    versions; `claim` says which, of the model's folder, where that is not up to the folder.

    Raises ConfigError for what the model cannot serve, DiskError when writing fails.
    """
    check_serving(serving, model.config, tokenizer)
    folder = repository / name
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_config(folder, name, serving)
        version = (claim or claim_version)(folder)
        build = folder / f".building-{version}"
        try:
            digest = _build(build, model, tokenizer, serving)
            whole = {**card, "name": name, "version": version, "digest": digest, "files": _file_digests(build)}
            _write_json(build / "card.json", whole)
            if page is not None:
                (build / "report.html").write_text(page(whole), encoding="utf-8")
            build.rename(folder / version)
        finally:
            shutil.rmtree(build, ignore_errors=True)
    return RewardModelRef(name, version, digest, str(repository), card.get("accuracy"))


def find_version(repository: Path, name: str, recipe_digest: str) -> RewardModelRef | None:
    """The newest version made by this recipe, verified; None where there is none. Raises ModelError."""
    for version in sorted(complete_versions(repository, name), key=int, reverse=True):
        if read_card(repository / name / version).get("recipe_digest") == recipe_digest:
            return read_version(repository, name, version)
    return None


def read_version(repository: Path, name: str, version: str) -> RewardModelRef:
    """A version's reference, after all its files were found to match the digests on its card. Raises ModelError.

    A version that was exported before cards listed files is checked for its weights and its graph alone.
    """
    folder = repository / name / version
    if not folder.is_dir():
        known = ", ".join(complete_versions(repository, name)) or "none"
        raise ModelError(
            f"reward.version ({version}): {folder} does not exist; versions there: {known}. "
            "`python flows/rs_flow.py run` exports one"
        )
    card = read_card(folder)
    digest = weights_digest(folder)
    if digest != card.get("digest"):
        raise ModelError(
            f"{folder} has the digest {digest}, its card.json says {card.get('digest')}: "
            f"the weights or the graph are damaged or were changed; delete {folder} and export again"
        )
    check_files(folder)
    return RewardModelRef(name, version, digest, str(repository), card.get("accuracy"))


def check_files(folder: Path) -> None:
    """Raise ModelError where a file of a version, weights and graph apart, is not what its card says. Milliseconds."""
    for file, expected in read_card(folder).get("files", {}).items():
        path = folder / file
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise ModelError(
                f"{path} is missing or not what card.json says: it is damaged or was changed; put it back from a copy, "
                f"or delete {folder} and export again"
            )


def complete_versions(repository: Path, name: str) -> list[str]:
    """Exported versions of a model, oldest first. The bare template, which has no weights, is none."""
    folder = repository / name
    if not folder.is_dir():
        return []
    found = (
        entry.name
        for entry in folder.iterdir()
        if entry.name.isascii() and entry.name.isdecimal() and (entry / "card.json").is_file()
    )
    return sorted(found, key=int)


def _build(build: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, serving: Serving) -> str:
    """Fill a version's folder, the card apart; returns the digest of its weights."""
    (build / "weights").mkdir(parents=True)
    with quiet_transformers():
        model.save_pretrained(build / "weights")
        tokenizer.save_pretrained(build / "weights")
    if serving.runtime == "onnxruntime":
        write_onnx(model, build / ONNX_FILE)
    shutil.copyfile(TEMPLATE / "1" / "model.py", build / "model.py")
    # Bytes, so that line ends inside the template stay as they are.
    (build / "template.jinja").write_bytes(serving.template.encode("utf-8"))
    elsewhere = ("template", "instances")
    _write_json(build / "settings.json", {k: v for k, v in asdict(serving).items() if k not in elsewhere})
    settle_files(build)
    return weights_digest(build)


def _file_digests(build: Path) -> dict[str, str]:
    """sha256 of all that a server reads of a version, but for the weights and the graph, which have a digest."""
    return {
        path.relative_to(build).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(build.rglob("*"))
        if path.is_file() and path.suffix not in (".safetensors", ".onnx")
    }


def claim_version(folder: Path) -> str:
    """Take the next number. mkdir is atomic, also on network file systems; an abandoned claim skips a number."""
    claims = folder / ".claims"
    claims.mkdir(exist_ok=True)
    taken = [
        int(e.name) for parent in (folder, claims) for e in parent.iterdir() if e.name.isascii() and e.name.isdecimal()
    ]
    number = max(taken, default=0) + 1
    while True:
        try:
            (claims / str(number)).mkdir()
            return str(number)
        except FileExistsError:
            number += 1


def _write_config(folder: Path, name: str, serving: Serving) -> None:
    """The template with the model's name and instances; a config that stands is kept, since users tune it."""
    if (folder / "config.pbtxt").exists():
        return
    text = (TEMPLATE / "config.pbtxt").read_text(encoding="utf-8")
    # KIND_MODEL leaves all GPUs to model.py.
    kind = "KIND_AUTO" if serving.device_map is None else "KIND_MODEL"
    for old, new in (
        ('name: "reward_model"', f'name: "{name}"'),
        (ONE_PER_GPU, f"{{ kind: {kind} count: {serving.instances} }}"),
    ):
        assert text.count(old) == 1, f"the template must hold {old} once"
        text = text.replace(old, new)
    write_text(folder / "config.pbtxt", text)


def weights_digest(version: Path) -> str:
    """sha256 over the safetensors files by name, then the graph if any; of one file, what `sha256sum` prints."""
    files = sorted((version / "weights").glob("*.safetensors"))
    if not files:
        raise ModelError(f"{version / 'weights'} holds no safetensors file; delete {version} and export again")
    files += version.glob(ONNX_FILE)
    sha = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


def read_card(folder: Path) -> dict[str, Any]:
    """What a version's card.json says. Raises ModelError."""
    try:
        data = (folder / "card.json").read_bytes()
    except OSError as error:
        raise ModelError(
            f"{folder / 'card.json'} cannot be read ({error}); delete {folder} and export again"
        ) from error
    return parse_card(data, str(folder))


def parse_card(data: bytes, folder: str) -> dict[str, Any]:
    """The card.json of the version in `folder`, a path or URI. Raises ModelError."""
    try:
        card = parse_object(data)
        accuracy = card.get("accuracy")
        if accuracy is not None and not (type(accuracy) in (int, float) and 0 <= accuracy <= 1):
            raise ValueError(f"its accuracy {accuracy!r:.20} is no share")
        if not str(card.get("digest")).isprintable():
            raise ValueError("its digest is none")
    except ValueError as error:
        raise ModelError(f"{folder}/card.json cannot be read ({error}); delete {folder} and export again") from error
    return card


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_serving(serving: Serving, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError, by key, for settings that a model with this config and tokenizer cannot be served by."""
    render(serving.template, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    check_length(config, tokenizer, serving.max_tokens)
    if len(serving.merge_weights) != config.num_labels:
        given = ", ".join(f"{weight:g}" for weight in serving.merge_weights)
        raise ConfigError(
            f"reward_training.merge_weights ({given}) must be one weight for each of the model's outputs, "
            f"which are {config.num_labels}"
        )
    if serving.output == "standardized":
        for key, value in (("mean", serving.mean), ("std", serving.std)):
            if value is None or not math.isfinite(value) or (key == "std" and value <= 0):
                raise ConfigError(
                    f"reward.output (standardized) cannot serve with the held-out {key} {value}: give held-out data "
                    "on which rewards differ, or set reward.output to raw"
                )
    if serving.device_map and serving.instances != 1:
        raise ConfigError(
            f"reward.instances ({serving.instances}) must be 1 with reward.device_map ({serving.device_map}): "
            "one instance takes all GPUs"
        )
    if serving.runtime == "onnxruntime":
        if serving.device_map:
            raise ConfigError(
                f"reward.runtime (onnxruntime) cannot be laid over GPUs by reward.device_map ({serving.device_map}): "
                "set reward.runtime to torch"
            )
        check_onnx(config)
    if serving.instances < 1:
        raise ConfigError(f"reward.instances ({serving.instances}) must be >= 1")


def check_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
    """`max_tokens` must fit the model's positions. Raises ConfigError."""
    longest = min(getattr(config, "max_position_embeddings", max_tokens), tokenizer.model_max_length)
    if max_tokens > longest:
        raise ConfigError(f"reward.max_tokens ({max_tokens}) must be <= {longest}, the longest text this model reads")
