"""Preference pairs: two answers to one prompt, of which the first is preferred.

Read from built-in names or JSON lines in four forms:

    {"chosen": TRANSCRIPT, "rejected": TRANSCRIPT}              "\\n\\nHuman: …\\n\\nAssistant: …" as in HH-RLHF
    {"chosen": MESSAGES, "rejected": MESSAGES}                  a "prompt" beside them is in both, or goes before both
    {"prompt": TEXT or MESSAGES, "chosen": TEXT, "rejected": TEXT}
    {"text": …} lines in turn                                   chosen, rejected, chosen, rejected … (NeMo-Aligner)

The first three may say how clearly the first is preferred: "margin", or else "score_chosen" and
"score_rejected" (as in UltraFeedback), of which the difference counts. null is as good as nothing.

A pair whose sides do not share all but the last turn, a malformed dialogue and a pair of equal answers are
left out and counted. A line of the wrong type, with other keys or with a negative margin is an error of the file.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from alignment.errors import DataError
from alignment.files import local_copy, named, read_jsonl
from alignment.reviews import review_pairs
from alignment.toy import toy_pairs
from alignment.types import Message, PreferencePair

ROLES = ("system", "user", "assistant")
LeftOut = Literal["different_prompts", "malformed", "identical"]
Sides = tuple[tuple[Message, ...], str, str]
OnLeftOut = Callable[[str, LeftOut], None]
"""Receives "file:line" of a pair that is left out, and why."""

_TURN = re.compile(r"\n\n(Human|Assistant):")
_CUT_OFF = re.compile(r"\n\nHuman:?\s*\Z")
_SCORES = ("score_chosen", "score_rejected")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


def read_pairs(
    source: str, cache: Path, *, limit: int | None = None, on_left_out: OnLeftOut | None = None
) -> tuple[list[PreferencePair], dict[LeftOut, int]]:
    """At most `limit` pairs of a source in its order, and how many were left out on the way, by reason.

    `on_left_out` is told of each of the latter that a file holds. `source` is `imdb:…`, `rotten_tomatoes:…` or
    `toy:…` (see alignment.reviews, alignment.toy), or a .jsonl or .jsonl.gz file as a path, s3:// or hf://. Raises
    DataError, with file and line where there is one.
    """
    if source.startswith(("imdb:", "rotten_tomatoes:")):
        return review_pairs(source)[:limit], {}
    if source.startswith("toy:"):
        return toy_pairs(source)[:limit], {}
    path = local_copy(source, cache)
    pairs: list[PreferencePair] = []
    left_out: Counter[LeftOut] = Counter()
    for record, place in _paired_lines(path):
        sides, margin = shared_prompt(record, place), _margin(record, place)
        if not isinstance(sides, str) and sides[1] == sides[2]:
            sides = "identical"
        if isinstance(sides, str):
            left_out[sides] += 1
            if on_left_out is not None:
                on_left_out(place, sides)
        else:
            pairs.append(PreferencePair(*sides, margin))
            if len(pairs) == limit:
                break
    if not pairs:
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "the file is empty"
        raise DataError(f"{path}: no usable preference pair ({counts}); expected lines such as {{chosen, rejected}}")
    return pairs, dict(left_out)


def conversation(prompt: Sequence[Message], response: str) -> list[Message]:
    """One side of a pair (or a prompt and a response) as messages. Without a prompt it is one assistant message."""
    return [*prompt, {"role": "assistant", "content": response}]


def shared_prompt(record: dict[str, Any], place: str) -> Sides | LeftOut:
    """(prompt, chosen response, rejected response) of a {"chosen", "rejected"} record, or why it is left out.

    `place` is "file:line". Raises DataError for values of the wrong type.
    """
    chosen, rejected, prompt = record["chosen"], record["rejected"], record.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None:
            shared = parse_prompt(prompt, place) if prompt else ()
            return (shared, chosen, rejected) if chosen.strip() and rejected.strip() else "malformed"
        try:
            sides = [parse_transcript(chosen), parse_transcript(rejected)]
        except DataError:
            return "malformed"
    elif isinstance(chosen, list) and isinstance(rejected, list):
        sides = [parse_messages(side, place) for side in (chosen, rejected)]
        if prompt:
            sides = [_after(parse_prompt(prompt, place), side) for side in sides]
    else:
        raise DataError(
            f'{place}: "chosen" and "rejected" must both be strings or both lists of messages, '
            f"found {type(chosen).__name__} and {type(rejected).__name__}"
        )
    if any(side[-1]["role"] != "assistant" or not side[-1]["content"].strip() for side in sides):
        return "malformed"
    if sides[0][:-1] != sides[1][:-1]:
        return "different_prompts"
    return sides[0][:-1], sides[0][-1]["content"], sides[1][-1]["content"]


def _after(prompt: tuple[Message, ...], side: tuple[Message, ...]) -> tuple[Message, ...]:
    """A side that goes on from `prompt`, with it; one that holds it already, as UltraFeedback's do, as it stands.

    There the prompt is the text of a user's message, the space around it or a system's message before it aside.
    """
    if side[: len(prompt)] == prompt:
        return side
    asked = {message["content"].strip() for message in side if message["role"] == "user"}
    is_held = len(prompt) == 1 and prompt[0]["role"] == "user" and prompt[0]["content"].strip() in asked
    return side if is_held else prompt + side


def is_transcript(text: str) -> bool:
    """Whether a text begins as a transcript does; `parse_transcript` tells whether it is a whole one."""
    return _TURN.match(text) is not None


def parse_transcript(text: str) -> tuple[Message, ...]:
    """The turns of "\\n\\nHuman: …\\n\\nAssistant: …", the space around each stripped.

    Human becomes the role user; a Human at the very end who says nothing is no turn. Raises DataError unless the turns
    alternate from Human to Assistant and each says something.
    """
    start, *parts = _TURN.split(_CUT_OFF.sub("", text))
    speakers, contents = parts[::2], [content.strip() for content in parts[1::2]]
    if start.strip() or not parts:
        raise DataError(f"a transcript begins with a blank line and Human:, found {text[:40]!r}")
    if speakers != ["Human", "Assistant"] * (len(speakers) // 2):
        raise DataError(f"a transcript alternates from Human to Assistant, found {', '.join(speakers)}")
    if not all(contents):
        raise DataError(f"turn {contents.index('') + 1} of {len(contents)} of the transcript is empty")
    return tuple(
        {"role": _TRANSCRIPT_ROLES[speaker], "content": content}
        for speaker, content in zip(speakers, contents, strict=True)
    )


def parse_prompt(value: Any, place: str) -> tuple[Message, ...]:
    """A prompt given as text (one message of the user) or as messages. Raises DataError naming `place`."""
    if isinstance(value, str) and value.strip():
        return ({"role": "user", "content": value},)
    if isinstance(value, str):
        raise DataError(f"{place}: the prompt is an empty text")
    return parse_messages(value, place)


def parse_messages(value: Any, place: str) -> tuple[Message, ...]:
    """A list of {"role", "content"}; other keys are not read. Raises DataError that says what was found."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: expected a list of messages, found {_found(value)}")
    messages: list[Message] = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise DataError(f'{place}: message {i} must be {{"role", "content"}}, found {_found(message)}')
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"{place}: the role of message {i} must be one of {', '.join(ROLES)}, found {_found(role)}")
        if not isinstance(content, str):
            raise DataError(f"{place}: the content of message {i} must be a string, found {_found(content)}")
        messages.append({"role": role, "content": content})
    return tuple(messages)


