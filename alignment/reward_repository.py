"""Triton repositories in a folder or under s3://: found and exported in either, served from a local copy.

In S3 a version's number is claimed by an object that must not be there yet, and card.json is sent last: a version that
has one is whole. Copies go through the cache of downloaded models.
"""

import contextlib
import hashlib
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.config_sections import RunSection
from alignment.errors import ModelError, StorageConflict
from alignment.s3 import is_s3
from alignment.s3_objects import list_objects, read_bytes, write_bytes
from alignment.types import RewardModelRef

Claim = Callable[[Path], str]
"""Takes the next free number of a version, of the model's folder."""
SERVED_VERSIONS = 2
"""Versions of a name that an export's config.pbtxt lets a server hold."""


@contextlib.contextmanager
def local_repository(repository: str, versions: Sequence[tuple[str, str]], storage: RunSection) -> Iterator[Path]:
    """A folder that holds these (name, version) of a repository, for as long as the context lasts.

    Of one under s3:// it links to copies in the cache, which the weights' digest has been checked of; the self-test
    asks a server for the digest of what it serves from a folder.
    Raises ModelError for a version that is not there or damaged, StorageError.
    """
    from models.reward_export import check_files, read_version
    from models.tensor_shapes import tensor_shapes

    if not is_s3(repository):
        for name, version in dict.fromkeys(versions):
            if (folder := Path(repository, name, version)).is_dir():
                check_files(folder)
                tensor_shapes(folder / "weights")  # whole files; which weights they hold is for the self-test
        yield Path(repository)
        return
    from alignment.model_cache import cached_folder, forget_folder

    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="repository-")))
        for name, version in dict.fromkeys(versions):
            uri = f"{repository}/{name}/{version}"
            card = _card_bytes(repository, name, version)
            limit, digest = round(storage.cache_limit_gb * 1e9), hashlib.sha256(card).hexdigest()
            (place / name).mkdir(exist_ok=True)
            config = read_bytes(f"{repository}/{name}/config.pbtxt")
            if config is None:
                raise ModelError(
                    f"{repository}/{name}/config.pbtxt is missing: export a version again, which writes it"
                )
            (place / name / "config.pbtxt").write_bytes(config[0])
            link = place / name / version
            for is_last in (False, True):
                with contextlib.ExitStack() as one:
                    link.symlink_to(one.enter_context(cached_folder(uri, digest, limit)))
                    try:
                        read_version(place, name, version)
                        stack.enter_context(one.pop_all())
                        break
                    except ModelError:
                        if is_last:
                            raise
                link.unlink()
                forget_folder(uri, digest)  # the copy may be what is damaged: it is fetched anew, once
        yield place


def served_versions(repository: str, model: str | None, version: str | None) -> list[tuple[str, str]]:
    """What a server of a repository in S3 serves: the newest versions of `model`, or of all; or `version` alone."""
    names = {stored.uri.removeprefix(f"{repository}/").split("/")[0] for stored in list_objects(f"{repository}/")}
    return [
        (name, found)
        for name in sorted(names)
        if model in (None, name)
        for found in exported_versions(repository, name)[0 if version else -SERVED_VERSIONS :]
        if version in (None, found)
    ]


def exported_versions(repository: str, name: str) -> list[str]:
    """Exported versions of a model, oldest first."""
    if not is_s3(repository):
        from models.reward_export import complete_versions

        return complete_versions(Path(repository), name)
    parts = [_parts(stored.uri, repository, name) for stored in list_objects(f"{repository}/{name}/")]
    return sorted({p[0] for p in parts if len(p) == 2 and p[1] == "card.json" and _is_number(p[0])}, key=int)


def read_export(repository: str, name: str, version: str, storage: RunSection) -> RewardModelRef:
    """A version's reference, after its weights were found to match the digest on its card. Raises ModelError."""
    from models.reward_export import read_version

    with local_repository(repository, [(name, version)], storage) as local:
        return replace(read_version(local, name, version), repository=repository)


def find_export(repository: str, name: str, recipe_digest: str, storage: RunSection) -> RewardModelRef | None:
    """The newest version made by this recipe, verified; None where there is none. Raises ModelError."""
    from models.reward_export import find_version, parse_card

    if not is_s3(repository):
        return find_version(Path(repository), name, recipe_digest)
    for version in reversed(exported_versions(repository, name)):
        card = parse_card(_card_bytes(repository, name, version), f"{repository}/{name}/{version}")
        if card.get("recipe_digest") == recipe_digest:
            return read_export(repository, name, version, storage)
    return None


def card_of(ref: RewardModelRef) -> dict[str, Any]:
    """What the card of an exported version says. Raises ModelError."""
    from models.reward_export import parse_card, read_card

    if is_s3(ref.repository):
        uri = f"{ref.repository}/{ref.name}/{ref.version}"
        return parse_card(_card_bytes(ref.repository, ref.name, ref.version), uri)
    return read_card(Path(ref.repository) / ref.name / ref.version)


@contextlib.contextmanager
def export_place(repository: str, name: str) -> Iterator[tuple[Path, Claim | None]]:
    """Where to export a version of `name` to, and how to claim its number; in S3 it is sent at the end of the context.

    Raises StorageError.
    """
    if not is_s3(repository):
        yield Path(repository), None
        return
    from alignment.model_cache import scratch_folder
    from alignment.s3_folders import push_folder

    claimed: list[str] = []

    def claim(folder: Path) -> str:
        claimed.append(_claim_in_s3(repository, folder.name))
        return claimed[-1]

    with scratch_folder() as local:  # the place of temporary folders may be short of space
        config = read_bytes(f"{repository}/{name}/config.pbtxt")
        if config is not None:  # kept as it is, since users tune it
            (local / name).mkdir()
            (local / name / "config.pbtxt").write_bytes(config[0])
        yield local, claim
        with contextlib.suppress(StorageConflict):
            write_bytes(
                f"{repository}/{name}/config.pbtxt", (local / name / "config.pbtxt").read_bytes(), if_absent=True
            )
        for version in claimed:
            push_folder(local / name / version, f"{repository}/{name}/{version}", last=("card.json",))


def _claim_in_s3(repository: str, name: str) -> str:
    """The next number that nobody has; an abandoned claim skips one."""
    parts = [_parts(stored.uri, repository, name) for stored in list_objects(f"{repository}/{name}/")]
    taken = [int(word) for p in parts for word in p[:2] if _is_number(word)]
    number = max(taken, default=0) + 1
    while True:
        try:
            write_bytes(f"{repository}/{name}/.claims/{number}", uuid.uuid4().hex.encode(), if_absent=True)
            return str(number)
        except StorageConflict:
            number += 1


def _card_bytes(repository: str, name: str, version: str) -> bytes:
    found = read_bytes(f"{repository}/{name}/{version}/card.json")
    if found is None:
        known = ", ".join(exported_versions(repository, name)) or "none"
        raise ModelError(
            f"reward.version ({version}): {repository}/{name}/{version} is no whole version; versions there: {known}. "
            "`python flows/rs_flow.py run` exports one"
        )
    return found[0]


def _parts(uri: str, repository: str, name: str) -> list[str]:
    return uri.removeprefix(f"{repository}/{name}/").split("/")


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal()
