"""What a run does once before anything is trained: its prompts, checked, split and written down.

Every prompt that cannot be used is listed in `excluded_prompts.jsonl` with its id and the reason. The
sets are written to the run folder, so that workers, resumes and readers a year later see the same ones.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.atomic_files import json_text, write_text
from alignment.config import Config
from alignment.embedded import policy_folder
from alignment.errors import DataError
from alignment.prompts import exclude_overlap, read_order, read_prompts, split_held_out
from alignment.types import Prompt

NAMES = ("train", "validation", "evaluation")


@dataclass(frozen=True, slots=True)
class PromptSets:
    """The run's prompts; no text is in two of the sets."""

    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    evaluation: tuple[Prompt, ...]


def cache_folder(config: Config) -> Path:
    """Where converted models and downloads are kept, shared by all runs of a root."""
    return Path(config.run.root) / "cache"


def prepare(config: Config, run: Path, on_note: Callable[[str], None]) -> None:
    """Write the prompt sets of a run. Raises ConfigError, DataError or ModelError."""
    from models.policy import check_context, load_reader

    cache = cache_folder(config)
    reader = load_reader(policy_folder(config.policy.model, cache, on_note), prompt_format=config.policy.prompt_format)
    check_context(
        reader,
        max_prompt_tokens=config.prompts.max_prompt_tokens,
        max_new_tokens=config.rollouts.max_new_tokens,
    )

    def fitting(prompts: Sequence[Prompt], source: str) -> list[Prompt]:
        limit, kept = config.prompts.max_prompt_tokens, []
        for prompt in prompts:
            try:
                length = len(reader.encode(reader.text(prompt)))
            except DataError as error:
                note(prompt.prompt_id, str(error))
                continue
            if 0 < length <= limit:
                kept.append(prompt)
            else:
                note(prompt.prompt_id, f"{length} tokens, prompts.max_prompt_tokens is {limit}")
        if not kept:
            refused = excluded[-1][1] if excluded else "the source is empty"
            raise DataError(
                f"{source}: none of its {len(prompts)} prompts can be used; the last one: {refused}. "
                "Raise prompts.max_prompt_tokens, or correct the prompts"
            )
        return kept

    excluded: list[tuple[str, str]] = []

    def note(prompt_id: str, reason: str) -> None:
        excluded.append((prompt_id, reason))

    held_out = fitting(read_prompts(config.prompts.held_out, cache, note), config.prompts.held_out)
    validation, evaluation = split_held_out(
        held_out,
        num_validation=config.validation.num_prompts,
        num_evaluation=config.evaluation.num_prompts,
        seed=config.seed,
    )
    train, overlap = exclude_overlap(read_prompts(config.prompts.train, cache, note), [*validation, *evaluation])
    excluded.extend(overlap)
    train = fitting(train, config.prompts.train)
    read_order(len(train), num_rollout_samples=config.rollouts.num_rollout_samples, seed=config.seed, step=0)

    for name, prompts in zip(NAMES, (train, validation, evaluation), strict=True):
        write_text(run / "prompts" / f"{name}.jsonl", "".join(_line(p) for p in prompts))
    write_text(
        run / "excluded_prompts.jsonl",
        "".join(json_text({"id": i, "reason": reason}) + "\n" for i, reason in excluded),
    )
    if excluded:
        on_note(f"{len(excluded)} prompts excluded, listed in {run / 'excluded_prompts.jsonl'}")


def load_prompt_sets(run: Path) -> PromptSets:
    """The sets that `prepare` wrote."""
    return PromptSets(*(_read(run / "prompts" / f"{name}.jsonl") for name in NAMES))


def _line(prompt: Prompt) -> str:
    reference = {} if prompt.reference is None else {"reference": prompt.reference}
    return json_text({"id": prompt.prompt_id, "messages": list(prompt.messages), **reference}) + "\n"


def _read(path: Path) -> tuple[Prompt, ...]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return tuple(Prompt(row["id"], tuple(row["messages"]), row.get("reference")) for row in rows)
