"""HH-RLHF, or other preference pairs, as files that the recipe's commands read, split by prompt.

    python -m alignment.hh hf://datasets/Anthropic/hh-rlhf/harmless-base/train.jsonl.gz --out data/hh

    data/hh/
      train_prompts.jsonl         {"messages", "reference"}   each prompt once; the reference is its first chosen answer
      train_comparisons.jsonl     {"chosen", "rejected"}      whole conversations, with "margin" where one is given
      train_demonstrations.jsonl  {"messages"}                each chosen conversation once
      test_….jsonl                                            the same of other prompts
      left_out.jsonl              {"place", "reason"}         each pair that cannot be used
      summary.json                                            counts

A source is what `alignment.preferences.read_pairs` reads. The folder appears whole or not at all.
"""

import argparse
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.atomic_files import disk_errors, json_text, settle_files, sync_folder
from alignment.errors import AlignmentError, DataError
from alignment.preferences import conversation, read_pairs
from alignment.splits import split_by_prompt
from alignment.types import Message, PreferencePair

SHARES = {"train": 0.9, "test": 0.1}
CACHE = Path("runs/cache")
"""Where downloads are kept: the runs' own place, unless run.root is another."""
# A run splits its files by hashes with its own seed, which is never negative. With the same one, a share of the train
# part would be looked for where the test part was taken away.
SEED = -1


def write_data(sources: Sequence[str], folder: Path, cache: Path, shares: Mapping[str, float]) -> dict[str, Any]:
    """Write a folder of prompts, comparisons and demonstrations; returns what summary.json holds.

    Raises DataError for sources that cannot be read, a part that gets nothing or a folder that is not empty,
    ConfigError for shares that do not sum to 1, DiskError.
    """
    _check_free(folder)
    pairs, left_out = _read(sources, cache)
    parts = split_by_prompt(pairs, lambda pair: pair.prompt, shares, SEED)
    empty = [name for name, part in parts.items() if not part]
    if empty:
        raise DataError(
            f"none of the {len(pairs)} usable pairs falls into {', '.join(empty)} (share {shares[empty[0]]}): "
            "raise its share, leave it out, or name a larger source"
        )
    written = {part: _files(items) for part, items in parts.items()}
    files = {f"{part}_{kind}": rows for part, kinds in written.items() for kind, rows in kinds.items()}
    files["left_out"] = [{"place": place, "reason": reason} for place, reason in left_out]
    summary = {
        "sources": list(sources),
        "pairs": len(pairs) + len(left_out),
        "left_out": dict(Counter(reason for _, reason in left_out)),
        "parts": {part: {kind: len(rows) for kind, rows in kinds.items()} for part, kinds in written.items()},
    }
    _write_folder(folder, files, summary)
    return summary


def _read(sources: Sequence[str], cache: Path) -> tuple[list[PreferencePair], list[tuple[str, str]]]:
    """Pairs whose prompt ends with the user's turn, and (place, reason) of the others."""
    left_out: list[tuple[str, str]] = []
    usable: list[PreferencePair] = []
    for source in sources:
        pairs, _ = read_pairs(source, cache, on_left_out=lambda place, reason: left_out.append((place, reason)))
        for pair in pairs:
            if pair.prompt and pair.prompt[-1]["role"] == "user":
                usable.append(pair)
            else:
                left_out.append((source, "no_question"))
    if not usable:
        raise DataError(f"{', '.join(sources)}: no pair has a prompt that ends with the user's turn; give the prompts")
    return usable, left_out


def _files(pairs: Iterable[PreferencePair]) -> dict[str, list[dict[str, Any]]]:
    """A part's files and their rows."""
    answers: dict[tuple[tuple[str, str], ...], PreferencePair] = {}
    chosen: dict[tuple[tuple[str, str], ...], list[Message]] = {}
    comparisons: list[dict[str, Any]] = []
    for pair in pairs:
        sides = [conversation(pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
        margin = {} if pair.margin is None else {"margin": pair.margin}
        comparisons.append({"chosen": sides[0], "rejected": sides[1], **margin})
        answers.setdefault(_text(pair.prompt), pair)
        chosen.setdefault(_text(sides[0]), sides[0])
    return {
        "prompts": [{"messages": list(pair.prompt), "reference": pair.chosen} for pair in answers.values()],
        "comparisons": comparisons,
        "demonstrations": [{"messages": messages} for messages in chosen.values()],
    }


def _text(messages: Iterable[Message]) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in messages)


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is there already: name another folder, or remove that one")


def _write_folder(folder: Path, files: Mapping[str, Sequence[dict[str, Any]]], summary: dict[str, Any]) -> None:
    staging = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    with disk_errors(folder):
        try:
            staging.mkdir(parents=True)
            for name, rows in files.items():
                with open(staging / f"{name}.jsonl", "w", encoding="utf-8") as file:
                    file.writelines(json_text(row) + "\n" for row in rows)
            (staging / "summary.json").write_text(json_text(summary, indent=2) + "\n", encoding="utf-8")
            settle_files(staging)
            staging.rename(folder)  # fails where somebody has filled the folder meanwhile
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _report(summary: dict[str, Any], folder: Path) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary["left_out"].items())
    listed = f", listed in {folder / 'left_out.jsonl'}" if reasons else ""
    lines = [f"{summary['pairs']} pairs read, left out: {reasons or 'none'}{listed}"]
    for part, counts in summary["parts"].items():
        lines.append(f"{folder / part}_*.jsonl: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return "\n".join(lines)


def _shares(text: str) -> dict[str, float]:
    """`train=0.9,test=0.1` as a dict."""
    shares: dict[str, float] = {}
    for item in text.split(","):
        name, _, share = item.partition("=")
        if not name.isidentifier() or name in shares:
            raise argparse.ArgumentTypeError(f"{item!r} must be NAME=SHARE, each name once, as in train=0.9,test=0.1")
        try:
            shares[name] = float(share)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{item!r}: the share must be a number, as in train=0.9") from None
    return shares


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alignment.hh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="a path, s3://… or hf://datasets/…")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist, or be empty")
    parser.add_argument("--shares", type=_shares, default=SHARES, help="parts; by default train=0.9,test=0.1")
    options = parser.parse_args(arguments)
    try:
        summary = write_data(options.sources, options.out, CACHE, options.shares)
    except AlignmentError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(_report(summary, options.out))


if __name__ == "__main__":
    main()
