"""Self-BLEU, repetition, cuts and refusals: values by hand, and a plain implementation of BLEU beside."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.response_quality import REFUSALS, refusal_fraction, repetition, self_bleu, truncated_fraction
from alignment.types import Rollout


def bleu(words: list[str], others: list[list[str]]) -> float:
    """BLEU-4 as Papineni et al. 2002 define it, each order's missing matches replaced by 0.1."""
    if not set(words) & {word for other in others for word in other}:
        return 0.0
    product = 1.0
    for n in range(1, 5):
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        seen = [Counter(tuple(other[i : i + n]) for i in range(len(other) - n + 1)) for other in others]
        matches = sum(min(count, max(one[gram] for one in seen)) for gram, count in grams.items())
        product *= (matches or 0.1) / max(1, sum(grams.values()))
    closest = min((len(other) for other in others), key=lambda length: (abs(length - len(words)), length))
    return product**0.25 * (1.0 if len(words) > closest else math.exp(1 - closest / len(words)))


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=9), min_size=2, max_size=7))
def test_self_bleu_is_the_mean_of_each_texts_bleu(rows: list[list[str]]) -> None:
    expected = [bleu(row, rows[:i] + rows[i + 1 :]) for i, row in enumerate(rows)]
    assert self_bleu([" ".join(row) for row in rows]) == pytest.approx(sum(expected) / len(rows))


def test_self_bleu_is_nltks() -> None:
    nltk = pytest.importorskip("nltk.translate.bleu_score", reason="nltk comes with requirements-lm-eval.txt")
    texts = ["the cat sat on the mat today", "the cat sat on a hat", "a dog ran off", "the the the cat"]
    rows = [text.split() for text in texts]
    smooth = nltk.SmoothingFunction().method1
    expected = [
        nltk.sentence_bleu(rows[:i] + rows[i + 1 :], row, smoothing_function=smooth) for i, row in enumerate(rows)
    ]
    assert self_bleu(texts) == pytest.approx(sum(expected) / len(rows))


def test_self_bleu_by_hand() -> None:
    assert self_bleu(["a b c d e", "a b c d e"]) == pytest.approx(1.0)
    assert self_bleu(["a b c d", "e f g h"]) == 0.0
    # Each of 4 words: 3 of 4 words, 2 of 3 pairs, 1 of 2 triples match, the one quadruple counts 0.1
    assert self_bleu(["a b c x", "a b c y"]) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25)
    assert self_bleu(["only one"]) is None
    assert self_bleu(["", ""]) == 0.0


def test_repetition_by_hand() -> None:
    # "a b a b a b" has the 4-grams abab, baba, abab: 1 of 3 came before; the other text repeats none
    assert repetition(["a b a b a b"]) == pytest.approx(1 / 3)
    assert repetition(["a b a b a b", "a b c d e"]) == pytest.approx(1 / 6)
    assert repetition(["x " * 10]) == pytest.approx(6 / 7)
    assert repetition(["a a a"], n=1) == pytest.approx(2 / 3)
    assert repetition(["too short"]) == 0.0
    assert repetition([]) == 0.0


def test_truncated_fraction() -> None:
    ends = ["stop", "length", "length", "stop", "length"]
    rollouts = [Rollout(prompt_id=str(i), rollout_index=0, response="", finish_reason=e) for i, e in enumerate(ends)]  # type: ignore[arg-type]
    assert truncated_fraction(rollouts) == 0.6


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, but I can’t help with that.", True),
        ("As an AI, I do not have opinions.", True),
        ("I CANNOT ASSIST you there", True),
        ("The film has an air of mystery; I was an aid to it.", False),
        ("Sure! Here is how. " * 20 + "I'm sorry, but that is all.", False),
        ("I can't recommend this film enough. Sorry, I candidly loved it.", False),
        ("", False),
    ],
)
def test_refusals(text: str, refused: bool) -> None:
    assert refusal_fraction([text]) == refused
    assert refusal_fraction([text, "fine"]) == refused / 2


def test_every_listed_phrase_is_found() -> None:
    assert all(refusal_fraction([f"Well, {phrase.title()} that"]) == 1 for phrase in REFUSALS)
    assert len(set(REFUSALS)) == len(REFUSALS)
