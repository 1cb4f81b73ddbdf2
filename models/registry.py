"""The registry of a run root: names and versions of policies and reward models, aliases, and what made them.

    python -m models.registry list
    python -m models.registry show policy@promoted
    python -m models.registry promote policy:3                    --alias NAME for another than promoted
    python -m models.registry fetch policy@promoted --to DIR      a Hugging Face folder
    python -m models.registry fetch reward_model --to DIR         for python -m infra.triton --repository DIR

    <root>/registry/<name>/<version>.json       an entry, written once: kind, where the model lies, its digest, lineage
    <root>/registry/<name>/aliases/<alias>      the version that an alias means
    <root>/registry/<name>/promotions/<run>     what a run has moved an alias to, and from (models/promotions.py)

Every finished run of flows/rs_flow.py registers the policy that it evaluated, as `policy`, and the reward model that
it scored with, by its name. Nothing is copied: an entry says where a model lies, in a folder or under s3://. Without a
version `latest` is meant, the newest; `promoted` is whatever was promoted last, by hand or by a run with
`promotion.alias=promoted` whose policy passed its gate.
`--set policy.model=registry:NAME@ALIAS` aligns what is registered.
"""

import argparse
import datetime
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter

from alignment.atomic_files import disk_errors
from alignment.errors import AlignmentError, ConfigError, ModelError, StorageConflict
from alignment.foreign_json import parse_object
from models.registry_store import copy_folder, list_names, move_alias, place_of, read_alias, read_file, write_new

if TYPE_CHECKING:
    from alignment.config import Config
    from alignment.types import Checkpoint

PREFIX = "registry:"
"""What a config's value begins with that names something registered."""
LATEST, PROMOTED = "latest", "promoted"
POLICY = "policy"
"""Name of the policies that runs register."""
READERS = 8
"""Entries that are read at a time."""
_NAME = re.compile(r"(?P<name>[A-Za-z0-9_-]+)(:(?P<version>[0-9]+)|@(?P<alias>[a-z]+))?")


@dataclass(frozen=True, slots=True)
class Entry:
    """A registered model: `uri` is a checkpoint's folder, or a version's in a Triton repository."""

    name: str
    version: int
    kind: Literal["policy", "reward_model"]
    uri: str
    sha256: str
    """Of the weights, as the checkpoint's manifest or the version's card has it."""
    created: str
    run_id: str
    lineage: dict[str, Any]
    """What made it: run, RS step, base, reward model."""


def register(
    root: str, name: str, kind: Literal["policy", "reward_model"], uri: str, sha256: str, run_id: str, **lineage: Any
) -> Entry:
    """The entry of a model in the registry of a run root: a new version, unless the same one is there already.

    Raises DiskError, StorageError.
    """
    known = entries(root, name)
    for entry in known:
        if (entry.uri, entry.sha256) == (uri, sha256):
            return entry
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    version = max(versions(root, name), default=0) + 1
    while True:
        entry = Entry(name, version, kind, uri, sha256, created, run_id, lineage)
        try:
            write_new(place_of(root, name, f"{version}.json"), json.dumps(asdict(entry), indent=2).encode())
            return entry
        except StorageConflict:
            version += 1


def register_result(config: "Config", run_path: str, reward: Mapping[str, Any], checkpoint: "Checkpoint") -> Entry:
    """What a finished run leaves: the evaluated policy, whose entry is returned, and the reward model unless an
    external server has it.
    """
    run_id, root = run_path.rstrip("/").rpartition("/")[2], config.run.root
    named = {key: reward[key] for key in ("name", "version", "digest")}
    lineage = {"run": run_path, "step": checkpoint.step, "base": config.policy.model, "reward_model": named}
    found = [register(root, POLICY, "policy", checkpoint.uri, checkpoint.sha256, run_id, **lineage)]
    if reward["repository"]:
        uri = f"{reward['repository']}/{reward['name']}/{reward['version']}"
        lineage = {"run": run_path, "base": config.reward.model, "accuracy": reward["accuracy"]}
        found.append(register(root, reward["name"], "reward_model", uri, reward["digest"], run_id, **lineage))
    print("registered " + " and ".join(f"{entry.name}:{entry.version}" for entry in found))
    return found[0]


