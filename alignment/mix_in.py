"""The SFT mix-in: demonstrations that every RS step trains on beside the responses that it selected.

They hold on to what the policy learned by imitation while the reward pulls it elsewhere. Of each demonstration the last
answer is learned; its prompt is nobody's in validation or evaluation. Off unless `training.sft_mix` names a source.

    <run>/excluded_examples.jsonl   what was left out: place, fault, details
    <run>/prompts/mix_in.jsonl    id (file:line), messages of the prompt; prompt_ids, response_ids that the policy reads
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignment.atomic_files import json_text, write_text
from alignment.config import Config
from alignment.demonstrations import count_faults, encode_demonstrations, read_demonstrations
from alignment.errors import DataError
from alignment.files import read_jsonl
from alignment.policy_source import base_folder
from alignment.preparation import cache_folder, load_prompt_sets
from alignment.prompts import prompt_text, read_order
from alignment.types import Demonstration, Rollout, TokenSequence

MIX_IN = "mix_in.jsonl"
"""Its file, among those of the prompts."""
MEASURED = ("validation", "evaluation")
"""Sets of prompts that are nobody's demonstration."""


def prepare_mix_in(config: Config, run: Path, on_note: Callable[[str], None]) -> None:
    """Read, tokenize and write the demonstrations; what cannot be used is counted. Raises DataError."""
    from models.policy import load_ending_tokens, load_reader

    source, cache = config.training.sft_mix, cache_folder(config)
    if source is None:
        return
    base = base_folder(config, on_note)
    reader = load_reader(base, prompt_format=config.policy.prompt_format)
    eos_ids = load_ending_tokens(base, reader)
    longest = config.prompts.max_prompt_tokens + config.rollouts.max_new_tokens
    sets = load_prompt_sets(run)
    held_out = {prompt_text(prompt): name for name in MEASURED for prompt in getattr(sets, name)}
    demonstrations, left_out = read_demonstrations(source, cache, turns="last")
    key = "prompts.max_prompt_tokens + rollouts.max_new_tokens"
    encoded, unfit = encode_demonstrations(demonstrations, reader, eos_ids, longest=longest, key=key, held_out=held_out)
    left_out += unfit
    lines = [_line(demonstration, sequence) for demonstration, sequence in encoded]
    write_text(run / "excluded_examples.jsonl", "".join(json_text(asdict(item)) + "\n" for item in left_out))
    told = f"SFT mix-in: {len(lines)} demonstrations of {source}"
    on_note(f"{told}, left out: {count_faults(left_out)}" if left_out else told)
    if len(lines) < config.training.num_sft_examples:
        raise DataError(
            f"training.sft_mix ({source}) has {len(lines)} usable demonstrations, and training.num_sft_examples is "
            f"{config.training.num_sft_examples}: lower that or name a larger source"
        )
    write_text(run / "prompts" / MIX_IN, "".join(lines))


def _line(demonstration: Demonstration, sequence: TokenSequence) -> str:
    start = sequence.learned.index(True)
    sides = {"prompt_ids": sequence.ids[:start], "response_ids": sequence.ids[start:]}
    return json_text({"id": demonstration.place, "messages": demonstration.messages[:-1], **sides}) + "\n"


def load_mix_in(config: Config, run: Path) -> tuple[Rollout, ...]:
    """What `prepare_mix_in` wrote, laid out like selected responses; empty where there is no mix-in."""
    if config.training.sft_mix is None:
        return ()
    return tuple(
        Rollout(
            prompt_id=str(row.get("id")),
            rollout_index=0,
            response="",
            finish_reason="stop",
            prompt_ids=_ids(row, "prompt_ids", line),
            response_ids=_ids(row, "response_ids", line),
            is_reference=True,
        )
        for line, row in read_jsonl(run / "prompts" / MIX_IN)
    )


def _ids(row: dict[str, Any], key: str, line: int) -> tuple[int, ...]:
    ids = row.get(key)
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise DataError(f"prompts/{MIX_IN}:{line}: {key} are no token ids: put the run's own file back")
    return tuple(ids)


def mixed(selected: Sequence[Rollout], demonstrations: Sequence[Rollout], config: Config, step: int) -> list[Rollout]:
    """What RS step `step` (from 1) trains on: the selected responses and its demonstrations, spread evenly among them.

    Optimizer steps cut this list, so each gets its part of both. An epoch of the demonstrations is a permutation given
    by the seed, as that of the prompts is. An empty selection stays empty: such a step updates nothing.
    """
    count = config.training.num_sft_examples
    if not demonstrations or not selected:
        return list(selected)
    order = read_order(len(demonstrations), num_rollout_samples=count, seed=config.seed, step=step - 1)
    added = [demonstrations[i] for i in order]
    placed = [
        ((i + 0.5) / len(part), n, item) for n, part in enumerate((selected, added)) for i, item in enumerate(part)
    ]
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]
