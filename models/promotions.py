"""A promoted run's alias in the registry, moved once: a resume must not move it again once it means something newer.

    <root>/registry/<name>/promotions/<run id>      JSON: alias, version, and before, the version that it meant

The file is written before the alias is moved. Whoever resumes the run finds it, and moves the alias only where it still
means what it meant before.
"""

import json

from alignment.errors import StorageConflict
from models.registry import Entry
from models.registry_store import move_alias, place_of, read_alias, read_file, write_new


def promote_once(root: str, entry: Entry, alias: str, run_id: str) -> str:
    """Let `alias` mean the entry for the run `run_id`, unless it has done so before; returns a line on what it means.

    Raises DiskError, ModelError, StorageError.
    """
    place = place_of(root, entry.name, "aliases", alias)
    now, token = read_alias(place)
    intended = _intended(root, entry, alias, run_id, now)
    name = f"{entry.name}@{alias}"
    moved_since = now not in (entry.version, intended)
    if not moved_since and now != entry.version:
        try:
            move_alias(place, entry.version, token)
        except StorageConflict:
            moved_since = True
    if moved_since:
        return (
            f"{name} was moved by somebody else since this run promoted {entry.name}:{entry.version}, and stays: "
            f"`python -m models.registry --root {root} promote {entry.name}:{entry.version} --alias {alias}` moves it"
        )
    was = f", before {entry.name}:{intended}" if intended not in (None, entry.version) else ""
    return f"{name} is {entry.name}:{entry.version}{was}"


def _intended(root: str, entry: Entry, alias: str, run_id: str, now: int | None) -> int | None:
    """The version that the alias meant when this run first promoted the entry: now, where it has not done so yet."""
    place = place_of(root, entry.name, "promotions", run_id)
    note = {"alias": alias, "version": entry.version, "before": now}
    try:
        write_new(place, json.dumps(note).encode())
    except StorageConflict:
        written = json.loads(read_file(place) or b"{}")
        before: int | None = written["before"]
        return before
    return now
