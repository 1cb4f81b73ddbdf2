"""Preference pairs: transcripts, messages, alternating lines, built-in pairs; what is left out is counted."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import DataError
from alignment.preferences import conversation, parse_transcript, read_pairs
from alignment.reviews import FRAME, WINDOW_WORDS, _imdb_parts
from alignment.toy import CHEERFUL, GLOOMY
from alignment.types import PreferencePair

HH = Path(__file__).resolve().parents[2] / "shared/data/hh-harmless-sample.jsonl.gz"
A = {"role": "user", "content": "a"}


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(tmp_path: Path, *records: Any, limit: int | None = None) -> tuple[list[PreferencePair], dict[Any, int]]:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return read_pairs(str(path), tmp_path, limit=limit)


def test_a_transcript_becomes_messages() -> None:
    assert parse_transcript(
        "\n\nHuman: Hi \n\nthere\n\nAssistant: Hello: Human\n\nHuman:bye\n\nAssistant: So long\n"
    ) == (
        {"role": "user", "content": "Hi \n\nthere"},
        {"role": "assistant", "content": "Hello: Human"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "So long"},
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "begins with"),
        ("Hi", "begins with a blank line and Human:, found 'Hi'"),
        ("x\n\nHuman: a\n\nAssistant: b", "begins with"),
        ("\n\nAssistant: b", "alternates"),
        ("\n\nHuman: a", "found Human$"),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "found Human, Human, Assistant"),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "alternates"),
        ("\n\nHuman: a\n\nAssistant: ", "turn 2 of 2 of the transcript is empty"),
    ],
)
def test_a_malformed_transcript_is_refused(text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        parse_transcript(text)


def test_transcripts_that_do_not_fit_are_counted_by_reason(tmp_path: Path) -> None:
    start = "\n\nHuman: a\n\nAssistant:"
    pairs, left_out = read(
        tmp_path,
        {"chosen": f"{start} good", "rejected": f"{start} bad"},
        {"chosen": f"{start} good", "rejected": "\n\nHuman: b\n\nAssistant: bad"},
        {"chosen": f"{start} same", "rejected": f"{start} same "},
        {"chosen": f"{start}", "rejected": f"{start} bad"},
        {"chosen": "no dialogue", "rejected": f"{start} bad"},
        {"chosen": f"{start} b\n\nHuman: c\n\nAssistant: d", "rejected": f"{start} b"},
    )
    assert pairs == [PreferencePair((A,), "good", "bad")]
    assert left_out == {"different_prompts": 2, "identical": 1, "malformed": 2}


def test_messages_and_explicit_prompts(tmp_path: Path) -> None:
    expected = PreferencePair((A,), "good", "bad")
    pairs, left_out = read(
        tmp_path,
        {"chosen": [A, say("good")], "rejected": [A, say("bad")]},
        {"prompt": "a", "chosen": [A, say("good")], "rejected": [A, say("bad")]},
        {"prompt": [A], "chosen": [say("good")], "rejected": [say("bad")]},
        {"prompt": "a", "chosen": "good", "rejected": "bad"},
        {"prompt": [A], "chosen": "good", "rejected": "bad"},
        {"prompt": "", "chosen": "good", "rejected": "bad"},
        {"prompt": "a", "chosen": " ", "rejected": "bad"},
        {"chosen": [A], "rejected": [A, say("bad")]},
    )
    assert pairs == [*[expected] * 5, PreferencePair((), "good", "bad")]
    assert left_out == {"malformed": 2}


def test_rows_of_ultrafeedback_are_read_whatever_stands_beside_the_sides(tmp_path: Path) -> None:
    both = {"chosen": [A, say("good")], "rejected": [A, say("bad")]}
    scores = {"prompt_id": "ab12", "score_chosen": 8.5, "score_rejected": 7}
    system = {"role": "system", "content": "s"}
    later = [{"role": "user", "content": "first"}, say("yes"), A]
    pairs, left_out = read(
        tmp_path,
        {"prompt": "a", **both, "messages": both["chosen"], **scores},
        {"prompt": " a\n", **both, **scores},
        {"prompt": "a", "chosen": [system, A, say("good")], "rejected": [system, A, say("bad")]},
        {"prompt": "a", "chosen": [*later, say("good")], "rejected": [*later, say("bad")]},
        {"prompt": [system], "chosen": [A, say("good")], "rejected": [A, say("bad")]},
    )
    assert pairs == [
        *[PreferencePair((A,), "good", "bad", 1.5)] * 2,
        PreferencePair((system, A), "good", "bad"),
        PreferencePair(tuple(later), "good", "bad"),
        PreferencePair((system, A), "good", "bad"),
    ]
    assert left_out == {}


def test_alternating_text_lines_are_chosen_then_rejected(tmp_path: Path) -> None:
    lines = [{"text": t} for t in ("good 1", "bad 1", "\n\nHuman: a\n\nAssistant: g", "\n\nHuman: a\n\nAssistant: b")]
    pairs, left_out = read(tmp_path, *lines)
    assert pairs == [PreferencePair((), "good 1", "bad 1"), PreferencePair((A,), "g", "b")] and left_out == {}
    with pytest.raises(DataError, match=r"pairs\.jsonl:3: an odd number"):
        read(tmp_path, *lines[:3])
    assert read(tmp_path, *lines[:3], limit=1)[0] == pairs[:1]


@pytest.mark.parametrize(
    ("given", "margin"),
    [
        ({}, None),
        ({"margin": 2}, 2.0),
        ({"margin": 0.5}, 0.5),
        ({"margin": 0}, 0.0),
        ({"margin": None}, None),
        ({"score_chosen": 8.5, "score_rejected": 6}, 2.5),
        ({"score_chosen": -1, "score_rejected": -1}, 0.0),
        ({"score_chosen": None, "score_rejected": None}, None),
        ({"margin": 3, "score_chosen": 8.5, "score_rejected": 6}, 3.0),
        ({"margin": None, "score_chosen": 8.5, "score_rejected": 6}, 2.5),
    ],
)
@pytest.mark.parametrize(
    "sides",
    [
        {"prompt": "a", "chosen": "good", "rejected": "bad"},
        {"chosen": [A, say("good")], "rejected": [A, say("bad")]},
        {"chosen": "\n\nHuman: a\n\nAssistant: good", "rejected": "\n\nHuman: a\n\nAssistant: bad"},
    ],
    ids=["texts", "messages", "transcripts"],
)
def test_a_margin_is_given_or_the_difference_of_scores(
    tmp_path: Path, sides: Any, given: Any, margin: float | None
) -> None:
    assert read(tmp_path, {**sides, **given})[0] == [PreferencePair((A,), "good", "bad", margin)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"margin": "2"}, "\"margin\" must be a finite number, found str '2'"),
        ({"margin": True}, '"margin" must be a finite number, found bool'),
        ({"margin": [1]}, '"margin" must be a finite number, found list'),
        ({"margin": math.nan}, '"margin" must be a finite number, found float'),
        ({"margin": math.inf}, '"margin" must be a finite number, found float'),
        ({"margin": 10**400}, '"margin" must be a finite number, found int'),
        ({"margin": -0.5}, '"margin" must be >= 0, found -0.5: swap the sides, or leave the pair out'),
        ({"score_chosen": 1}, '"score_chosen" stands without "score_rejected": give both, or neither'),
        ({"score_rejected": 1}, '"score_rejected" stands without "score_chosen": give both, or neither'),
        ({"score_chosen": "8", "score_rejected": 1}, '"score_chosen" must be a finite number, found str'),
        ({"score_chosen": 1, "score_rejected": math.nan}, '"score_rejected" must be a finite number, found float'),
        ({"score_chosen": 1, "score_rejected": 3}, '"score_chosen" - "score_rejected" must be >= 0, found -2.0'),
        ({"score_chosen": 1e308, "score_rejected": -1e308}, '"score_chosen" - "score_rejected" must be a finite'),
    ],
)
def test_a_margin_that_is_none_is_an_error(tmp_path: Path, given: Any, said: str) -> None:
    sides = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: " + said):
        read(tmp_path, sides, {**sides, **given})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"chosen": "a"}, 'expected "chosen" and "rejected", or "text" lines in turn, found chosen'),
        ({"text": "a"}, "an odd number"),
        ({"text": 3}, '"text" must be a string, found int'),
        ({"chosen": None, "rejected": "a"}, "found NoneType and str"),
        ({"chosen": [A], "rejected": "a"}, "found list and str"),
        (
            {"chosen": [{"role": "human", "content": "x"}], "rejected": [A]},
            "the role of message 0 .* found str 'human'",
        ),
        ({"prompt": 4, "chosen": "a", "rejected": "b"}, "expected a list of messages, found int"),
    ],
)
def test_a_line_of_another_form_is_an_error(tmp_path: Path, record: Any, said: str) -> None:
    with pytest.raises(DataError, match=rf"pairs\.jsonl:2: .*{said}"):
        read(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, record)


def test_a_file_without_a_usable_pair_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable preference pair \(the file is empty\)"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"no usable preference pair \(1 malformed\)"):
        read(tmp_path, {"chosen": "a", "rejected": "b"})


def test_the_limit_counts_usable_pairs(tmp_path: Path) -> None:
    records = [{"prompt": "a", "chosen": c, "rejected": "b"} for c in ("b", "1", "2", "b", "3")]
    pairs, left_out = read(tmp_path, *records, limit=2)
    assert [p.chosen for p in pairs] == ["1", "2"] and left_out == {"identical": 1}


def test_a_pairs_side_as_a_conversation() -> None:
    assert conversation((A,), "b") == [A, say("b")]  # type: ignore[arg-type]
    assert conversation((), "b") == [say("b")]


@pytest.mark.skipif(not HH.exists(), reason="needs the HH-RLHF sample beside the repository")
def test_real_transcripts(tmp_path: Path) -> None:
    pairs, left_out = read_pairs(str(HH), tmp_path)
    # Three chosen answers are empty (lines 87, 517, 926); in two dialogues the assistant speaks twice (668, 764).
    assert len(pairs) == 995 and left_out == {"malformed": 5}
    with gzip.open(HH, "rt", encoding="utf-8") as lines:
        first = json.loads(next(lines))
    rebuilt = "".join(
        f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}"
        for m in conversation(pairs[0].prompt, pairs[0].chosen)
    )
    assert rebuilt == first["chosen"]


@pytest.mark.parametrize(("name", "count"), [("imdb:pairs", 5000), ("imdb:held_out_pairs", 900)])
def test_built_in_review_pairs_are_windows_of_reviews(name: str, count: int) -> None:
    pairs, left_out = read_pairs(name, Path("unused"))
    assert len(pairs) > count and left_out == {}
    assert read_pairs(name, Path("unused"), limit=5)[0] == pairs[:5]
    for pair in pairs:
        for text in (pair.chosen, pair.rejected):
            assert text.startswith(FRAME) and 10 <= len(text[len(FRAME) :].split()) <= WINDOW_WORDS
            assert "<br" not in text


def test_the_two_imdb_parts_and_the_judges_source_share_no_text() -> None:
    seen: set[str] = set()
    for name in ("imdb:pairs", "imdb:held_out_pairs", "rotten_tomatoes:pairs"):
        pairs, _ = read_pairs(name, Path("unused"))
        texts = {side for p in pairs for side in (p.chosen, p.rejected)}
        assert not texts & seen
        seen |= texts
    with pytest.raises(DataError, match="known: imdb:pairs, imdb:held_out_pairs, rotten_tomatoes:pairs"):
        read_pairs("imdb:prompts", Path("unused"))


def test_no_review_serves_two_purposes() -> None:
    parts = _imdb_parts()
    rows = [review.row for part in parts.values() for review in part]
    assert len(rows) == len(set(rows)) == 24_888
    assert {name: len(part) for name, part in parts.items()} == {
        "imdb:pairs": 12_000,
        "imdb:held_out_pairs": 2_000,
        "imdb:prompts": 8_000,
        "imdb:held_out_prompts": 2_888,
    }


def test_toy_pairs_differ_in_their_letters_alone() -> None:
    assert not set("".join(CHEERFUL)) & set("".join(GLOOMY))
    for name in ("toy:pairs", "toy:held_out_pairs", "toy:judge_pairs"):
        pairs, _ = read_pairs(name, Path("unused"), limit=256)
        assert len(pairs) == 256 and read_pairs(name, Path("unused"), limit=256)[0] == pairs
        assert all(len(p.chosen.split()) == len(p.rejected.split()) for p in pairs)
        assert all(p.chosen.endswith("!") and p.rejected.endswith(".") for p in pairs)
    with pytest.raises(DataError, match="known: toy:pairs"):
        read_pairs("toy:prompts", Path("unused"))
