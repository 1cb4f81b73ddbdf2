"""The judge: its fit, its score against a second implementation, its files, and how far it carries over."""

import json
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.utils import murmurhash3_32

from alignment.errors import DataError, ModelError
from alignment.preferences import read_pairs
from alignment.types import Message
from models.judge import HASH_SIZE, Judge, judge_text, load_judge, pairwise_accuracy, train_judge

CHOSEN = ["a great film", "truly wonderful work", "a great and wonderful story", "wonderful film"]
REJECTED = ["an awful film", "truly dreadful work", "an awful and dreadful story", "dreadful film"]


def columns(text: str) -> set[int]:
    """The hashed n-grams of a text by plain loops: word 1-2-grams, then characters 1-4 within padded words."""
    words = re.findall(r"\b\w\w+\b", text.lower())
    word_grams = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
    char_grams = []
    for word in text.lower().split():
        padded = f" {word} "
        char_grams += [padded[i : i + n] for n in range(1, 5) for i in range(len(padded) - n + 1)]
    return {abs(murmurhash3_32(g)) % HASH_SIZE for g in word_grams} | {
        HASH_SIZE + abs(murmurhash3_32(g)) % HASH_SIZE for g in char_grams
    }


def test_the_scale_is_the_log_count_ratio_and_the_score_a_dot_product_of_unit_vectors() -> None:
    judge = train_judge(CHOSEN, REJECTED, seed=0)
    p, q = (Counter(c for text in texts for c in columns(text)) for texts in (CHOSEN, REJECTED))
    p_total, q_total = (sum(side.values()) + 2 * HASH_SIZE for side in (p, q))
    for column in set(p) | set(q):
        expected = abs(math.log((1 + p[column]) / p_total) - math.log((1 + q[column]) / q_total))
        assert judge.scale[column] == pytest.approx(expected, rel=1e-4)
    text = "a wonderful but dreadful film, unlike others"
    present = sorted(columns(text))
    length = math.sqrt(sum(float(judge.scale[c]) ** 2 for c in present))
    expected = sum(float(judge.scale[c]) * float(judge.weights[c]) for c in present) / length
    assert judge.score([text]) == [pytest.approx(expected, abs=1e-5)]


def test_the_fit_is_the_optimum_of_the_bradley_terry_likelihood() -> None:
    """At the optimum of C * sum log(1 + exp(-d.w)) + |w|^2 / 2 the gradient vanishes: w = C * sum sigmoid(-d.w) d."""
    judge = train_judge(CHOSEN, REJECTED, seed=0)

    def unit(text: str) -> np.ndarray:
        vector = np.zeros(2 * HASH_SIZE)
        vector[sorted(columns(text))] = judge.scale[sorted(columns(text))]
        return vector / np.linalg.norm(vector)

    gradient = np.zeros(2 * HASH_SIZE)
    for chosen, rejected in zip(CHOSEN, REJECTED, strict=True):
        difference = unit(chosen) - unit(rejected)
        gradient += 3.0 * difference / (1 + np.exp(difference @ judge.weights))
    np.testing.assert_allclose(judge.weights, gradient, atol=2e-3)


def test_the_seed_only_draws_signs() -> None:
    scores = [train_judge(CHOSEN, REJECTED, seed=seed).score(CHOSEN + REJECTED) for seed in (0, 0, 1)]
    assert scores[0] == scores[1]
    np.testing.assert_allclose(scores[0], scores[2], atol=1e-2)
    assert min(scores[0][:4]) > max(scores[0][4:])


def test_texts_without_any_ngram_score_zero_and_order_is_kept() -> None:
    judge = train_judge(CHOSEN, REJECTED, seed=0)
    assert judge.score([]) == []
    assert judge.score(["", "   "]) == [0.0, 0.0]
    one_by_one = [judge.score([text])[0] for text in CHOSEN]
    np.testing.assert_allclose(judge.score(CHOSEN), one_by_one, atol=1e-6)