def names(root: str) -> list[str]:
    """The names of a registry."""
    return sorted({name.split("/")[0] for name in list_names(root)})


def versions(root: str, name: str) -> list[int]:
    """The numbers of a name's versions, rising."""
    found = (re.fullmatch(rf"{re.escape(name)}/(\d+)\.json", path) for path in list_names(root))
    return sorted(int(match[1]) for match in found if match)


def entries(root: str, name: str) -> list[Entry]:
    """The versions of a name, oldest first; one that cannot be read is left out, and named on stderr."""

    def read(version: int) -> Entry | None:
        try:
            return _read_entry(root, name, version)
        except ModelError as error:
            print(error, file=sys.stderr, flush=True)
            return None

    with ThreadPoolExecutor(READERS) as pool:
        return [entry for entry in pool.map(read, versions(root, name)) if entry]


def aliases(root: str, name: str) -> dict[str, int]:
    """The version that each alias of a name means."""
    known = versions(root, name)
    matches = (re.fullmatch(rf"{re.escape(name)}/aliases/([a-z]+)", path) for path in sorted(list_names(root)))
    given = {match[1]: read_alias(place_of(root, name, "aliases", match[1]))[0] for match in matches if match}
    return ({LATEST: known[-1]} if known else {}) | {alias: version for alias, version in given.items() if version}


def find(root: str, text: str, *, key: str = "NAME") -> Entry:
    """What NAME, NAME:VERSION or NAME@ALIAS means; `key` is what errors call it. Raises ConfigError, ModelError."""
    match = _NAME.fullmatch(text)
    if match is None:
        raise ConfigError(f"{key} ({text}): expected NAME, NAME:VERSION or NAME@ALIAS")
    name, version, alias = match["name"], match["version"], match["alias"] or LATEST
    known = versions(root, name)
    meant = int(version) if version else aliases(root, name).get(alias)
    if meant is None or meant not in known:
        there = ", ".join(map(str, known)) or "none"
        raise ConfigError(
            f"{key} ({text}): the registry of {root} has no such model; versions of {name}: {there}. "
            "`python -m models.registry list` shows all, `promote` sets the alias promoted"
        )
    return _read_entry(root, name, meant)


def located(root: str, value: str, *, key: str) -> str:
    """Where the policy lies that a config names by registry:NAME….

    Raises ConfigError, ModelError where other weights lie there now than were registered.
    """
    entry = find(root, value.removeprefix(PREFIX), key=key)
    if entry.kind != "policy":
        raise ConfigError(f"{key} ({value}): {entry.name}:{entry.version} is a {entry.kind}: name a policy")
    manifest = read_file(f"{entry.uri}/manifest.json")
    if manifest is not None:
        try:
            _compare(entry, str(parse_object(manifest).get("weights_sha256")))
        except ValueError as error:
            raise ModelError(f"{entry.uri}/manifest.json cannot be read: {error}") from error
    elif Path(entry.uri).is_dir():
        _compare(entry, _digest(entry, Path(entry.uri)))
    return entry.uri


def promote(root: str, text: str, alias: str = PROMOTED) -> tuple[Entry, int | None]:
    """Let `alias` mean NAME:VERSION; returns its entry and the version that it meant before.

    Raises ConfigError, StorageConflict where another one promotes at the same time.
    """
    if not re.fullmatch("[a-z]+", alias) or alias == LATEST:
        raise ConfigError(f"--alias ({alias}): lower-case letters, and not {LATEST}, which is the newest version")
    entry = find(root, text)
    place = place_of(root, entry.name, "aliases", alias)
    before, token = read_alias(place)
    if before != entry.version:
        move_alias(place, entry.version, token)
    return entry, before


