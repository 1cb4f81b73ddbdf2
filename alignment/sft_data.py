"""What supervised fine-tuning learns from: demonstrations, as the policy reads them.

    <run>/examples/train-000.parquet …     one file a source of sft.train: place, ids, learned
                   validation.parquet
    <run>/excluded_examples.jsonl          every line that was left out: place, fault, details

No example has a prompt that judges the result: those of `prompts.held_out` and `evaluation.prompts` are left out.

They are written once, so that workers and resumes see the same ones. The order they are read in, and what the weights
of several sources mean, is `alignment.mixture`'s.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.atomic_files import json_text, write_atomically, write_text
from alignment.config import Config
from alignment.demonstrations import count_faults, encode_demonstrations, read_demonstrations
from alignment.errors import ConfigError, DataError
from alignment.mixture import per_epoch
from alignment.policy_source import base_folder
from alignment.preparation import cache_folder
from alignment.prompts import PromptText, prompt_text, read_prompts
from alignment.splits import split_by_prompt
from alignment.types import Demonstration, LeftOut, Message, TokenSequence

if TYPE_CHECKING:
    from models.policy import PromptReader

VALIDATION = "validation"
TRAINED, VALIDATED = "trained on", "validated on"


@dataclass(frozen=True, slots=True)
class Examples:
    """One set of examples, in an Arrow table: as tuples, their tokens would take ten times the memory."""

    table: Any

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> TokenSequence:
        ids, learned = (tuple(self.table[name][index].as_py()) for name in ("ids", "learned"))
        return TokenSequence(ids, learned)

    def __iter__(self) -> Iterator[TokenSequence]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, slots=True)
class SftData:
    """Examples to learn from, by source, with the sources' weights; and those whose loss chooses the checkpoint."""

    train: tuple[Examples, ...]
    weights: tuple[float, ...]
    validation: Examples | None


def prepare_examples(config: Config, run: Path) -> list[dict[str, Any]]:
    """Read, tokenize and write the examples; a summary of each set. Raises ConfigError, DataError or ModelError."""
    from models.policy import load_ending_tokens, load_reader

    own, source = config.sft, base_folder(config)
    reader = load_reader(source, prompt_format=config.policy.prompt_format, chat_template=own.chat_template)
    if reader.context is not None and own.max_tokens > reader.context:
        raise ConfigError(
            f"sft.max_tokens ({own.max_tokens}) must be <= the policy's context of {reader.context} tokens: lower it"
        )
    eos_ids = load_ending_tokens(source, reader)
    summaries: list[dict[str, Any]] = []
    excluded: list[LeftOut] = []
    held_out = _held_out(config)
    for part in _parts(config):
        rows, left_out = _encoded(part, reader, eos_ids, own.max_tokens, held_out[part.role])
        _write_examples(run / "examples" / f"{part.name}.parquet", rows)
        excluded += left_out
        faults = Counter(item.fault for item in left_out)
        counts = {"tokens": sum(len(s.ids) for _, s in rows), "learned_tokens": sum(s.num_learned for _, s in rows)}
        summary = {"role": part.role, "source": part.source, "weight": part.weight, "examples": len(rows)}
        summaries.append({**summary, **counts, "left_out": dict(sorted(faults.items()))})
    mixed = [summary["examples"] for summary in summaries if summary["weight"] is not None]
    per_epoch(mixed, list(own.train.values()))  # a weight that gives nothing is an error now, not on the workers
    lines = [json_text(asdict(item)) + "\n" for item in excluded]
    write_text(run / "excluded_examples.jsonl", "".join(lines))
    return summaries


@dataclass(frozen=True, slots=True)
class _Part:
    """Demonstrations that make one file. `weight` is None for those that are validated on."""

    name: str
    role: str
    source: str
    weight: float | None
    demonstrations: tuple[Demonstration, ...]
    left_out: tuple[LeftOut, ...] = ()