def test_accuracy_counts_ties_one_half() -> None:
    judge = train_judge(CHOSEN, REJECTED, seed=0)
    assert pairwise_accuracy(judge, CHOSEN, REJECTED) == 1.0
    assert pairwise_accuracy(judge, ["great", "awful", "", "dreadful"], ["awful", "great", "", "dreadful"]) == 0.5
    assert pairwise_accuracy(judge, [CHOSEN[0], ""], [REJECTED[0], ""]) == 0.75
    with pytest.raises(DataError, match="got 0 and 0"):
        pairwise_accuracy(judge, [], [])


def test_too_few_or_unequal_pairs_are_refused() -> None:
    with pytest.raises(DataError, match="2 chosen and 1 rejected"):
        train_judge(["a", "b"], ["c"], seed=0)
    with pytest.raises(DataError, match="at least 2 preference pairs, got 1"):
        train_judge(["a"], ["c"], seed=0)


def test_a_saved_judge_scores_the_same(tmp_path: Path) -> None:
    judge = train_judge(CHOSEN, REJECTED, seed=0)
    judge.save(tmp_path / "judge")
    assert load_judge(tmp_path / "judge").score(CHOSEN) == judge.score(CHOSEN)
    assert not any(p.suffix in (".pkl", ".joblib") for p in (tmp_path / "judge").iterdir())


def test_a_missing_damaged_or_foreign_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no readable judge"):
        load_judge(tmp_path / "none")
    folder = tmp_path / "judge"
    train_judge(CHOSEN, REJECTED, seed=0).save(folder)
    (folder / "judge.json").write_text(json.dumps({"format": 99, "hash_size": HASH_SIZE}))
    with pytest.raises(ModelError, match="another format"):
        load_judge(folder)
    train_judge(CHOSEN, REJECTED, seed=0).save(folder)
    save_file({"scale": np.zeros(3, np.float32)}, folder / "judge.safetensors")
    with pytest.raises(ModelError, match="weights"):
        load_judge(folder)
    (folder / "judge.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match="holds no readable judge"):
        load_judge(folder)


def test_a_conversation_is_judged_as_its_plain_text() -> None:
    messages: list[Message] = [
        {"role": "user", "content": "Movie review: I"},
        {"role": "assistant", "content": " loved it"},
    ]
    assert judge_text(messages) == "Movie review: I loved it"


def sides(source: str, limit: int | None = None) -> tuple[list[str], list[str]]:
    pairs, _ = read_pairs(source, Path("unused"), limit=limit)
    return [p.chosen for p in pairs], [p.rejected for p in pairs]


def test_trained_on_rotten_tomatoes_it_ranks_unseen_imdb_text() -> None:
    judge = train_judge(*sides("rotten_tomatoes:pairs", 4096), seed=0)
    accuracy = pairwise_accuracy(judge, *sides("imdb:held_out_pairs"))
    assert accuracy >= 0.73  # 0.745 measured, of 995 pairs; 0.70 is what a report's judge must reach
    assert pairwise_accuracy(judge, *sides("imdb:held_out_pairs", 256)) >= 0.70


def test_on_toy_pairs_it_tells_random_bytes_apart() -> None:
    judge: Judge = train_judge(*sides("toy:judge_pairs", 256), seed=0)
    assert pairwise_accuracy(judge, *sides("toy:held_out_pairs")) > 0.95
    generator = np.random.default_rng(0)
    texts = ["my day was" + generator.bytes(16).decode("utf-8", "replace") for _ in range(200)]
    letters = [
        sum(c in "hjlmnopsuwy!" for c in t.lower()) - sum(c in "abcdefgikqrtvxz." for c in t.lower()) for t in texts
    ]
    scores = judge.score(texts)
    assert np.std(scores) > 0.05
    assert np.corrcoef(scores, letters)[0, 1] > 0.4
