"""Prompts: where they are read from, which judge and which train, and in which order they are read.

File formats, JSON lines: {"text": TEXT}, {"prompt": TEXT or MESSAGES}, {"messages": MESSAGES}, or preference
pairs {"chosen", "rejected"} whose shared turns are the prompt and whose chosen answer is its reference answer. An
optional "id" names a prompt, an optional "reference" is an answer to it. How long a prompt is in tokens is looked
at elsewhere: it depends on the policy.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignment.errors import ConfigError, DataError
from alignment.files import local_copy, named, read_jsonl
from alignment.preferences import parse_messages, parse_prompt, shared_prompt
from alignment.reviews import review_prompts
from alignment.toy import toy_prompts
from alignment.types import Message, Prompt

OnExcluded = Callable[[str, str], None]
PromptText = tuple[tuple[str, str], ...]
"""(role, content) of each message: what tells two prompts apart."""


def read_prompts(source: str, cache: Path, on_excluded: OnExcluded | None = None) -> list[Prompt]:
    """All prompts of a source in its order.

    `source` is `imdb:…` or `toy:…` (see alignment.reviews, alignment.toy), or a .jsonl or .jsonl.gz file as a
    path, s3:// or hf://. Ids default to `<file stem>:<line>`. A preference pair whose prompt cannot be told
    (a malformed dialogue, two different prompts) is passed to `on_excluded` as (prompt_id, reason); without
    it that is a DataError. Raises DataError, with file and line where there is one.
    """
    if source.startswith(("imdb:", "rotten_tomatoes:")):
        return review_prompts(source)
    if source.startswith("toy:"):
        return toy_prompts(source)
    path = local_copy(source, cache)
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    for line, record in read_jsonl(path):
        place = f"{path}:{line}"
        prompt_id = _prompt_id(record, f"{stem}:{line}", place)
        if prompt_id in lines:
            raise DataError(f"{place}: the id {prompt_id!r} is already that of line {lines[prompt_id]}; ids are unique")
        lines[prompt_id] = line
        prompt = _prompt(record, prompt_id, place)
        if isinstance(prompt, Prompt):
            prompts.append(prompt)
        elif on_excluded is not None:
            on_excluded(prompt_id, prompt)
        else:
            raise DataError(f"{place}: the prompt {prompt_id} cannot be used: {prompt}")
    if not prompts:
        raise DataError(f"{path}: holds no usable prompt; expected lines such as {{text}}, {{prompt}} or {{messages}}")
    return prompts


def split_held_out(
    prompts: Sequence[Prompt], *, num_validation: int, num_evaluation: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """(validation, evaluation) prompts: the first ones of a seeded permutation, no text twice over both.

    Raises ConfigError when there are too few.
    """
    distinct = _distinct(prompts, f"{seed}:held_out")
    if len(distinct) < num_validation + num_evaluation:
        raise ConfigError(
            f"validation.num_prompts ({num_validation}) + evaluation.num_prompts ({num_evaluation}) must be <= the "
            f"{len(distinct)} distinct prompts of prompts.held_out: lower them or name a larger source"
        )
    return distinct[:num_validation], distinct[num_validation : num_validation + num_evaluation]


def evaluation_split(prompts: Sequence[Prompt], *, num_evaluation: int, seed: int) -> list[Prompt]:
    """Evaluation prompts from a source of their own, chosen as `split_held_out` chooses. Raises ConfigError."""
    distinct = _distinct(prompts, f"{seed}:test")
    if len(distinct) < num_evaluation:
        raise ConfigError(
            f"evaluation.num_prompts ({num_evaluation}) must be <= the {len(distinct)} distinct prompts of "
            "evaluation.prompts that are not validation's: lower it or name a larger source"
        )
    return distinct[:num_evaluation]


def _distinct(prompts: Sequence[Prompt], seed: str) -> list[Prompt]:
    """The prompts in a seeded order, no text twice."""
    first_of_text: dict[PromptText, Prompt] = {}
    for i in _permutation(len(prompts), seed):
        first_of_text.setdefault(prompt_text(prompts[i]), prompts[i])
    return list(first_of_text.values())


def exclude_overlap(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> tuple[list[Prompt], list[tuple[str, str]]]:
    """Prompts whose text is no held-out prompt's, and (prompt_id, reason) of the others."""
    held_out_ids = {prompt_text(prompt): prompt.prompt_id for prompt in held_out}
    kept = [prompt for prompt in train if prompt_text(prompt) not in held_out_ids]
    excluded = [
        (prompt.prompt_id, f"same text as held-out prompt {held_out_ids[prompt_text(prompt)]}")
        for prompt in train
        if prompt_text(prompt) in held_out_ids
    ]
    return kept, excluded


