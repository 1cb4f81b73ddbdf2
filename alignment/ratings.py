"""Rated answers: one answer to a prompt, with a rating for each of several attributes.

Read from JSON lines. The answer stands in one of

    {"messages": MESSAGES}                                  the last message is the answer
    {"prompt": TEXT or MESSAGES, "response": TEXT}          an empty prompt is none
    {"text": TRANSCRIPT or TEXT}                            as in HH-RLHF; another text is an answer without a prompt

and its ratings, in the same record, in one of

    {"ratings": {"helpfulness": 4, "verbosity": null}}      null or left out: not rated
    {"label": [4, -100]}                                    in the order of the attributes; -100: not rated

Lines of {"text", "label"} are NeMo-Aligner's.

A malformed dialogue and an answer that no attribute rates are left out and counted. A line of the wrong type or
with other keys is an error of the file. Ratings are read as they are, whatever their scale.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from alignment.errors import ConfigError, DataError
from alignment.files import local_copy, named, read_jsonl
from alignment.preferences import (
    conversation,
    is_transcript,
    parse_messages,
    parse_number,
    parse_prompt,
    parse_transcript,
)
from alignment.types import Message, RatedAnswer

LeftOut = Literal["malformed", "unlabelled"]
NOT_RATED = -100
"""NeMo-Aligner's value in a "label" for an attribute without one."""


def read_ratings(
    source: str, cache: Path, attributes: Sequence[str], limit: int | None = None
) -> tuple[list[RatedAnswer], dict[LeftOut, int]]:
    """At most `limit` rated answers of a source in its order, and how many were left out on the way, by reason.

    `source` is a .jsonl or .jsonl.gz file as a path, s3:// or hf://. `attributes` names the ratings to read and
    gives the order of an answer's labels; ratings by other names are passed over.

    Raises ConfigError for attributes that are no distinct names, DataError with file and line where there is one.
    """
    if not attributes or "" in attributes or len(set(attributes)) < len(attributes):
        raise ConfigError(f"attributes ({list(attributes)}) must be one or more names, each of them once")
    path = local_copy(source, cache)
    answers: list[RatedAnswer] = []
    left_out: Counter[LeftOut] = Counter()
    for line, record in read_jsonl(path):
        place = f"{path}:{line}"
        turns, labels = _turns(record, place), _labels(record, attributes, place)
        if turns is None:
            left_out["malformed"] += 1
        elif all(label is None for label in labels):
            left_out["unlabelled"] += 1
        else:
            answers.append(RatedAnswer(turns[:-1], turns[-1]["content"], labels))
            if len(answers) == limit:
                break
    if not answers:
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "the file is empty"
        raise DataError(f"{path}: no usable answer ({counts}) rated by any of {', '.join(attributes)}")
    return answers, dict(left_out)


def _turns(record: dict[str, Any], place: str) -> tuple[Message, ...] | None:
    """The conversation that ends with the answer, or None for a malformed one. Raises DataError naming `place`."""
    match [key for key in ("messages", "response", "text") if key in record]:
        case ["messages"]:
            turns = parse_messages(record["messages"], place)
        case ["response"] if "prompt" in record:
            prompt, response = record["prompt"], _string(record, "response", place)
            turns = tuple(conversation(() if prompt == "" else parse_prompt(prompt, place), response))
        case ["text"]:
            text = _string(record, "text", place)
            try:
                turns = parse_transcript(text) if is_transcript(text) else tuple(conversation((), text))
            except DataError:
                return None
        case _:
            raise DataError(
                f'{place}: expected one of "messages", "prompt" with "response", "text", '
                f"found {named(record) or 'none'}"
            )
    return turns if turns[-1]["role"] == "assistant" and turns[-1]["content"].strip() else None


def _labels(record: dict[str, Any], attributes: Sequence[str], place: str) -> tuple[float | None, ...]:
    """One label per attribute, None where it was not rated. Raises DataError naming `place`."""
    match [key for key in ("ratings", "label") if key in record]:
        case ["ratings"]:
            ratings = record["ratings"]
            if not isinstance(ratings, dict):
                raise DataError(f'{place}: "ratings" must be an object of numbers, found {ratings!r:.60}')
            values = [ratings.get(name) for name in attributes]
        case ["label"]:
            label = record["label"]
            if not isinstance(label, list) or len(label) != len(attributes):
                raise DataError(
                    f'{place}: "label" must be a list of {len(attributes)} numbers, in the order '
                    f"{', '.join(attributes)}, found {label!r:.60}"
                )
            values = [None if value == NOT_RATED else value for value in label]
        case _:
            raise DataError(f'{place}: expected one of "ratings", "label", found {named(record)}')
    return tuple(
        None if value is None else parse_number(value, f"the rating {name}", place)
        for name, value in zip(attributes, values, strict=True)
    )


def _string(record: dict[str, Any], key: str, place: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f'{place}: "{key}" must be a string, found {type(value).__name__} {value!r:.60}')
    return value
