"""A policy as a version of a Triton repository: a prompt in, a response out.

    python -m models.policy_export runs/latest --repository policies
    python -m infra.triton --repository policies

    <repository>/<name>/config.pbtxt            of the model: written once, then the user's to tune
    <repository>/<name>/<n>/model.py            what Triton runs
    <repository>/<name>/<n>/weights/            safetensors, config.json, tokenizer: a plain Hugging Face folder
    <repository>/<name>/<n>/template.jinja      how a prompt or a conversation becomes text
    <repository>/<name>/<n>/settings.json       lengths, ending tokens
    <repository>/<name>/<n>/card.json           digest, and what was exported

The policy is a run (its best checkpoint by validation), a checkpoint, `smollm2-135m`, a model folder or a hub name.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.atomic_files import disk_errors, settle_files, write_text
from alignment.errors import AlignmentError, ConfigError

if TYPE_CHECKING:
    from models.policy import Policy

TEMPLATE = Path(__file__).resolve().parent.parent / "triton_repo" / "policy"
TEXT_TEMPLATE = (
    "{% if messages | length > 1 %}{{ raise_exception('this policy continues one text, send one message') }}{% endif %}"
    "{{ messages[0].content }}"
)
"""Of a policy that continues a text: the text itself."""
NO_CONTEXT = 1 << 30
"""Stands for the context of a model that names none, in tokens."""


def export_policy(
    policy: "Policy",
    *,
    repository: Path,
    name: str,
    max_new_tokens: int,
    card: dict[str, Any],
    claim: Callable[[Path], str] | None = None,
) -> tuple[str, str]:
    """Write the policy as the next free version; returns the version and the digest of its weights.

    `max_new_tokens` is the longest response that a request may ask for, and what one gets that does not say. `card`
    is stored with name, version and digest added; `claim` gives the number, of the model's folder, where that is not
    up to the folder. Raises ConfigError where `name` is another kind of model's or `max_new_tokens` leaves no room for
    a prompt or an answer, DiskError when writing fails.
    """
    from models.reward_export import claim_version, weights_digest

    context = policy.reader.context or NO_CONTEXT
    if not 1 <= max_new_tokens < context:
        raise ConfigError(
            f"--max-new-tokens ({max_new_tokens}) must be at least 1 and < the policy's context of {context} tokens: "
            "give the longest response that a request may ask for"
        )
    folder = repository / name
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_config(folder, name)
        version = (claim or claim_version)(folder)
        build = folder / f".building-{version}"
        try:
            _build(build, policy, {"max_new_tokens": max_new_tokens, "context": context})
            settle_files(build)
            digest = weights_digest(build)
            write_text(build / "card.json", _json({**card, "name": name, "version": version, "digest": digest}))
            build.rename(folder / version)
        finally:
            shutil.rmtree(build, ignore_errors=True)
    return version, digest


def _build(build: Path, policy: "Policy", lengths: dict[str, int]) -> None:
    from models.quiet import quiet_transformers

    (build / "weights").mkdir(parents=True)
    with quiet_transformers():
        policy.model.save_pretrained(build / "weights")
        policy.reader.tokenizer.save_pretrained(build / "weights")
    shutil.copyfile(TEMPLATE / "1" / "model.py", build / "model.py")
    is_text = policy.reader.prompt_format == "text"
    template = TEXT_TEMPLATE if is_text else str(policy.reader.tokenizer.chat_template)
    # Bytes, so that line ends inside the template stay as they are.
    (build / "template.jinja").write_bytes(template.encode("utf-8"))
    # A chat template brings its own special tokens.
    settings = {**lengths, "add_special_tokens": is_text, "eos_ids": list(policy.eos_ids)}
    (build / "settings.json").write_text(_json(settings), encoding="utf-8")


def _write_config(folder: Path, name: str) -> None:
    """The template with the model's name; a config that stands is kept, since users tune it. Raises ConfigError."""
    own = folder / "config.pbtxt"
    if not own.exists():
        text, line = (TEMPLATE / "config.pbtxt").read_text(encoding="utf-8"), 'name: "policy"'
        assert text.count(line) == 1, f"the template must hold {line} once"
        write_text(own, text.replace(line, f'name: "{name}"'))
    elif 'name: "prompt"' not in own.read_text(encoding="utf-8"):
        raise ConfigError(f"--name ({name}): {folder} holds another kind of model: give another name")


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 when a version was written, 1 when it could not be."""
    options = _parser().parse_args(arguments)
    # DeepSpeed, which transformers imports, would otherwise look for an accelerator and warn that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        print(_export(options))
    except AlignmentError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _export(options: argparse.Namespace) -> str:
    from alignment.policy_source import find_policy, prompt_format_of
    from alignment.reward_repository import export_place
    from alignment.s3 import is_s3
    from alignment.workspace import child
    from models.policy import load_policy

    source = find_policy(options.policy, root=options.root, key="the policy", on_note=print)
    form = prompt_format_of(source, options.prompt_format)
    policy = load_policy(source.folder, prompt_format=form, dtype="as_stored")
    with export_place(options.repository.rstrip("/"), options.name) as (repository, claim):
        version, digest = export_policy(
            policy,
            repository=repository,
            name=options.name,
            max_new_tokens=options.max_new_tokens,
            card={"source": source.checkpoint.uri, "source_sha256": source.checkpoint.sha256, "prompt_format": form},
            claim=claim,
        )
    folder = child(options.repository, options.name, version)
    lines = [
        f"exported {source.checkpoint.uri} as {folder} (prompts are read as {form}, sha256 {digest[:12]}…)",
        f"serve it:  python -m infra.triton --repository {options.repository}",
    ]
    return "\n".join([*lines, *(() if is_s3(folder) else (f"or:        vllm serve {folder}/weights",))])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.policy_export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", help="run, checkpoint, `smollm2-135m`, model folder or hub name; s3:// too")
    parser.add_argument("--repository", required=True, help="Triton model repository to write into, s3:// too")
    parser.add_argument("--name", default="policy", type=_name, help="name of the model there")
    parser.add_argument("--prompt-format", choices=("text", "chat"), help="how prompts are read; else as trained")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest response, in tokens")
    parser.add_argument("--root", default="runs", help="run root, for runs that are named by their id")
    return parser


def _name(text: str) -> str:
    if not text.replace("_", "").replace("-", "").isalnum() or not text.isascii():
        raise argparse.ArgumentTypeError(f"{text!r} must be letters, digits, '_' and '-'")
    return text


if __name__ == "__main__":
    sys.exit(main())