def read_order(num_prompts: int, *, num_rollout_samples: int, seed: int, step: int) -> list[int]:
    """Indices of the prompts of RS step `step` (from 0): a slice of the permutation given by (seed, epoch).

    An epoch is floor(num_prompts / num_rollout_samples) steps; the few prompts at the end of its permutation
    wait for another epoch's, so that no step holds a prompt twice. The answer depends on nothing else: a
    resumed run reads on where it stopped. Raises ConfigError when a step needs more prompts than there are.
    """
    if num_rollout_samples > num_prompts:
        raise ConfigError(
            f"rollouts.num_rollout_samples ({num_rollout_samples}) must be <= the {num_prompts} usable prompts of "
            "prompts.train: lower it or name a larger source"
        )
    epoch, position = divmod(step, num_prompts // num_rollout_samples)
    permutation = _permutation(num_prompts, f"{seed}:{epoch}")
    return permutation[position * num_rollout_samples : (position + 1) * num_rollout_samples]


def _permutation(size: int, seed: str) -> list[int]:
    """A permutation of range(size), drawn with `random()` alone: the method whose course Python promises to keep."""
    rng = random.Random(seed)
    keys = [rng.random() for _ in range(size)]
    return sorted(range(size), key=keys.__getitem__)


def prompt_text(prompt: Prompt) -> PromptText:
    """What tells two prompts apart, whatever their ids: equal for those of the same messages."""
    return tuple((message["role"], message["content"]) for message in prompt.messages)


def _prompt_id(record: dict[str, Any], default: str, place: str) -> str:
    value = record.get("id", default)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f'{place}: "id" must be a string or an integer, found {value!r}')
    if not str(value).isprintable():
        raise DataError(f'{place}: "id" must be printable on one line, found {value!r}')
    return str(value)


def _prompt(record: dict[str, Any], prompt_id: str, place: str) -> Prompt | str:
    """The prompt, or why a preference pair gives none. Raises DataError naming `place`."""
    if "chosen" in record and "rejected" in record:
        sides = shared_prompt(record, place)
        if isinstance(sides, str):
            return {"malformed": "malformed dialogue", "different_prompts": "two different prompts"}.get(sides, sides)
        messages, chosen, _ = sides
        return Prompt(prompt_id, messages, chosen) if messages else "the pair has no prompt"
    return Prompt(prompt_id, _messages(record, place), _reference(record, place))


def _reference(record: dict[str, Any], place: str) -> str | None:
    reference = record.get("reference")
    if reference is not None and (not isinstance(reference, str) or not reference.strip()):
        raise DataError(f'{place}: "reference" must be a text that says something, found {reference!r}')
    return reference


def stored_prompt(record: dict[str, Any], place: str) -> Prompt:
    """A prompt as a run keeps it: {"id", "messages"} and perhaps "reference". Raises DataError naming `place`."""
    messages = parse_messages(record.get("messages"), place)
    return Prompt(_prompt_id(record, "", place), messages, _reference(record, place))


def _messages(record: dict[str, Any], place: str) -> tuple[Message, ...]:
    """The messages of a line that is no pair. Raises DataError naming `place`."""
    keys = [key for key in ("text", "prompt", "messages") if key in record]
    if len(keys) != 1:
        raise DataError(f"{place}: expected one of text, prompt, messages, found {named(keys or record) or 'none'}")
    value = record[keys[0]]
    if keys == ["text"] and not isinstance(value, str):
        raise DataError(f'{place}: "text" must be a string, found {type(value).__name__}')
    if keys == ["messages"] and not isinstance(value, list):
        raise DataError(f'{place}: "messages" must be a list, found {type(value).__name__}')
    messages = parse_prompt(value, place)
    if messages[-1]["role"] != "user":
        raise DataError(
            f"{place}: a prompt's last message is the user's, found {messages[-1]['role']}: leave the answer out"
        )
    return messages
