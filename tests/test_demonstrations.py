"""Reading demonstrations: every format, which turns count, and what is said of lines that cannot be used."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.demonstrations import count_faults, read_demonstrations
from alignment.errors import DataError
from alignment.types import LeftOut

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


def write(path, records):
    lines = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def read_one(tmp_path, record, **options):
    (demonstration,), left_out = read_demonstrations(
        write(tmp_path / "data.jsonl", [record]), tmp_path / "cache", **options
    )
    assert left_out == []
    said = [(m["role"], m["content"]) for m in demonstration.messages]
    return said, demonstration.learned


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_an_input_and_its_output(tmp_path):
    said, learned = read_one(tmp_path, {"input": "2+2=", "output": "4", "category": "sums"})
    assert (said, learned) == ([(USER, "2+2="), (ASSISTANT, "4")], (False, True))


def test_every_answer_of_a_chat_counts_or_only_the_last(tmp_path):
    turns = [(SYSTEM, "s"), (USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, "d"), (USER, "thanks")]
    said, learned = read_one(tmp_path, chat(*turns))
    assert (said, learned) == (turns[:5], (False, False, True, False, True))  # nothing is learned from "thanks"
    assert read_one(tmp_path, chat(*turns), turns="last")[1] == (False, False, False, False, True)


def nemo(turns, **more):
    return {"conversations": [{"from": name, "value": value} for name, value in turns], **more}


def test_nemos_chat_format_and_its_mask(tmp_path):
    turns = [("User", "a"), ("Assistant", "b"), ("User", "c"), ("Assistant", "d")]
    said, learned = read_one(tmp_path, nemo(turns, system="s", mask="User", type=None))
    assert said == [(SYSTEM, "s"), (USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, "d")]
    assert learned == (False, False, True, False, True)
    assert read_one(tmp_path, nemo(turns, system=""))[1] == (False, True, False, True)  # "User" where none is named
    # Two speakers in the assistant's part: the masked one's turns are context.
    turns = [("User", "a"), ("Assistant", "b"), ("User", "c"), ("Bot", "d")]
    assert read_one(tmp_path, nemo(turns, mask="Assistant"))[1] == (False, False, False, True)


def test_the_chosen_side_of_a_pair(tmp_path):
    hh = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"}
    hh["rejected"] = hh["chosen"].replace("d", "e")
    said, learned = read_one(tmp_path, hh)
    assert said == [(USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, "d")]
    assert learned == (False, True, False, True)


def test_a_row_of_ultrafeedback_repeats_the_chosen_side(tmp_path):
    sides = {name: chat((USER, "a"), (ASSISTANT, name))["messages"] for name in ("chosen", "rejected")}
    said, _ = read_one(tmp_path, {"prompt": "a", **sides, "messages": sides["chosen"], "score_chosen": 8.5})
    assert said == [(USER, "a"), (ASSISTANT, "chosen")]


BAD = {
    "{": ("malformed", "not a JSON object in UTF-8"),
    "[1]": ("malformed", "expected a JSON object, found list"),
    '{"text": "a"}': ("malformed", 'expected "input" and "output", "messages"'),
    '{"input": "a"}': ("malformed", '"output" must be a text that is not empty, found None'),
    '{"input": "a", "output": 4}': ("malformed", '"output" must be a text that is not empty, found 4'),
    json.dumps(chat((USER, "a"))): ("nothing_learned", "no turn of the assistant counts"),
    json.dumps(chat((ASSISTANT, "a"))): ("malformed", "begins with the answer"),
    json.dumps(chat((USER, "a"), (ASSISTANT, " "))): ("malformed", "message 1, an answer, is empty"),
    json.dumps(chat(("tool", "a"))): ("malformed", "the role of message 0 must be one of"),
    json.dumps(nemo([("User", "a"), ("Assistant", "b")], mask="Assistant")): ("nothing_learned", "no turn of the"),
    json.dumps(nemo([("User", "a"), ("Owl", "b")])): ("malformed", "turn 1 is from 'Owl', which is none of user"),
    json.dumps(nemo([("User", 1)])): ("malformed", 'turn 0 must be {"from", "value"}'),
    json.dumps(nemo([("User", "a")], type="VALUE_TO_TEXT")): ("attributes", '"type" (VALUE_TO_TEXT) asks for'),
    json.dumps(nemo([("Bot", "a"), ("User", "b"), ("Assistant", "c")], mask="Bot")): ("malformed", "begins with the"),
    '{"instruction": "Translate", "input": "a", "output": "b"}': ("malformed", '"instruction" is part of the question'),
    json.dumps({"system": "s", **chat((USER, "a"), (ASSISTANT, "b"))}): ("malformed", 'not read beside "messages"'),
    json.dumps({"chosen": "a", "rejected": "b"}): ("malformed", "the pair's prompt cannot be told: malformed"),
    json.dumps({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}): (
        "different_prompts", "the pair's prompt cannot be told: different_prompts"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_bad_lines_are_left_out_with_file_line_and_reason(tmp_path, name):
    good = {"input": "a", "output": "b"}
    path = write(tmp_path / name, [good, "", *BAD, good])
    demonstrations, left_out = read_demonstrations(path, tmp_path)
    assert [d.place for d in demonstrations] == [f"{path}:1", f"{path}:{len(BAD) + 3}"]
    assert [item.place for item in left_out] == [f"{path}:{line}" for line in range(3, len(BAD) + 3)]
    for item, (fault, said) in zip(left_out, BAD.values(), strict=True):
        assert item.fault == fault and said in item.details and item.details.startswith(item.place), item
    assert count_faults(left_out) == "14 malformed, 2 nothing_learned, 1 attributes, 1 different_prompts"


def test_a_source_without_a_usable_line_is_an_error(tmp_path):
    path = write(tmp_path / "data.jsonl", ["{", "{"])
    with pytest.raises(DataError, match=r"no usable demonstration \(2 malformed; the first: .*data\.jsonl:1: not a"):
        read_demonstrations(path, tmp_path)
    with pytest.raises(DataError, match="the file is empty"):
        read_demonstrations(write(tmp_path / "empty.jsonl", []), tmp_path)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"input": "a", "output": "b"}\n' * 99)[:-9])
    with pytest.raises(DataError, match="the gzip stream is damaged or cut off"):
        read_demonstrations(str(tmp_path / "cut.jsonl.gz"), tmp_path)


def test_the_limit_counts_usable_lines(tmp_path):
    path = write(tmp_path / "data.jsonl", ["{", *({"input": str(i), "output": "b"} for i in range(9))])
    demonstrations, left_out = read_demonstrations(path, tmp_path, limit=2)
    assert [d.messages[0]["content"] for d in demonstrations] == ["0", "1"]
    assert [item.place for item in left_out] == [f"{path}:1"]


def test_built_in_demonstrations_continue_prompts(tmp_path):
    from alignment.reviews import WINDOW_WORDS, review_prompts
    from alignment.toy import toy_prompts

    for source, prompts in (
        ("toy:demonstrations", toy_prompts("toy:prompts")),
        ("imdb:demonstrations", review_prompts("imdb:prompts")),
    ):
        demonstrations, left_out = read_demonstrations(source, tmp_path, limit=20)
        assert left_out == [] and len(demonstrations) == 20
        asked = {p.messages[0]["content"] for p in prompts}
        for i, d in enumerate(demonstrations, start=1):
            question, answer = (m["content"] for m in d.messages)
            assert question in asked and answer.startswith(" ") and d.place == f"{source}:{i}"
            if source.startswith("imdb"):
                assert len(question.split()) - 2 + len(answer.split()) <= WINDOW_WORDS
    with pytest.raises(DataError, match="known: toy:demonstrations, toy:held_out_demonstrations"):
        read_demonstrations("toy:other", tmp_path)
    with pytest.raises(DataError, match="known: imdb:demonstrations"):
        read_demonstrations("imdb:other", tmp_path)


json_values = st.recursive(
    st.sampled_from([None, True, 4, "", " ", "a", "user", "assistant", "\n\nHuman: a\n\nAssistant: b"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner, max_size=4)
    ),
    max_leaves=8,
)
records = st.dictionaries(
    st.sampled_from(["input", "output", "messages", "conversations", "mask", "system", "type", "chosen", "rejected"]),
    json_values,
    min_size=1,
)


@given(lines=st.lists(records, max_size=6))
def test_every_line_is_a_demonstration_or_left_out_with_its_place(lines, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("any") / "data.jsonl", [{"input": "a", "output": "b"}, *lines])
    demonstrations, left_out = read_demonstrations(path, tmp_path_factory.getbasetemp())
    places = [item.place for item in (*demonstrations, *left_out)]
    assert sorted(places) == sorted(f"{path}:{line}" for line in range(1, len(lines) + 2))
    for d in demonstrations:
        assert d.messages[0]["role"] != "assistant"
        assert d.learned[-1] and len(d.learned) == len(d.messages)
        assert all(m["role"] == "assistant" for m, counts in zip(d.messages, d.learned, strict=True) if counts)
    assert all(isinstance(item, LeftOut) and item.details for item in left_out)
