"""HH-RLHF as files: what is written is what the readers read, what is left out is listed, parts share no prompt."""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment import hh
from alignment.config import load_config
from alignment.demonstrations import read_demonstrations
from alignment.errors import ConfigError, DataError
from alignment.files import read_jsonl
from alignment.hh import write_data
from alignment.preferences import conversation, parse_transcript, read_pairs
from alignment.prompts import read_prompts
from alignment.splits import split_by_prompt
from alignment.types import Message, PreferencePair

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT.parent / "shared/data/hh-harmless-sample.jsonl.gz"
ALL = {"train": 1.0}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def transcript(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def pair(*turns: str, chosen: str = "good", rejected: str = "bad", **more: Any) -> dict[str, Any]:
    return {"chosen": transcript(*turns, chosen), "rejected": transcript(*turns, rejected), **more}


def write(tmp_path: Path, *records: Any, shares: dict[str, float] = ALL) -> tuple[Path, dict[str, Any]]:
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    folder = tmp_path / "data" / "hh"
    return folder, write_data([str(source)], folder, tmp_path, shares)


def rows(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_jsonl(path)]


def test_the_files_hold_what_the_transcripts_say(tmp_path: Path) -> None:
    folder, summary = write(
        tmp_path,
        pair("a"),
        pair("a", rejected="worse"),
        pair("a", "b", "c", chosen="d", margin=0.5),
        pair("a", chosen="fine"),
    )
    start = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    assert rows(folder / "train_prompts.jsonl") == [
        {"messages": [user("a")], "reference": "good"},
        {"messages": start, "reference": "d"},
    ]
    assert rows(folder / "train_comparisons.jsonl") == [
        {"chosen": conversation([user("a")], "good"), "rejected": conversation([user("a")], "bad")},
        {"chosen": conversation([user("a")], "good"), "rejected": conversation([user("a")], "worse")},
        {"chosen": conversation(start, "d"), "rejected": conversation(start, "bad"), "margin": 0.5},
        {"chosen": conversation([user("a")], "fine"), "rejected": conversation([user("a")], "bad")},
    ]
    assert rows(folder / "train_demonstrations.jsonl") == [
        {"messages": conversation([user("a")], "good")},
        {"messages": conversation(start, "d")},
        {"messages": conversation([user("a")], "fine")},
    ]
    assert summary["parts"] == {"train": {"prompts": 2, "comparisons": 4, "demonstrations": 3}}
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_what_is_left_out_is_counted_and_listed(tmp_path: Path) -> None:
    folder, summary = write(
        tmp_path,
        pair("a"),
        {"chosen": transcript("a", "b"), "rejected": transcript("other", "c")},
        {"chosen": "no dialogue", "rejected": transcript("a", "b")},
        {"chosen": transcript("a", ""), "rejected": transcript("a", "b")},
        pair("a", chosen="same", rejected="same "),
        {"prompt": "", "chosen": "no", "rejected": "prompt"},
        {"prompt": [user("a"), {"role": "assistant", "content": "b"}], "chosen": "x", "rejected": "y"},
    )
    assert summary["pairs"] == 7
    assert summary["left_out"] == {"different_prompts": 1, "malformed": 2, "identical": 1, "no_question": 2}
    source = tmp_path / "pairs.jsonl"
    assert rows(folder / "left_out.jsonl") == [
        {"place": f"{source}:2", "reason": "different_prompts"},
        {"place": f"{source}:3", "reason": "malformed"},
        {"place": f"{source}:4", "reason": "malformed"},
        {"place": f"{source}:5", "reason": "identical"},
        {"place": str(source), "reason": "no_question"},
        {"place": str(source), "reason": "no_question"},
    ]


def test_the_readers_find_the_pairs_and_prompts_again(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, pair("a"), pair("a", "b", "c", margin=2), pair("é\n\nx", chosen="ü"))
    expected = [
        PreferencePair((user("a"),), "good", "bad"),
        PreferencePair((user("a"), {"role": "assistant", "content": "b"}, user("c")), "good", "bad", 2.0),
        PreferencePair((user("é\n\nx"),), "ü", "bad"),
    ]
    assert read_pairs(str(folder / "train_comparisons.jsonl"), tmp_path) == (expected, {})
    prompts = read_prompts(str(folder / "train_prompts.jsonl"), tmp_path)
    assert [(prompt.messages, prompt.reference) for prompt in prompts] == [(p.prompt, p.chosen) for p in expected]
    demonstrations, left_out = read_demonstrations(str(folder / "train_demonstrations.jsonl"), tmp_path)
    assert [list(one.messages) for one in demonstrations] == [conversation(p.prompt, p.chosen) for p in expected]
    assert left_out == []


def test_parts_share_no_prompt_and_can_be_split_again(tmp_path: Path) -> None:
    records = [pair(f"question {i % 200}", rejected=f"bad {i}") for i in range(400)]
    folder, summary = write(tmp_path, *records, shares={"train": 0.7, "judge": 0.2, "test": 0.1})
    parts = {part: rows(folder / f"{part}_prompts.jsonl") for part in ("train", "judge", "test")}
    questions = [row["messages"][0]["content"] for part in parts.values() for row in part]
    assert sorted(questions) == sorted({f"question {i}" for i in range(200)})
    assert [summary["parts"][part]["comparisons"] for part in parts] == [2 * len(part) for part in parts.values()]
    assert abs(len(parts["judge"]) - 40) < 5 * 5.7  # five deviations of a binomial
    # A run's own share of the train part, by its seed's hashes, is a share like any other.
    again = split_by_prompt(parts["train"], lambda row: row["messages"], {"train": 0.8, "validation": 0.2}, 0)
    assert abs(len(again["validation"]) - 28) < 5 * 4.8


@pytest.mark.parametrize(
    ("shares", "kind", "said"),
    [
        ({"train": 0.9, "test": 0.2}, ConfigError, "sum to 1"),
        ({"train": 1.0, "test": 0.0}, DataError, r"none of the 1 usable pairs falls into test \(share 0.0\)"),
    ],
)
def test_bad_shares_leave_nothing_behind(tmp_path: Path, shares: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        write(tmp_path, pair("a"), shares=shares)
    assert not (tmp_path / "data").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, pair("a"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DataError, match="is there already: name another folder"):
        write(tmp_path, pair("b"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_failure_while_writing_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hh, "settle_files", full_disk)
    with pytest.raises(hh.AlignmentError, match="No space left on device; free some space"):
        write(tmp_path, pair("a"))
    assert list((tmp_path / "data").iterdir()) == []


def test_the_command_says_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text(json.dumps(pair("a")) + "\n" + json.dumps(pair("b", rejected="good")) + "\n")
    hh.main(["pairs.jsonl", "--out", "hh", "--shares", "train=1"])
    assert capsys.readouterr().out == (
        "2 pairs read, left out: 1 identical, listed in hh/left_out.jsonl\n"
        "hh/train_*.jsonl: 1 prompts, 1 comparisons, 1 demonstrations\n"
    )
    with pytest.raises(SystemExit, match=r"DataError: nothing\.jsonl: no such file"):
        hh.main(["nothing.jsonl", "--out", "other"])
    for bad in ("train", "train=x", "a=0.5,a=0.5", "../a=1"):
        with pytest.raises(SystemExit):
            hh.main(["pairs.jsonl", "--out", "other", "--shares", bad])
    assert "'../a=1' must be NAME=SHARE" in capsys.readouterr().err


def reference_dialogue(text: str) -> list[tuple[str, str]] | None:
    """The reference recipe's reading of a transcript, written anew: None where it leaves the dialogue out."""
    turns = []
    for part in filter(None, (part.strip() for part in text.split("\n\nHuman: "))):
        sides = part.split("\n\nAssistant: ")
        if len(sides) != 2:
            return None
        answer = re.sub(r"\n\nHuman(: ?)?$", "", sides[1])
        if not sides[0].strip() or not answer.strip():
            return None
        turns += [("user", sides[0].strip()), ("assistant", answer.strip())]
    return turns


@pytest.mark.skipif(not SAMPLE.exists(), reason="needs the HH-RLHF sample beside the repository")
def test_the_real_sample_is_read_as_the_reference_recipe_reads_it(tmp_path: Path) -> None:
    kept = []
    for record in rows(SAMPLE):
        chosen, rejected = (reference_dialogue(record[side]) for side in ("chosen", "rejected"))
        if chosen and rejected and chosen[:-1] == rejected[:-1] and chosen != rejected:
            kept.append((chosen, rejected[-1][1]))
    summary = write_data([str(SAMPLE)], tmp_path / "hh", tmp_path, ALL)
    written = [
        ([(m["role"], m["content"]) for m in row["chosen"]], row["rejected"][-1]["content"])
        for row in rows(tmp_path / "hh" / "train_comparisons.jsonl")
    ]
    assert written == kept
    assert (summary["pairs"], sum(summary["left_out"].values())) == (1000, 1000 - len(kept))
    assert 0 < summary["left_out"]["malformed"] < 10


def unambiguous(text: str) -> bool:
    return bool(text) and re.search(r"\n\n(Human|Assistant):|\n\nHuman\Z", text) is None


WORDS = st.sampled_from(["a", "é ", ":", "\n", "Human", "Human:", "Assistant:", "\n\nHuman"])
SAID = st.lists(WORDS, min_size=1, max_size=8).map("".join).map(str.strip).filter(unambiguous)


@given(st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4), st.sampled_from(["", "\n\nHuman:", "\n\nHuman: \n"]))
def test_messages_become_a_transcript_and_come_back(turns: list[tuple[str, str]], ending: str) -> None:
    """The preset's own template writes what `parse_transcript` reads, a cut-off last turn included."""
    template = load_config(ROOT / "configs" / "hh_rlhf.yaml").reward.template
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    assert list(parse_transcript(jinja2.Template(template).render(messages=messages) + ending)) == messages
