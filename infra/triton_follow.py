"""New versions of a repository, taken into a running server without a failed request.

Tritonserver polls the view that it serves, so a version that is renamed into the view is loaded beside the others,
and requests that name no version go to it once it is ready. Nobody needs the right to load models for that:
whoever can write the view, which is this process, decides what the server runs. A version that cannot be loaded
is taken out of the view again, so that it does not stand in the way when the server has to be started anew.
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from alignment.errors import RewardServerError
from infra.triton_health import CANARY_S, model_index, ready_versions, responds
from infra.triton_setup import Prepared, link_version, servable_versions


@dataclass
class Follower:
    """Keeps the view of the models that are served up to date with their repository."""

    repository: Path
    models: list[str]
    prepared: Prepared
    url: str
    waiting: dict[tuple[str, str], int] = field(default_factory=dict)
    """Name and version of what is in the view and not ready yet, with its `_last_change` when it was linked."""
    refused: dict[tuple[str, str], int] = field(default_factory=dict)
    """The same of what could not be loaded. It is tried again once it has changed: it may have been half copied."""

    def follow(self) -> None:
        """Link versions that are new in the repository; say which have got ready and which cannot be served."""
        for name in self.models:
            for version in _exported(self.repository, name):
                self._link(name, version)
        if not self.waiting:
            return
        index = model_index(self.url, self.prepared.key)
        if index is None:
            return
        known = {(entry.name, entry.version): entry for entry in index}
        for key in list(self.waiting):
            entry = known.get(key)
            if entry is None or not entry.failure:
                # The index tells of the last try until the next one begins: a failure from now on is a new one.
                self.refused.pop(key, None)
            if entry is not None and entry.state == "READY":
                del self.waiting[key]
                print(f"serving {entry.name} version {entry.version} too", flush=True)
            elif entry is not None and entry.failure and key not in self.refused:
                self.refused[key] = self.waiting.pop(key)
                self._take_out(*key)
                print(f"{entry.failure}; the versions before it still are", file=sys.stderr, flush=True)

    def _link(self, name: str, version: str) -> None:
        if (self.prepared.view / name / version).exists():
            return
        source = self.repository.resolve() / name / version
        try:
            changed = _last_change(source)
            if self.refused.get((name, version)) == changed:
                return
            link_version(self.prepared.view / name, source)
        except OSError:
            return  # somebody deletes or replaces it: look again later
        self.waiting[name, version] = changed

    def before_restart(self) -> None:
        """Take out what never got ready: at its start a server serves no version of a model if one fails to load."""
        for name, version in self.waiting:
            self._take_out(name, version)
        self.waiting.clear()

    def all_answer(self) -> bool:
        """Whether all that the server calls ready answers: a model's process that is gone was then let go by it."""
        ready = ready_versions(self.url, self.prepared.key)
        # Asked again, for it may have been let go meanwhile.
        return bool(ready) and all(
            responds(self.url, name, CANARY_S, version)
            or (name, version) not in ready_versions(self.url, self.prepared.key)
            for name, version in ready
        )

    def _take_out(self, name: str, version: str) -> None:
        shutil.rmtree(self.prepared.view / name / version)


def _exported(repository: Path, name: str) -> list[str]:
    """The versions of a model; none while it has none (all may have been removed under a running server)."""
    try:
        return servable_versions(repository, name)[name]
    except (RewardServerError, OSError):
        return []


def _last_change(version: Path) -> int:
    """Nanoseconds. The inode's own time, since a copy may bring old times of modification with it."""
    return max(path.stat().st_ctime_ns for path in (version, *version.rglob("*")))