def _parts(config: Config) -> Iterator[_Part]:
    """What each source gives, and what is set aside or read besides to validate on. Raises DataError."""
    own, cache = config.sft, cache_folder(config)
    shares = {"train": 1 - own.validation_share, VALIDATION: own.validation_share}
    set_aside: list[Demonstration] = []
    seen: set[str] = set()
    for number, (source, weight) in enumerate(own.train.items()):
        demonstrations, left_out = read_demonstrations(source, cache, turns=own.turns, limit=own.num_train)
        split = split_by_prompt(demonstrations, _prompt, shares, config.seed)
        set_aside += split[VALIDATION]
        seen |= {_key(demonstration) for demonstration in split["train"]}
        yield _Part(f"train-{number:03d}", TRAINED, source, weight, tuple(split["train"]), tuple(left_out))
    if own.validation_share:
        yield _Part(VALIDATION, VALIDATED, "validation share", None, tuple(set_aside))
    elif own.validation:
        demonstrations, left_out = read_demonstrations(own.validation, cache, turns=own.turns, limit=own.num_validation)
        known = [d for d in demonstrations if _key(d) in seen]
        left_out += [LeftOut(d.place, "prompt_trained_on", f"{d.place}: its prompt is one of sft.train") for d in known]
        unseen = tuple(d for d in demonstrations if _key(d) not in seen)
        yield _Part(VALIDATION, VALIDATED, own.validation, None, unseen, tuple(left_out))


def _encoded(
    part: _Part, reader: "PromptReader", eos_ids: Sequence[int], max_tokens: int, held_out: Mapping[PromptText, str]
) -> tuple[list[tuple[str, TokenSequence]], list[LeftOut]]:
    """A part's examples with their places, and all that was left out of it. Raises DataError where none remains."""
    encoded, unfit = encode_demonstrations(
        part.demonstrations, reader, eos_ids, longest=max_tokens, key="sft.max_tokens", held_out=held_out
    )
    left_out = [*part.left_out, *unfit]
    if not encoded:
        why = f"{count_faults(left_out)}; the last: {left_out[-1].details}" if left_out else "the share took none"
        raise DataError(f"{part.source}: no example is left that can be {part.role} ({why})")
    return [(demonstration.place, sequence) for demonstration, sequence in encoded], left_out


def _held_out(config: Config) -> dict[str, dict[PromptText, str]]:
    """By role, the prompts that no example may have, each with the key that names its source. Raises DataError.

    They measure the policy once it is aligned. Nothing of `prompts.held_out` is trained on, since which of them a run
    draws depends on its seed; they may choose a checkpoint here as they do there. `evaluation.prompts` may not.
    """
    cache = cache_folder(config)

    def texts(key: str, source: str | None) -> dict[PromptText, str]:
        prompts = read_prompts(source, cache, lambda *_: None) if source else []  # a pair without one measures nothing
        return {prompt_text(prompt): key for prompt in prompts}

    evaluation = texts("evaluation.prompts", config.evaluation.prompts)
    return {TRAINED: texts("prompts.held_out", config.prompts.held_out) | evaluation, VALIDATED: evaluation}


def read_examples(config: Config, run: Path) -> SftData:
    """What `prepare_examples` wrote. Raises DataError."""
    import pyarrow
    import pyarrow.parquet as parquet

    def read(name: str) -> Examples:
        path = run / "examples" / f"{name}.parquet"
        try:
            table = parquet.read_table(path).combine_chunks()
            if table.schema != _schema():
                raise ValueError("it has other columns")
        except (OSError, pyarrow.ArrowException, ValueError, MemoryError) as error:
            raise DataError(f"cannot read {path}: {' '.join(str(error).split())}; start a new run") from error
        return Examples(table)

    has_validation = (run / "examples" / f"{VALIDATION}.parquet").exists()
    return SftData(
        train=tuple(read(f"train-{number:03d}") for number in range(len(config.sft.train))),
        weights=tuple(config.sft.train.values()),
        validation=read(VALIDATION) if has_validation else None,
    )


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([("place", pa.string()), ("ids", pa.list_(pa.int32())), ("learned", pa.list_(pa.bool_()))])


def _write_examples(path: Path, rows: Sequence[tuple[str, TokenSequence]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.Table.from_pylist([{"place": place, "ids": s.ids, "learned": s.learned} for place, s in rows], _schema())
    write_atomically(path, lambda file: parquet.write_table(table, file))


def _key(demonstration: Demonstration) -> str:
    return json.dumps(_prompt(demonstration))


def _prompt(demonstration: Demonstration) -> tuple[Message, ...]:
    """What comes before the first answer: dialogues that begin alike fall into one part, however they go on."""
    roles = [message["role"] for message in demonstration.messages]
    return demonstration.messages[: roles.index("assistant")]
