"""Scores that a version of a reward model has given, kept so that no conversation is sent to it twice.

    <run.root>/scores/<digest of the export>.jsonl     {"text": sha256 of the conversation, "reward": its score}

One file a version, named by the sha256 of its card, which holds its weights' digest, template and data: another
export is another file. All runs of a root append to it, several ranks and runs at once: a writer holds the file's lock,
and cuts off what a killed one left unfinished. Readers take whole lines only, and take in before each look what
others have appended meanwhile. Nothing is ever rewritten; to forget, remove the folder while nobody scores.

A score is kept as the server gave it: a server that batches dynamically may give another in the last bits, and
whoever scores later takes the first.
"""

import fcntl
import hashlib
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path

from alignment.atomic_files import disk_errors, json_text
from alignment.errors import DataError
from alignment.metrics_file import mend, parse_record
from alignment.types import Message


class ScoreCache:
    """The scores of one version of a reward model in the file `path`. Use it from any thread."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._scores: dict[str, float] = {}
        self._read_bytes = self._read_lines = 0
        self._hits = self._misses = 0

    def known(self, conversations: Sequence[Sequence[Message]]) -> list[float | None]:
        """The score of each conversation, None where there is none. Raises DataError, naming a line that is damaged."""
        with self._lock:
            self._catch_up()
            found = [self._scores.get(text_digest(conversation)) for conversation in conversations]
            missing = found.count(None)
            self._hits, self._misses = self._hits + len(found) - missing, self._misses + missing
            return found

    def add(self, conversations: Sequence[Sequence[Message]], rewards: Sequence[float]) -> None:
        """Keep the scores of conversations, which are finite. Raises DiskError."""
        lines = [
            json_text({"text": text_digest(conversation), "reward": reward}) + "\n"
            for conversation, reward in zip(conversations, rewards, strict=True)
        ]
        if not lines:
            return
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                mend(file)
                file.write("".join(lines).encode())

    def take_counts(self) -> tuple[int, int]:
        """Conversations that were known, and that were not, since the last call."""
        with self._lock:
            counts = self._hits, self._misses
            self._hits = self._misses = 0
            return counts

    def _catch_up(self) -> None:
        """Take in the whole lines that were appended since the last time."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._read_bytes)
                data = file.read()
        except FileNotFoundError:
            return
        end = data.rfind(b"\n") + 1
        for line in data[:end].splitlines():
            self._read_lines += 1
            text, reward = _score(self._path, self._read_lines, line)
            self._scores.setdefault(text, reward)
        self._read_bytes += end


def text_digest(conversation: Sequence[Message]) -> str:
    """sha256 of what the server reads of a conversation: roles and contents."""
    told = [[message["role"], message["content"]] for message in conversation]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def export_digest(card: object) -> str:
    """sha256 of the card of an export: it tells versions apart that have the same weights."""
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()


def _score(path: Path, number: int, line: bytes) -> tuple[str, float]:
    record = parse_record(path, number, line)
    text, reward = record.get("text"), record.get("reward")
    if not isinstance(text, str) or not isinstance(reward, float | int) or not math.isfinite(reward):
        raise DataError(f"{path}:{number}: no score of a text ({line[:80]!r}): remove the file, it is filled anew")
    return text, float(reward)
