"""Splits by prompt: an item's part depends on its prompt, the seed and the shares, and on nothing else."""

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment import splits
from alignment.errors import ConfigError, DataError
from alignment.preferences import read_pairs
from alignment.splits import split_by_prompt
from alignment.types import Message, PreferencePair

HH = Path(__file__).resolve().parents[2] / "shared/data/hh-harmless-sample.jsonl.gz"
SHARES = {"train": 0.5, "validation": 0.3, "test": 0.2}

# Few letters and few turns, so that equal prompts are common.
messages = st.builds(
    lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), st.text("ab")
)
pairs = st.lists(
    st.builds(
        lambda prompt, answer: PreferencePair(tuple(prompt), answer, answer + "!"),
        st.lists(messages, min_size=1, max_size=2),
        st.text("xyz"),
    ),
    max_size=20,
)


def user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def split(items: Any, shares: dict[str, float] = SHARES, seed: int = 0) -> dict[str, list[PreferencePair]]:
    return split_by_prompt(items, lambda pair: pair.prompt, shares, seed)


def texts(count: int) -> list[str]:
    return [f"prompt {i}" for i in range(count)]


def split_texts(items: list[str], shares: dict[str, float] = SHARES, seed: int = 0) -> dict[str, list[str]]:
    return split_by_prompt(items, user, shares, seed)


@given(pairs, st.integers())
@settings(max_examples=50, deadline=None)
def test_every_item_is_in_one_part_in_order_and_equal_prompts_share_it(items: Any, seed: int) -> None:
    parts = split(items, seed=seed)
    assert list(parts) == list(SHARES)
    assert sorted(map(repr, items)) == sorted(repr(item) for part in parts.values() for item in part)
    for part in parts.values():
        where = [next(i for i, item in enumerate(items) if item is kept) for kept in part]
        assert where == sorted(where)
    prompts = [{repr(item.prompt) for item in part} for part in parts.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts))


@given(pairs, pairs, st.randoms(use_true_random=False), st.integers())
@settings(max_examples=50, deadline=None)
def test_a_part_depends_neither_on_order_nor_on_other_items(items: Any, others: Any, rng: Any, seed: int) -> None:
    before = split(items, seed=seed)
    mixed = [*items, *others]
    rng.shuffle(mixed)
    after = split(mixed, seed=seed)
    for name, part in before.items():
        assert all(any(item is kept for kept in after[name]) for item in part)


def test_messages_are_compared_not_their_joined_text() -> None:
    """Conversations that a joining of roles and contents could confuse are apart under some seed."""
    same = [user("ab"), ({"content": "ab", "role": "user"},)]
    for seed in range(20):
        assert sorted(map(len, split_by_prompt(same, lambda m: m, SHARES, seed).values())) == [0, 0, 2]
    different = [
        user("a") + user("b"),
        user("ab"),
        ({"role": "assistant", "content": "ab"},),
        user('a"], ["user", "b'),
        user("ab "),
    ]
    for one in different:
        for other in different:
            together = [
                max(map(len, split_by_prompt([one, other], lambda m: m, SHARES, seed).values())) == 2
                for seed in range(40)
            ]
            assert all(together) == (one is other)


def test_the_hash_is_the_one_written_down() -> None:
    """The split of a published data set must not move with a release: an independent computation of it."""
    for text, seed in (("prompt 0", 0), ("prompt 1", 0), ("é\n", 7)):
        escaped = text.replace("é", "\\u00e9").replace("\n", "\\n")
        digest = hashlib.sha256(f'[{seed}, [["user", "{escaped}"]]]'.encode()).hexdigest()
        position = int(digest[:16], 16) / 2**64
        name = "train" if position < 0.5 else "validation" if position < 0.8 else "test"
        assert split_texts([text], seed=seed)[name] == [text]


def test_parts_have_their_shares() -> None:
    sizes = {name: len(part) for name, part in split_texts(texts(4000)).items()}
    for name, share in SHARES.items():
        assert abs(sizes[name] - 4000 * share) < 4 * math.sqrt(4000 * share * (1 - share))


def test_another_seed_is_another_split() -> None:
    first, second = (set(split_texts(texts(1000), seed=seed)["train"]) for seed in (0, 1))
    # Independent halves share a quarter: 250, with a standard deviation of √(1000 · ¼ · ¾) = 13.7.
    assert 195 < len(first & second) < 305


def test_a_larger_first_part_holds_the_smaller_one() -> None:
    small, large = (split_texts(texts(200), {"train": share, "test": 1 - share})["train"] for share in (0.3, 0.6))
    assert set(small) < set(large)


@pytest.mark.parametrize(
    ("shares", "full"),
    [
        ({"all": 1.0}, {"all"}),
        ({"a": 0, "b": 1, "c": 0}, {"b"}),
        ({"a": 0.5, "b": 0.0, "c": 0.5}, {"a", "c"}),
        ({str(i): 0.1 for i in range(10)}, {str(i) for i in range(10)}),
    ],
)
def test_a_share_of_nothing_stays_empty(shares: dict[str, float], full: set[str]) -> None:
    parts = split_texts(texts(300), shares)
    assert list(parts) == list(shares)
    assert {name for name, part in parts.items() if part} == full


@pytest.mark.parametrize("nothing", [{}, {"nothing": 0.0}])
def test_the_last_position_is_in_the_last_part_with_a_share(
    monkeypatch: pytest.MonkeyPatch, nothing: dict[str, float]
) -> None:
    # Ten tenths add up to just this position in floats, one step short of 1.
    monkeypatch.setattr(splits, "_position", lambda prompt, seed: math.nextafter(1, 0))
    assert split_texts(["a"], {**{str(i): 0.1 for i in range(10)}, **nothing})["9"] == ["a"]


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({}, r"shares \(\) must each be from 0 to 1 and sum to 1; their sum is 0"),
        ({"train": 0.8, "test": 0.3}, r"shares \(train=0.8, test=0.3\) .* their sum is 1.1"),
        ({"train": 1.5, "test": -0.5}, "must each be from 0 to 1"),
        ({"train": math.nan, "test": 1}, "their sum is nan"),
        ({"train": 80, "test": 20}, "their sum is 100"),
    ],
)
def test_shares_are_parts_of_one(shares: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        split_texts(["a"], shares)


def test_an_item_without_a_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="item 2 has no prompt to split by: give each item its prompt, or one file"):
        split([PreferencePair(user("a"), "b", "c"), PreferencePair((), "b", "c")])


@pytest.mark.skipif(not HH.exists(), reason="needs the HH-RLHF sample beside the repository")
def test_real_pairs(tmp_path: Path) -> None:
    items, _ = read_pairs(str(HH), tmp_path)
    parts = split(items, {"train": 0.8, "test": 0.2})
    assert abs(len(parts["test"]) - 199) < 50
    assert split(items[::-1], {"train": 0.8, "test": 0.2})["test"] == parts["test"][::-1]
