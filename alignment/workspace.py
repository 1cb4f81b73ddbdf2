"""Where runs live and where tasks work on them: a local folder is both; a run under s3:// is worked on in a copy.

All stages work on local folders. `opened` gives a task the folder of a run, brings it up to date before, and sends what
is new, while the task goes on where it asks (`RunFolder.send`) and at its end, however that comes. What passes from
task to task is the run's own name, so any node can go on with it.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from alignment.config import Config, same_config
from alignment.config_sections import RunSection
from alignment.errors import AlignmentError, DataError, StorageConflict
from alignment.foreign_json import parse_object
from alignment.run_copy import writer_lock
from alignment.run_folder import RunFolder, check_id
from alignment.run_folder import create as create_folder
from alignment.run_mirror import Names, Note, RunMirror
from alignment.run_sender import Sender
from alignment.s3 import is_s3, parse_uri
from alignment.s3_objects import list_objects, read_bytes, require_place, write_bytes
from alignment.s3_pointers import move_pointer, read_pointer

TRIES = 8
"""Of a pointer's move, where others move it too."""


def local_root(run: RunSection) -> Path:
    """`run.root` where it is a folder; else this node's folder in its stead."""
    return local_place(run, run.root)


def local_place(run: RunSection, uri: str) -> Path:
    """A path as it is; of an s3:// URI, <run.workspace>/<bucket>/<key>."""
    if not is_s3(uri):
        return Path(uri)
    from alignment.model_cache import cache_root

    place = parse_uri(uri)
    workspace = Path(run.workspace).expanduser() if run.workspace else cache_root() / "workspace"
    return workspace.absolute() / place.bucket / place.key.strip("/")


def child(root: str, *names: str) -> str:
    """The path or URI of what lies below a root."""
    return "/".join((parse_uri(root).uri.rstrip("/"), *names)) if is_s3(root) else str(Path(root, *names))


def create(run: RunSection, root: str, run_id: str, config_json: str) -> str:
    """Begin the run `run_id` in `root`, and point `latest` there to it; returns what names the run on every node.

    Calling it again is harmless. Raises DataError for a run id that is no folder name or another run's, DiskError,
    StorageError.
    """
    if not is_s3(root):
        return str(create_folder(root, run_id, config_json).path)
    check_id(run_id)
    require_place(root)
    uri = child(root, run_id)
    with contextlib.suppress(StorageConflict):
        write_bytes(f"{uri}/config.json", config_json.encode(), if_absent=True)
    found = read_bytes(f"{uri}/config.json")
    if found is None or not same_config(found[0], config_json.encode()):
        raise DataError(f"{uri} holds another run's files: set run.root to another prefix, or remove them")
    point(child(root, "latest"), run_id)
    return uri


def point(uri: str, value: str) -> None:
    """Move a pointer to `value`, whatever it says. Raises StorageConflict where others keep moving it."""
    for attempt in range(TRIES):
        pointer = read_pointer(uri)
        try:
            move_pointer(uri, value, pointer.token if pointer else None)
            return
        except StorageConflict:
            if attempt == TRIES - 1:
                raise


def find_run(root: str, name: str) -> str | None:
    """The run under s3:// that `name` means: a URI, or an id under `root`, `latest` too; None where there is none."""
    if is_s3(name):
        uri = parse_uri(name).uri
    elif is_s3(root) and not name.startswith(("/", ".", "~")) and "://" not in name:
        uri = child(root, name)
    else:
        return None
    parent, _, last = uri.rpartition("/")
    if last == "latest":
        pointer = read_pointer(uri)
        return f"{parent}/{pointer.value}" if pointer else None
    return uri if _is_run(uri) else None


def _is_run(uri: str) -> bool:
    """A model's folder has a config.json too, of another kind."""
    found = read_bytes(f"{uri}/config.json")
    try:
        return found is not None and "run" in parse_object(found[0])
    except ValueError:
        return False