def fetch(root: str, text: str, folder: Path) -> Entry:
    """A copy of a registered model: a policy as a Hugging Face folder, a reward model as a Triton repository.

    Raises ConfigError where the folder is there already, ModelError where what arrives is not what was registered.
    """
    entry = find(root, text)
    if folder.exists():
        raise ConfigError(f"--to ({folder}) is there already: name a folder that is not, or move it away")
    staging = folder.with_name(f".{folder.name}.fetched-{entry.name}-{entry.version}-{entry.sha256[:12]}")
    target, on_note = staging, lambda text: print(text, file=sys.stderr, flush=True)
    with disk_errors(folder):
        if entry.kind == "reward_model":
            *_, name, version = entry.uri.split("/")
            target = staging / name / version
        copy_folder(entry.uri, target, on_note, last=("DONE", "card.json"))
        if entry.kind == "reward_model":
            place = f"{entry.uri.rpartition('/')[0]}/config.pbtxt"
            config = read_file(place)
            if config is None:
                raise ModelError(f"{place} is there no longer: export a version again, which writes it")
            (target.parent / "config.pbtxt").write_bytes(config)
        try:
            _compare(entry, _digest(entry, target))
        except AlignmentError:
            shutil.rmtree(staging)  # else the next fetch would find it
            raise
        staging.rename(folder)
    return entry


def _compare(entry: Entry, found: str) -> None:
    if found != entry.sha256:
        raise ModelError(f"{entry.uri} has the digest {found}, and {entry.sha256} was registered: it is not that model")


def _digest(entry: Entry, folder: Path) -> str:
    from models.checkpoints import folder_digest
    from models.reward_export import weights_digest

    return folder_digest(folder) if entry.kind == "policy" else weights_digest(folder)


def _read_entry(root: str, name: str, version: int) -> Entry:
    place = place_of(root, name, f"{version}.json")
    try:
        values = parse_object(read_file(place) or b"")
        # As JSON, of which a strict reading takes an object for a dataclass.
        found: Entry = TypeAdapter(Entry).validate_json(json.dumps(values), strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{place} is no entry of a registry ({reason}): remove it") from error
    parts = found.uri.split("/")
    *_, model, number = ["", *parts]
    is_model = found.kind == "policy" or (re.fullmatch(r"[A-Za-z0-9_-]+", model) and re.fullmatch(r"[0-9]+", number))
    is_model = is_model and re.fullmatch(r"[0-9A-Za-z]{1,64}", found.sha256)
    if (found.name, found.version) != (name, version) or ".." in parts or not is_model:
        reason = f"it is {found.name!r}:{found.version}, {found.sha256!r} at {found.uri!r}"
        raise ModelError(f"{place} is no entry of a registry ({reason}): remove it")
    return found


def _lines(root: str) -> Iterator[str]:
    for name in names(root):
        meant = aliases(root, name)
        for entry in entries(root, name):
            marks = "".join(f" @{alias}" for alias, version in meant.items() if version == entry.version)
            made = f"{entry.kind}, run {entry.run_id}, {entry.created}, sha256 {entry.sha256[:12]}"
            yield f"{name}:{entry.version}{marks}  {made}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0, or 1 where a name is unknown or a model cannot be fetched."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "list":
            print(*(list(_lines(options.root)) or [f"nothing is registered yet in {options.root}"]), sep="\n")
        elif options.command == "show":
            print(json.dumps(asdict(find(options.root, options.name)), indent=2))
        elif options.command == "promote":
            entry, before = promote(options.root, options.name, options.alias)
            was = f", before {entry.name}:{before}" if before else ""
            print(f"{entry.name}@{options.alias} is {entry.name}:{entry.version}{was}")
        else:
            entry = fetch(options.root, options.name, Path(options.to).absolute())
            print(f"{entry.name}:{entry.version} is in {options.to}, sha256 {entry.sha256[:12]} as registered")
    except AlignmentError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.registry", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="runs", help="run root, a folder or s3://bucket/prefix")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="all names and versions")
    meant = "NAME, NAME:VERSION or NAME@ALIAS"
    for command, text in (
        ("show", "an entry, JSON"),
        ("promote", "let an alias mean a version"),
        ("fetch", "copy a model, verified by its digest"),
    ):
        sub = commands.add_parser(command, help=text)
        sub.add_argument("name", help=meant)
        if command == "promote":
            sub.add_argument("--alias", default=PROMOTED, help="lower-case letters")
        if command == "fetch":
            sub.add_argument("--to", required=True, help="folder that is not there yet")
    return parser


if __name__ == "__main__":
    sys.exit(main())
