"""Rated answers: each form of answer and of ratings, what is left out, and what is refused."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import ConfigError, DataError
from alignment.ratings import read_ratings
from alignment.types import RatedAnswer

A = {"role": "user", "content": "a"}
B = {"role": "assistant", "content": "b"}
ATTRIBUTES = ("helpfulness", "verbosity")
LABEL = {"label": [4, 1]}
TRANSCRIPT = "\n\nHuman: a\n\nAssistant: b"


def read(tmp_path: Path, *records: Any, limit: int | None = None) -> tuple[list[RatedAnswer], dict[Any, int]]:
    path = tmp_path / "rated.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return read_ratings(str(path), tmp_path, ATTRIBUTES, limit)


def test_each_form_of_an_answer(tmp_path: Path) -> None:
    answers, left_out = read(
        tmp_path,
        {"messages": [A, B], **LABEL},
        {"prompt": "a", "response": "b", **LABEL},
        {"prompt": [A], "response": "b", **LABEL},
        {"text": TRANSCRIPT, **LABEL},
        {"prompt": "", "response": "b", **LABEL},
        {"text": "b", **LABEL},
        {"messages": [B], **LABEL},
        {"text": f"{TRANSCRIPT}\n\nHuman: c\n\nAssistant: d", **LABEL},
    )
    labels = (4.0, 1.0)
    assert answers == [
        *[RatedAnswer((A,), "b", labels)] * 4,
        *[RatedAnswer((), "b", labels)] * 3,
        RatedAnswer((A, B, {"role": "user", "content": "c"}), "d", labels),
    ]
    assert left_out == {}


@pytest.mark.parametrize(
    ("ratings", "labels"),
    [
        ({"ratings": {"helpfulness": 4, "verbosity": 0.5}}, (4.0, 0.5)),
        ({"ratings": {"verbosity": 1, "humor": "x", "helpfulness": -2}}, (-2.0, 1.0)),
        ({"ratings": {"helpfulness": 4, "verbosity": None}}, (4.0, None)),
        ({"ratings": {"verbosity": 0}}, (None, 0.0)),
        ({"label": [4, 0.5]}, (4.0, 0.5)),
        ({"label": [-100, 0]}, (None, 0.0)),
        ({"label": [3.5, -100.0]}, (3.5, None)),
        ({"label": [None, -1]}, (None, -1.0)),
    ],
)
def test_each_form_of_ratings(tmp_path: Path, ratings: Any, labels: Any) -> None:
    answers, _ = read(tmp_path, {"messages": [A, B], **ratings})
    assert repr(answers) == repr([RatedAnswer((A,), "b", labels)])  # by repr: floats, also where the file has integers


def test_the_callers_attributes_order_the_labels(tmp_path: Path) -> None:
    path = tmp_path / "rated.jsonl.gz"
    record = {"messages": [A, B], "ratings": {"a": 1, "b": 2, "c": 3}}
    path.write_bytes(gzip.compress(json.dumps(record).encode()))
    assert read_ratings(str(path), tmp_path, ["c", "a"])[0][0].labels == (3.0, 1.0)
    assert read_ratings(str(path), tmp_path, ["b"])[0][0].labels == (2.0,)


def test_what_cannot_be_used_is_counted_by_reason(tmp_path: Path) -> None:
    good = {"messages": [A, B], **LABEL}
    answers, left_out = read(
        tmp_path,
        good,
        {"messages": [A], **LABEL},
        {"messages": [A, {"role": "assistant", "content": " \n"}], **LABEL},
        {"prompt": "a", "response": "", **LABEL},
        {"text": "\n\nHuman: a\n\nAssistant:", **LABEL},
        {"text": "\n\nAssistant: b", **LABEL},
        {"text": " ", **LABEL},
        {"messages": [A, B], "label": [-100, -100]},
        {"messages": [A, B], "ratings": {"helpfulness": None}},
        {"messages": [A, B], "ratings": {"humor": 3}},
        {"messages": [A], "ratings": {}},
        good,
    )
    assert answers == [RatedAnswer((A,), "b", (4.0, 1.0))] * 2
    assert left_out == {"malformed": 7, "unlabelled": 3}


def test_the_limit_counts_usable_answers(tmp_path: Path) -> None:
    records = [{"messages": [A, B], "label": [value, -100]} for value in (-100, 1, -100, 2, -100, 3)]
    answers, left_out = read(tmp_path, *records, limit=2)
    assert [answer.labels for answer in answers] == [(1.0, None), (2.0, None)] and left_out == {"unlabelled": 2}


def test_a_file_without_a_usable_answer_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable answer \(the file is empty\) rated by any of helpfulness, verb"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"rated\.jsonl: no usable answer \(1 unlabelled\)"):
        read(tmp_path, {"messages": [A, B], "ratings": {"helpfullness": 4}})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({**LABEL}, 'expected one of "messages", "prompt" with "response", "text", found label'),
        ({"response": "b", **LABEL}, 'expected one of .* "prompt" with "response"'),
        ({"messages": [A, B], "text": "b", **LABEL}, "expected one of .* found messages, text, label"),
        ({"messages": "b", **LABEL}, "expected a list of messages, found str"),
        ({"messages": [{"role": "bot", "content": "b"}], **LABEL}, "the role of message 0 must be one of"),
        ({"prompt": 3, "response": "b", **LABEL}, "expected a list of messages, found int"),
        ({"prompt": "a", "response": 3, **LABEL}, '"response" must be a string, found int 3'),
        ({"text": [], **LABEL}, r'"text" must be a string, found list \[\]'),
        ({"text": "b"}, 'expected one of "ratings", "label", found text'),
        ({"text": "b", "ratings": {}, **LABEL}, 'expected one of "ratings", "label", found text, ratings, label'),
        ({"text": "b", "ratings": [4, 1]}, r'"ratings" must be an object of numbers, found \[4, 1\]'),
        ({"text": "b", "ratings": {"verbosity": "4"}}, "the rating verbosity must be a finite number, found str '4'"),
        ({"text": "b", "ratings": {"verbosity": True}}, "the rating verbosity must be a finite number, found bool"),
        ({"text": "b", "ratings": {"verbosity": math.nan}}, "the rating verbosity must be a finite number, found flo"),
        (
            {"text": "b", "label": 4},
            '"label" must be a list of 2 numbers, in the order helpfulness, verbosity, found 4',
        ),
        ({"text": "b", "label": [4]}, r'"label" must be a list of 2 numbers, .* found \[4\]'),
        ({"text": "b", "label": [4, 1, 2]}, r'"label" must be a list of 2 numbers, .* found \[4, 1, 2\]'),
        ({"text": "b", "label": [4, "1"]}, "the rating verbosity must be a finite number, found str '1'"),
        ({"text": "b", "label": [math.inf, 1]}, "the rating helpfulness must be a finite number, found float 'inf'"),
    ],
)
def test_a_line_of_another_form_is_an_error(tmp_path: Path, record: Any, said: str) -> None:
    with pytest.raises(DataError, match=rf"rated\.jsonl:2: {said}"):
        read(tmp_path, {"messages": [A, B], **LABEL}, record)


@pytest.mark.parametrize("attributes", [[], [""], ["a", "b", "a"]])
def test_attributes_are_distinct_names(tmp_path: Path, attributes: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"attributes \(.*\) must be one or more names, each of them once"):
        read_ratings(str(tmp_path / "rated.jsonl"), tmp_path, attributes)