def first_id_in_s3(root: str, run_id: str, resumed_id: str | None) -> str:
    """`first_id` of `alignment.continuation` for a root under s3://: an alias stands where a link does in a folder."""
    if resumed_id is None:
        return run_id
    alias = read_bytes(child(root, "aliases", resumed_id))
    name = alias[0].decode(errors="replace") if alias else resumed_id
    if not _is_run(child(root, name)):
        return run_id
    with contextlib.suppress(StorageConflict):  # this task is tried again
        write_bytes(child(root, "aliases", run_id), name.encode(), if_absent=True)
    return name


def newest(names: Sequence[str]) -> set[str]:
    """The last of the names of checkpoints, oldest first."""
    return set(names[-1:])


def _none(names: Sequence[str]) -> set[str]:
    del names
    return set()


def kept_by(config: Config, run: RunFolder) -> Names:
    """The checkpoints that a run keeps: `loop.keep_last` and `loop.keep_best` by validation."""
    from models.checkpoints import kept_folders

    def kept(names: Sequence[str]) -> set[str]:
        folders = kept_folders(
            [Path(name) for name in names],
            keep_last=config.loop.keep_last,
            keep_best=config.loop.keep_best,
            validations=run.validations(),
            failed=run.failed_step(),
        )
        return {folder.name for folder in folders}

    return kept


@contextlib.contextmanager
def opened(
    config: Config,
    run_path: str,
    *,
    writes: bool = True,
    all_kept: bool = False,
    checkpoints: bool = True,
    keeps: Callable[[Config, RunFolder], Names] = kept_by,
    on_note: Note | None = None,
) -> Iterator[RunFolder]:
    """The local folder of the run that `create` named `run_path`, for as long as a task works on it.

    Of a run under s3:// it is a copy that is brought up to date before: the newest checkpoint, `all_kept` those that
    `keeps` says, without `checkpoints` none, and everything else. What the task leaves is sent at the end, also after
    an error, Ctrl-C or SIGTERM. `writes=False` sends nothing, for tasks that only read, of which many may run side by
    side. A second task of this node that writes is refused, after `loop.stop_grace_s`; where the copy has to be
    changed, it waits for readers. Raises StorageConflict where somebody else goes on with the run, AlignmentError,
    StorageError.
    """
    if not is_s3(run_path):
        yield RunFolder(Path(run_path))
        return
    path = local_place(config.run, run_path)
    note, kept, wait_s = on_note or _say, keeps(config, RunFolder(path)), config.loop.stop_grace_s
    mirror = RunMirror(path, run_path, kept, note)
    wanted: Names = (lambda names: newest(names) | kept(names)) if all_kept else newest if checkpoints else _none
    with contextlib.ExitStack() as stack:
        if writes:
            stack.enter_context(writer_lock(path, wait_s))
        stack.enter_context(mirror.current(wanted, writes=writes, wait_s=wait_s))
        if writes:
            yield from _sending(mirror)
        else:
            yield RunFolder(path, _Reading(run_path))


def _sending(mirror: RunMirror) -> Iterator[RunFolder]:
    sender = Sender(mirror)
    try:
        with _ending_on_sigterm():
            yield RunFolder(mirror.path, sender)
    except BaseException:
        try:
            sender.close()
        except AlignmentError as error:  # what ended the task is worth more
            mirror.on_note(
                f"not all could be sent to {mirror.uri}: {error}. It stays in {mirror.path}, and a resume on this "
                "node sends it"
            )
        raise
    sender.close()


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """A scheduler's notice ends the body like Ctrl-C, so that what it leaves is sent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def pull_prompts(run: RunSection, uri: str) -> Path | None:
    """A run's prompts in this node's copy of the run, which need not be there; the copy's folder, None without any."""
    from alignment.s3_folders import pull_folder

    if not list_objects(f"{uri}/prompts"):
        return None
    path = local_place(run, uri)
    pull_folder(f"{uri}/prompts", path / "prompts")
    return path


@dataclass(frozen=True)
class _Reading:
    """Where the run lives whose copy is only read."""

    uri: str

    def send(self) -> None:
        """A reader has nothing to send."""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
