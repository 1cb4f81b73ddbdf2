"""docs/nemo-aligner-keys.md: every key on our side exists, every key of NeMo-Aligner's has a place or a reason."""

import re
from pathlib import Path

import pytest

from alignment.config import Config
from alignment.config_sections import Section

DOC = Path(__file__).resolve().parent.parent / "docs" / "nemo-aligner-keys.md"
CONFIGS = ("gpt_rs_actor.yaml", "gpt_sft.yaml", "training_rm.yaml", "inference_rm.yaml")


def known_keys() -> set[str]:
    keys: set[str] = set()
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            fields = field.annotation.model_fields.items()
            keys |= {f"{name}.{one.alias or own}" for own, one in fields}
        else:
            keys.add(name)
    return keys


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def tables() -> dict[str, tuple[int, list[list[str]]]]:
    """Config to the number of keys that its section states, and its rows of three cells."""
    found = {}
    for section in DOC.read_text().split("\n## ")[1:]:
        title, count, *lines = section.splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
        found[quoted(title)[0]] = (int(count.split()[0]), rows)
    return found


def test_there_is_a_table_for_each_config() -> None:
    assert tuple(tables()) == CONFIGS


@pytest.mark.parametrize("config", CONFIGS)
def test_every_key_stands_once_with_its_place_or_a_reason(config: str) -> None:
    count, rows = tables()[config]
    assert {len(row) for row in rows} == {3}
    keys = [key for theirs, _, _ in rows for key in quoted(theirs)]
    assert len(keys) == len(set(keys)) == count
    for theirs, here, why in rows:
        assert (here == "—" and why) or re.fullmatch(r"`[\w.]+`", here), theirs


@pytest.mark.parametrize("config", CONFIGS)
def test_every_key_on_our_side_exists(config: str) -> None:
    known = known_keys()
    for theirs, here, why in tables()[config][1]:
        assert set(quoted(here)) <= known, theirs
        # In the reasons too, whatever looks like a key is one: a word, a dot, a word.
        named = {word for word in quoted(why) if re.fullmatch(r"[a-z_]+\.[a-z_0-9]+", word)}
        assert named <= known, theirs
