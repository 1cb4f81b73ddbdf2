"""What a run does once before anything is trained: its prompts, checked, split and written down.

Every prompt that cannot be used is listed in `excluded_prompts.jsonl` with its id and the reason. The
sets are written to the run folder, so that workers, resumes and readers a year later see the same ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from alignment.atomic_files import json_text, write_text
from alignment.config import Config
from alignment.errors import DataError
from alignment.files import read_jsonl
from alignment.policy_source import base_folder
from alignment.prompts import evaluation_split, exclude_overlap, read_order, read_prompts, split_held_out, stored_prompt
from alignment.types import Prompt
from alignment.workspace import local_root

if TYPE_CHECKING:
    from models.policy import PromptReader

NAMES = ("train", "validation", "evaluation")


@dataclass(frozen=True, slots=True)
class PromptSets:
    """The run's prompts; no text is in two of the sets."""

    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    evaluation: tuple[Prompt, ...]


def cache_folder(config: Config) -> Path:
    """Where converted models and downloads are kept, shared by all runs of a root, on this node where that is in S3."""
    return local_root(config.run) / "cache"


def total_steps(config: Config, run: Path) -> int:
    """RS steps of the whole run in the folder `run`, whose prompts are written."""
    return config.total_steps(len(load_prompt_sets(run).train))


def prepare(config: Config, run: Path, on_note: Callable[[str], None]) -> None:
    """Write the prompt sets of a run. Raises ConfigError, DataError or ModelError."""
    cache = cache_folder(config)
    fitting = _Fitting(config, [_reader(config, base_folder(config, on_note))])
    validation, evaluation = _held_out(config, fitting)
    train, overlap = exclude_overlap(fitting.read(config.prompts.train, cache), [*validation, *evaluation])
    fitting.excluded.extend(overlap)
    train = fitting.keep(train, config.prompts.train)
    read_order(len(train), num_rollout_samples=config.rollouts.num_rollout_samples, seed=config.seed, step=0)
    _write(run, {"train": train, "validation": validation, "evaluation": evaluation}, fitting.excluded, on_note)


def prepare_evaluation(
    config: Config, run: Path, policies: Sequence[str], seen: Sequence[Prompt], on_note: Callable[[str], None]
) -> None:
    """Write the prompts that judge `policies` (folders or hub names), which were trained or chosen on `seen`.

    They are the ones that a run of this config evaluates on; those among `seen` are left out and listed.
    Raises ConfigError, DataError or ModelError.
    """
    fitting = _Fitting(config, [_reader(config, policy) for policy in policies])
    _, evaluation = _held_out(config, fitting)
    evaluation, overlap = exclude_overlap(evaluation, seen)
    fitting.excluded.extend((i, reason.replace("held-out", "training or validation")) for i, reason in overlap)
    if len(evaluation) < 2:
        raise DataError(
            f"{len(evaluation)} of the evaluation's prompts are new to the policy's run: "
            "set evaluation.prompts to a source that the run has not seen"
        )
    _write(run, {"evaluation": evaluation}, fitting.excluded, on_note)


@dataclass
class _Fitting:
    """Reads prompts and keeps those that all `readers` can read, with the reason for each of the others."""

    config: Config
    readers: Sequence["PromptReader"]
    excluded: list[tuple[str, str]] = field(default_factory=list)

    def read(self, source: str, cache: Path) -> list[Prompt]:
        return read_prompts(source, cache, lambda prompt_id, reason: self.excluded.append((prompt_id, reason)))

    def keep(self, prompts: Sequence[Prompt], source: str) -> list[Prompt]:
        kept = [prompt for prompt in prompts if self._fits(prompt)]
        if not kept:
            refused = self.excluded[-1][1] if self.excluded else "the source is empty"
            raise DataError(
                f"{source}: none of its {len(prompts)} prompts can be used; the last one: {refused}. "
                "Raise prompts.max_prompt_tokens, or correct the prompts"
            )
        return kept

    def _fits(self, prompt: Prompt) -> bool:
        limit = self.config.prompts.max_prompt_tokens
        try:
            lengths = [len(reader.encode(reader.text(prompt))) for reader in self.readers]
        except DataError as error:
            self.excluded.append((prompt.prompt_id, str(error)))
            return False
        unfit = [length for length in lengths if not 0 < length <= limit]
        if unfit:
            self.excluded.append((prompt.prompt_id, f"{unfit[0]} tokens, prompts.max_prompt_tokens is {limit}"))
        return not unfit


def _held_out(config: Config, fitting: _Fitting) -> tuple[list[Prompt], list[Prompt]]:
    """(validation, evaluation) prompts; no text is in both."""
    cache, test = cache_folder(config), config.evaluation.prompts
    held_out = fitting.keep(fitting.read(config.prompts.held_out, cache), config.prompts.held_out)
    validation, evaluation = split_held_out(
        held_out,
        num_validation=config.validation.num_prompts,
        num_evaluation=0 if test else config.evaluation.num_prompts,
        seed=config.seed,
    )
    if test:
        split, overlap = exclude_overlap(fitting.keep(fitting.read(test, cache), test), validation)
        fitting.excluded.extend(overlap)
        evaluation = evaluation_split(split, num_evaluation=config.evaluation.num_prompts, seed=config.seed)
    return validation, evaluation


def _reader(config: Config, policy: Path | str) -> "PromptReader":
    from models.policy import check_context, load_reader

    reader = load_reader(policy, prompt_format=config.policy.prompt_format)
    check_context(
        reader,
        max_prompt_tokens=config.prompts.max_prompt_tokens,
        max_new_tokens=config.rollouts.max_new_tokens,
    )
    return reader


def _write(
    run: Path,
    sets: Mapping[str, Sequence[Prompt]],
    excluded: Sequence[tuple[str, str]],
    on_note: Callable[[str], None],
) -> None:
    for name, prompts in sets.items():
        write_text(run / "prompts" / f"{name}.jsonl", "".join(_line(p) for p in prompts))
    write_text(
        run / "excluded_prompts.jsonl",
        "".join(json_text({"id": i, "reason": reason}) + "\n" for i, reason in excluded),
    )
    if excluded:
        on_note(f"{len(excluded)} prompts excluded, listed in {run / 'excluded_prompts.jsonl'}")


def load_prompt_sets(run: Path) -> PromptSets:
    """The sets that `prepare` wrote. Raises DataError."""
    return PromptSets(*(load_prompts(run, name) for name in NAMES))


def load_prompts(run: Path, name: str) -> tuple[Prompt, ...]:
    """One of the sets."""
    return _read(run / "prompts" / f"{name}.jsonl")


def _line(prompt: Prompt) -> str:
    reference = {} if prompt.reference is None else {"reference": prompt.reference}
    return json_text({"id": prompt.prompt_id, "messages": list(prompt.messages), **reference}) + "\n"


def _read(path: Path) -> tuple[Prompt, ...]:
    try:
        return tuple(stored_prompt(row, f"{path}:{line}") for line, row in read_jsonl(path))
    except DataError as error:
        raise DataError(
            f"{path} cannot be read ({error}): put it back from a copy (a new run of the same config writes the same "
            "one), then resume the run"
        ) from error
