"""Toy prompts, preference pairs and demonstrations for the smoke preset: no package, no file, no network.

The smoke preset's policy has random weights and emits random bytes, so a preference that lives in words
alone would give it nothing to climb. Here the two sides differ in their letters too: the cheerful words are
spelt with {h j l m n o p s u w y} and end with "!", the gloomy ones with {a b c d e f g i k q r t v x z}
and end with ".". A small model reads that off single characters within seconds, and of two random strings
the one with more cheerful letters scores higher.
"""

import random
from itertools import product

from alignment.errors import DataError
from alignment.types import PreferencePair, Prompt

CHEERFUL = (
    *("holy", "holly", "hymn", "jolly", "joy", "joyous", "july", "jump", "lush", "mommy", "moon", "mum", "plump"),
    *("pony", "pool", "pup", "puppy", "snowy", "soul", "sun", "sunny", "swoon", "woo", "wow", "yummy", "yup"),
)
GLOOMY = (
    *("acid", "afraid", "bitter", "cave", "crack", "cried", "dark", "dead", "defeat", "dire", "dirt", "drab", "drag"),
    *("dread", "dreck", "fear", "grave", "greed", "grief", "rage", "regret", "tear", "tired", "trite", "vex", "vice"),
)
PAIR_COUNTS = {"toy:pairs": 1024, "toy:held_out_pairs": 256, "toy:judge_pairs": 1024}
PROMPT_NAMES = ("toy:prompts", "toy:held_out_prompts")
DEMONSTRATIONS = {"toy:demonstrations": "toy:prompts", "toy:held_out_demonstrations": "toy:held_out_prompts"}
"""Sets of demonstrations, and whose prompts they continue."""

_SUBJECTS = (
    *("my day", "the news", "our trip", "this song", "her letter", "the party", "his story", "the game"),
    *("the meal", "our garden", "the film", "my week", "the show", "their home", "the road", "this book"),
)
_VERBS = ("was", "felt", "became", "looked", "is", "seemed", "sounded", "stayed", "went", "turned out")
_FEWEST_WORDS, _MOST_WORDS = 4, 8


def toy_prompts(name: str) -> list[Prompt]:
    """The 80 distinct prompts of `toy:prompts` or the 80 others of `toy:held_out_prompts`, each one user message.

    Raises DataError for another name.
    """
    if name not in PROMPT_NAMES:
        raise DataError(f"{name}: no toy prompts of that name; known: {', '.join(PROMPT_NAMES)}")
    texts = [f"{subject} {verb}" for subject, verb in product(_SUBJECTS, _VERBS)]
    first = PROMPT_NAMES.index(name)
    return [Prompt(f"toy-{i}", ({"role": "user", "content": texts[i]},)) for i in range(first, len(texts), 2)]


def toy_demonstrations(name: str) -> list[tuple[str, str]]:
    """The prompts of `toy:demonstrations` or `toy:held_out_demonstrations`, each continued by a cheerful sentence.

    The prompts are those of `toy:prompts` and `toy:held_out_prompts`. Raises DataError for another name.
    """
    prompts = DEMONSTRATIONS.get(name)
    if prompts is None:
        raise DataError(f"{name}: no toy demonstrations of that name; known: {', '.join(DEMONSTRATIONS)}")
    rng = random.Random(name)
    texts = [prompt.messages[0]["content"] for prompt in toy_prompts(prompts)]
    return [(text, f" {_sentence(CHEERFUL, 1 + int(rng.random() * _FEWEST_WORDS), rng)}!") for text in texts]


def toy_pairs(name: str) -> list[PreferencePair]:
    """Pairs of a cheerful (chosen) and a gloomy text with as many words, without a prompt, in a fixed order.

    Raises DataError for a name that is not in PAIR_COUNTS.
    """
    if name not in PAIR_COUNTS:
        raise DataError(f"{name}: no toy pairs of that name; known: {', '.join(PAIR_COUNTS)}")
    rng = random.Random(name)
    pairs = []
    for _ in range(PAIR_COUNTS[name]):
        num_words = _FEWEST_WORDS + int(rng.random() * (_MOST_WORDS - _FEWEST_WORDS + 1))
        pairs.append(
            PreferencePair((), _sentence(CHEERFUL, num_words, rng) + "!", _sentence(GLOOMY, num_words, rng) + ".")
        )
    return pairs


def _sentence(words: tuple[str, ...], num_words: int, rng: random.Random) -> str:
    return " ".join(words[int(rng.random() * len(words))] for _ in range(num_words))
