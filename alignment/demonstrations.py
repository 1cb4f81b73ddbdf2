"""Demonstrations: conversations whose answers are imitated, which is what supervised fine-tuning learns from.

Read from built-in names or JSON lines in four forms:

    {"input": TEXT, "output": TEXT}                     one question or beginning, and what follows
    {"messages": MESSAGES}                              {"role", "content"} each, one answer or several
    {"system": TEXT, "mask": NAME, "conversations": [{"from": NAME, "value": TEXT}, …]}       NeMo's
    {"chosen", "rejected"}                              a preference pair, of which the chosen side is imitated,
                                                        also where "messages" repeats it (UltraFeedback)

By default the loss counts every assistant's turn, with `turns="last"` only the last. NeMo's "mask" names the speaker
whose turns it does not count ("User" where it is left out); the others' it does. What follows the last counted turn
is cut off, since nothing is learned from it.

A line that cannot be used, whatever is wrong with it, is left out and told by file and line; only a source without
a single usable line is an error.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alignment.errors import DataError
from alignment.files import local_copy, named, read_jsonl
from alignment.preferences import conversation, parse_messages, shared_prompt
from alignment.prompts import PromptText, prompt_text
from alignment.reviews import review_demonstrations
from alignment.toy import toy_demonstrations
from alignment.types import Demonstration, LeftOut, Message, Prompt, TokenSequence

if TYPE_CHECKING:
    from models.policy import PromptReader

Turns = Literal["all", "last"]
Counts = Callable[[int], bool]
"""Whether the loss may count the message of a number."""
SPEAKERS = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt"), "assistant"),
    "system": "system",
}
"""Names of speakers in "from", in lower case, and their roles."""
CONTEXT = ("system", "instruction")
"""Keys that other formats give a part of the question under: without it, another question would be learned."""


def _any(_: int) -> bool:
    return True


def read_demonstrations(
    source: str, cache: Path, *, turns: Turns = "all", limit: int | None = None
) -> tuple[list[Demonstration], list[LeftOut]]:
    """At most `limit` demonstrations of a source in its order, and what was left out on the way.

    `source` is `imdb:demonstrations`, `toy:demonstrations` or `toy:held_out_demonstrations` (see alignment.reviews,
    alignment.toy), or a .jsonl or .jsonl.gz file as a path, s3:// or hf://. Raises DataError for a source that cannot
    be read or has no usable line.
    """
    if source.startswith(("imdb:", "toy:")):
        built_in = review_demonstrations if source.startswith("imdb:") else toy_demonstrations
        pairs = enumerate(built_in(source)[:limit], start=1)
        return [_demonstration(_pair(*pair), turns, f"{source}:{number}") for number, pair in pairs], []
    path = local_copy(source, cache)
    demonstrations: list[Demonstration] = []
    left_out: list[LeftOut] = []

    def bad(line: int, error: DataError) -> None:
        left_out.append(LeftOut(f"{path}:{line}", "malformed", str(error)))

    for line, record in read_jsonl(path, bad):
        place = f"{path}:{line}"
        try:
            messages, counted = _turns(record, place)
            demonstrations.append(_demonstration(messages, turns, place, counted))
        except _Unusable as unusable:
            left_out.append(LeftOut(place, unusable.fault, str(unusable)))
        except DataError as error:
            left_out.append(LeftOut(place, "malformed", str(error)))
        if len(demonstrations) == limit:
            break
    if not demonstrations:
        first = f"{count_faults(left_out)}; the first: {left_out[0].details}" if left_out else "the file is empty"
        raise DataError(f"{path}: no usable demonstration ({first})")
    return demonstrations, left_out


def encode_demonstrations(
    demonstrations: Iterable[Demonstration],
    reader: "PromptReader",
    eos_ids: Sequence[int],
    *,
    longest: int,
    key: str,
    held_out: Mapping[PromptText, str],
) -> tuple[list[tuple[Demonstration, TokenSequence]], list[LeftOut]]:
    """Demonstrations with the tokens that the policy reads, and those that cannot be learned from.

    `longest` is the most tokens that one may have, by the config key `key`. `held_out` are prompts that measure the
    policy, each with the name of its set: no answer to one of them is learned.
    """
    from models.sequences import encode_demonstration

    encoded: list[tuple[Demonstration, TokenSequence]] = []
    left_out: list[LeftOut] = []
    for demonstration in demonstrations:
        place = demonstration.place
        try:
            sequence = encode_demonstration(reader, demonstration, eos_ids)
        except DataError as error:
            left_out.append(LeftOut(place, "not_rendered", str(error)))
            continue
        held = next((held_out[text] for text in _answered(demonstration) if text in held_out), None)
        if len(sequence.ids) > longest:
            left_out.append(LeftOut(place, "too_long", f"{place}: {len(sequence.ids)} tokens, {key} is {longest}"))
        elif held is not None:
            details = f"{place}: its prompt is one of {held}, which measures the policy"
            left_out.append(LeftOut(place, "held_out_prompt", details))
        else:
            encoded.append((demonstration, sequence))
    return encoded, left_out


def _answered(demonstration: Demonstration) -> Iterable[PromptText]:
    """The prompts whose answers are learned: of a conversation, what comes before each answer that counts."""
    messages, learned = demonstration.messages, demonstration.learned
    return (prompt_text(Prompt("", messages[:i])) for i, counts in enumerate(learned) if counts)


def count_faults(left_out: Iterable[LeftOut]) -> str:
    """What was left out in a few words, e.g. "12 malformed, 3 different_prompts"."""
    return ", ".join(f"{count} {fault}" for fault, count in Counter(item.fault for item in left_out).most_common())


class _Unusable(DataError):
    """A record that is left out, for a reason that has a name of its own."""

    def __init__(self, fault: str, text: str) -> None:
        super().__init__(text)
        self.fault = fault


def _turns(record: dict[str, Any], place: str) -> tuple[Sequence[Message], Counts]:
    """A record's messages, and whether NeMo's mask lets the message of a number count. Raises DataError."""
    given = [key for key in ("input", "messages", "conversations", "chosen") if key in record]
    unread = [key for key in CONTEXT if record.get(key) and (key, given) != ("system", ["conversations"])]
    if given and unread:
        raise DataError(
            f'{place}: "{unread[0]}" is part of the question, and is not read beside "{given[0]}": '
            "put it into the input, or into a message"
        )
    match given:
        case ["input"]:
            return _pair(*(_text(record, key, place) for key in ("input", "output"))), _any
        case ["messages"]:
            return parse_messages(record["messages"], place), _any
        case ["conversations"]:
            return _nemo_turns(record, place)
        case ["chosen"] | ["messages", "chosen"] if "rejected" in record:  # UltraFeedback repeats the chosen side
            sides = shared_prompt(record, place)
            if isinstance(sides, str):
                raise _Unusable(sides, f"{place}: the pair's prompt cannot be told: {sides}")
            return conversation(sides[0], sides[1]), _any
    raise DataError(
        f'{place}: expected "input" and "output", "messages", "conversations", or "chosen" and "rejected", '
        f"found {named(record) or 'none'}"
    )


def _nemo_turns(record: dict[str, Any], place: str) -> tuple[list[Message], Counts]:
    """Messages of NeMo's chat format; its attribute labels ("type") are refused, not dropped. Raises DataError."""
    mask = record.get("mask", "User")
    if record.get("type") is not None:
        raise _Unusable("attributes", f'{place}: "type" ({record["type"]}) asks for attribute labels in the text')
    if not isinstance(record["conversations"], list) or not isinstance(mask, str):
        raise DataError(f'{place}: "conversations" must be a list and "mask" the name of a speaker')
    messages: list[Message] = []
    names: list[str] = []
    if record.get("system"):
        messages.append({"role": "system", "content": _text(record, "system", place)})
        names.append(mask)
    for i, turn in enumerate(record["conversations"]):
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("from"), str)
            or not isinstance(turn.get("value"), str)
        ):
            raise DataError(f'{place}: turn {i} must be {{"from", "value"}}, two texts, found {turn!r:.60}')
        role = SPEAKERS.get(turn["from"].lower())
        if role is None:
            known = ", ".join(SPEAKERS)
            raise DataError(f"{place}: turn {i} is from {turn['from']!r}, which is none of {known}")
        messages.append({"role": role, "content": turn["value"]})
        names.append(turn["from"])
    return messages, lambda i: names[i] != mask


def _demonstration(messages: Sequence[Message], turns: Turns, place: str, counts: Counts = _any) -> Demonstration:
    """Messages up to the last that counts. Raises DataError where none does, or where one that does is empty."""
    counted = [i for i, message in enumerate(messages) if message["role"] == "assistant" and counts(i)]
    if not counted:
        raise _Unusable("nothing_learned", f"{place}: no turn of the assistant counts: nothing would be learned")
    if messages[0]["role"] == "assistant":
        raise DataError(f"{place}: the conversation begins with the answer: give it a question")
    if turns == "last":
        counted = counted[-1:]
    empty = [i for i in counted if not messages[i]["content"].strip()]
    if empty:
        raise DataError(f"{place}: message {empty[0]}, an answer, is empty")
    kept = tuple(messages[: counted[-1] + 1])
    return Demonstration(kept, tuple(i in counted for i in range(len(kept))), place)


def _pair(question: str, answer: str) -> list[Message]:
    return conversation([{"role": "user", "content": question}], answer)


def _text(record: dict[str, Any], key: str, place: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{place}: "{key}" must be a text that is not empty, found {value!r:.60}')
    return value