def parse_number(value: Any, name: str, place: str) -> float:
    """A JSON number that a float can hold; true and false are none. Raises DataError naming `place` and `name`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise DataError(f"{place}: {name} must be a finite number, found {_found(value)}")
    return float(value)


def _margin(record: dict[str, Any], place: str) -> float | None:
    """How clearly the first side is preferred, or None. Raises DataError for a negative one or a wrong type."""
    given = {key: record[key] for key in ("margin", *_SCORES) if record.get(key) is not None}
    if not given:
        return None
    if "margin" in given:
        name, margin = '"margin"', parse_number(given["margin"], '"margin"', place)
    elif len(given) == 1:
        missing = next(key for key in _SCORES if key not in given)
        raise DataError(f'{place}: "{next(iter(given))}" stands without "{missing}": give both, or neither')
    else:
        name = '"score_chosen" - "score_rejected"'
        chosen, rejected = (parse_number(given[key], f'"{key}"', place) for key in _SCORES)
        margin = parse_number(chosen - rejected, name, place)
    if margin < 0:
        raise DataError(f"{place}: {name} must be >= 0, found {margin}: swap the sides, or leave the pair out")
    return margin


def _paired_lines(path: Path) -> Iterable[tuple[dict[str, Any], str]]:
    """Records with "chosen" and "rejected", and their places; two lines of {"text"} make one record."""
    waiting: str | None = None
    place = str(path)
    for line, record in read_jsonl(path):
        place = f"{path}:{line}"
        if waiting is None and "chosen" in record and "rejected" in record:
            yield record, place
        elif "text" in record and "chosen" not in record:
            text = record["text"]
            if not isinstance(text, str):
                raise DataError(f'{place}: "text" must be a string, found {_found(text)}')
            if waiting is None:
                waiting = text
                continue
            both_transcripts = is_transcript(waiting) and is_transcript(text)
            prompt: dict[str, Any] = {} if both_transcripts else {"prompt": ""}
            yield {"chosen": waiting, "rejected": text, **prompt}, place
            waiting = None
        else:
            raise DataError(
                f'{place}: expected "chosen" and "rejected", or "text" lines in turn, found {named(record)}'
            )
    if waiting is not None:
        raise DataError(f'{place}: an odd number of "text" lines: the last chosen text has no rejected one')


def _found(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
