"""Selection: hand-computed cases, and properties against an oracle written another way."""

import random
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.errors import ConfigError, DataError
from alignment.selection import STRATEGIES, TRUNCATED, select
from alignment.types import Decision, ScoredRollout


def rollout(prompt_id: Any, index: int, reward: float, response: str | None = None, cut: bool = False) -> ScoredRollout:
    return ScoredRollout(
        prompt_id=prompt_id,
        rollout_index=index,
        response=f"{prompt_id}/{index}" if response is None else response,
        finish_reason="length" if cut else "stop",
        reward=reward,
    )


def chosen(decisions: list[Decision]) -> list[tuple[Any, int]]:
    return [(d.prompt_id, d.rollout_index) for d in decisions if d.selected]


def reasons(decisions: list[Decision]) -> list[str]:
    return [d.reason for d in decisions]


def test_top_per_prompt_keeps_the_best_of_each_prompt_and_says_why() -> None:
    scored = [rollout("a", 0, 0.1), rollout("a", 1, 1.23452), rollout("b", 0, -3.0), rollout("b", 1, -2.0)]
    assert select(scored, strategy="top_per_prompt") == [
        Decision("a", 0, False, "reward 0.1 ranks 2 of 2"),
        Decision("a", 1, True, "reward 1.2345 ranks 1 of 2"),
        Decision("b", 0, False, "reward -3.0 ranks 2 of 2"),
        Decision("b", 1, True, "reward -2.0 ranks 1 of 2"),
    ]
    assert chosen(select(scored, strategy="top_per_prompt", top_n=5)) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_top_k_overall_ranks_the_whole_step() -> None:
    scored = [rollout("a", 0, 3.0), rollout("a", 1, 2.0), rollout("b", 0, 2.5), rollout("b", 1, 0.0)]
    decisions = select(scored, strategy="top_k_overall", top_k=2)
    assert chosen(decisions) == [("a", 0), ("b", 0)]
    assert reasons(decisions)[1] == "reward 2.0 ranks 3 of 4"
    assert chosen(select(scored, strategy="top_k_overall", top_k=9)) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_ties_of_rounded_rewards_go_to_the_lowest_index_then_to_the_earlier_prompt() -> None:
    scored = [rollout("a", 1, 1.00004), rollout("a", 0, 1.0), rollout("a", 2, 0.99996)]
    assert chosen(select(scored, strategy="top_per_prompt")) == [("a", 0)]
    # b is met first; a's index 0 comes before b's index 1, and b's index 0 before a's index 0.
    scored = [rollout("b", 1, 2.0), rollout("a", 0, 2.0), rollout("b", 0, 2.0), rollout("a", 1, 2.0)]
    assert chosen(select(scored, strategy="top_k_overall", top_k=1)) == [("b", 0)]
    assert chosen(select(scored, strategy="top_k_overall", top_k=2)) == [("a", 0), ("b", 0)]
    assert chosen(select(scored, strategy="top_k_overall", top_k=3)) == [("b", 1), ("a", 0), ("b", 0)]


def test_a_difference_of_one_ten_thousandth_decides() -> None:
    assert chosen(select([rollout("a", 0, 1.0), rollout("a", 1, 1.0001)], strategy="top_per_prompt")) == [("a", 1)]


def test_only_the_lowest_index_of_equal_responses_is_eligible() -> None:
    scored = [
        rollout("a", 2, 9.0, "x"),
        rollout("a", 1, 1.0, "x"),
        rollout("a", 0, 0.5, "y"),
        rollout("b", 7, 0.0, "x"),
    ]
    decisions = select(scored, strategy="top_per_prompt", top_n=3)
    assert chosen(decisions) == [("a", 1), ("a", 0), ("b", 7)]
    assert reasons(decisions)[0] == "duplicate of rollout 1"
    assert reasons(decisions)[1] == "reward 1.0 ranks 1 of 2"


def test_truncated_responses() -> None:
    scored = [rollout("a", 0, 9.0, cut=True), rollout("a", 1, 1.0), rollout("b", 0, 5.0, cut=True)]
    assert chosen(select(scored, strategy="top_per_prompt")) == [("a", 0), ("b", 0)]
    prefer = select(scored, strategy="top_per_prompt", truncated="prefer_finished")
    assert chosen(prefer) == [("a", 1), ("b", 0)]
    assert reasons(prefer)[0] == "cut at max_new_tokens: a finished response exists"
    refuse = select(scored, strategy="top_per_prompt", truncated="refuse")
    assert chosen(refuse) == [("a", 1)]
    assert reasons(refuse)[2] == "cut at max_new_tokens: refused"


def test_a_cut_response_does_not_displace_its_finished_twin() -> None:
    scored = [rollout("a", 0, 1.0, "x", cut=True), rollout("a", 1, 1.0, "x")]
    assert chosen(select(scored, strategy="top_per_prompt", top_n=2)) == [("a", 0)]
    assert chosen(select(scored, strategy="top_per_prompt", truncated="prefer_finished")) == [("a", 1)]
    assert chosen(select(scored, strategy="top_per_prompt", truncated="refuse")) == [("a", 1)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_min_reward_filters_under_every_strategy(strategy: Any) -> None:
    scored = [rollout("a", 0, 0.1), rollout("a", 1, 0.49996), rollout("b", 0, -1.0), rollout("b", 1, -0.00001)]
    decisions = select(scored, strategy=strategy, top_n=4, top_k=4, min_reward=0.5)
    assert chosen(decisions) == [("a", 1)]  # 0.49996 is 0.5 once rounded
    assert reasons(decisions)[0] == "reward 0.1 below min_reward 0.5"
    assert reasons(decisions)[3] == "reward 0.0 below min_reward 0.5"


def test_random_ranking_looks_at_no_reward_and_at_no_other_prompt() -> None:
    scored = [rollout(p, i, random.Random(p * 10 + i).random()) for p in range(40) for i in range(4)]
    first = chosen(select(scored, strategy="random_per_prompt", seed=3))
    other_rewards = [rollout(r.prompt_id, r.rollout_index, -r.reward) for r in scored]
    assert chosen(select(other_rewards, strategy="random_per_prompt", seed=3)) == first
    alone = [chosen(select(scored[4 * p : 4 * p + 4], strategy="random_per_prompt", seed=3))[0] for p in range(40)]
    assert alone == first
    assert chosen(select(scored, strategy="random_per_prompt", seed=4)) != first
    assert set(Counter(index for _, index in first)) == {0, 1, 2, 3}
    assert len(chosen(select(scored, strategy="random_k_overall", top_k=7))) == 7
    assert reasons(select(scored[:1], strategy="random_per_prompt")) == ["random rank 1 of 1"]


def test_the_random_ranking_is_the_same_on_every_machine() -> None:
    # By sha256sum, "(0, 'a', 0)" hashes to 13b7…, "(0, 'a', 1)" to 840a…, "(0, 'a', 2)" to 019a….
    scored = [rollout("a", i, 0.0) for i in range(3)]
    assert chosen(select(scored, strategy="random_per_prompt")) == [("a", 2)]


def test_prompt_ids_may_be_any_hashable_and_share_a_text() -> None:
    scored = [rollout(("x", 1), 0, 1.0, "same"), rollout(7, 0, 0.0, "same"), rollout(None, 0, 0.0, "same")]
    assert chosen(select(scored, strategy="top_per_prompt")) == [(("x", 1), 0), (7, 0), (None, 0)]


def test_nothing_in_nothing_out() -> None:
    assert select([], strategy="top_per_prompt") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "best"}, r"selection.strategy \(best\) is unknown: use one of top_per_prompt"),
        ({"strategy": "top_per_prompt", "top_n": 0}, r"selection.top_n_rollouts \(0\) must be >= 1"),
        ({"strategy": "top_k_overall"}, r"selection.top_k \(None\) must be >= 1"),
        ({"strategy": "random_k_overall", "top_k": 0}, r"selection.top_k \(0\) must be >= 1"),
        ({"strategy": "top_per_prompt", "truncated": "drop"}, r"selection.truncated \(drop\) is unknown: use one of"),
        ({"strategy": "top_per_prompt", "min_reward": float("nan")}, r"selection.min_reward \(nan\)"),
    ],
)
def test_bad_arguments_name_key_value_and_remedy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select([], **arguments)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_no_number_is_refused(reward: float) -> None:
    with pytest.raises(DataError, match="prompt_id 'a', rollout_index 3"):
        select([rollout("a", 3, reward)], strategy="random_per_prompt")


def test_a_rollout_given_twice_is_refused() -> None:
    with pytest.raises(DataError, match="prompt_id 'a', rollout_index 3 occurs twice"):
        select([rollout("a", 3, 0.0), rollout("b", 3, 0.0), rollout("a", 3, 1.0)], strategy="top_per_prompt")


@st.composite
def steps(draw: st.DrawFn, *, tie_across_prompts: bool = True) -> list[ScoredRollout]:
    """Rollouts of a few prompts in any order, with many ties, duplicates and cut responses."""
    keys = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), unique=True, max_size=18))
    grid = st.integers(-40, 40).map(lambda v: v * 0.00005)
    return [
        rollout(
            p,
            i,
            draw(grid) + (0.0 if tie_across_prompts else p * 10),
            draw(st.sampled_from("xyzuvw")),
            draw(st.booleans()),
        )
        for p, i in keys
    ]


def oracle(
    scored: list[ScoredRollout], strategy: str, top_n: int, top_k: int, low: float | None, truncated: str
) -> set:
    """Selected (prompt_id, rollout_index) of the `top` strategies, by repeated removal of the worst."""

    def value(x: float) -> Fraction:
        return Fraction(f"{x:.4f}")

    kept = []
    for r in scored:
        mates = [m for m in scored if m.prompt_id == r.prompt_id]
        has_finished = any(m.finish_reason == "stop" for m in mates)
        refused = {"allow": False, "refuse": True, "prefer_finished": has_finished}[truncated]
        if r.finish_reason == "stop" or not refused:
            kept.append(r)
    distinct = []
    for r in kept:
        lower = [m for m in kept if m.prompt_id == r.prompt_id and m.rollout_index < r.rollout_index]
        if all(m.response != r.response for m in lower) and (low is None or value(r.reward) >= value(low)):
            distinct.append(r)
    appearance = [r.prompt_id for r in scored]

    def beats(a: ScoredRollout, b: ScoredRollout) -> bool:
        if value(a.reward) != value(b.reward):
            return value(a.reward) > value(b.reward)
        if a.rollout_index != b.rollout_index:
            return a.rollout_index < b.rollout_index
        return appearance.index(a.prompt_id) < appearance.index(b.prompt_id)

    result = set()
    for r in distinct:
        rivals = distinct if strategy == "top_k_overall" else [m for m in distinct if m.prompt_id == r.prompt_id]
        better = sum(beats(m, r) for m in rivals if m is not r)
        if better < (top_k if strategy == "top_k_overall" else top_n):
            result.add((r.prompt_id, r.rollout_index))
    return result


bounds = st.none() | st.integers(-30, 30).map(lambda v: v * 0.00005)


@settings(max_examples=300, deadline=None)
@given(
    steps(), st.sampled_from(["top_per_prompt", "top_k_overall"]), st.integers(1, 4), bounds, st.sampled_from(TRUNCATED)
)
def test_top_strategies_agree_with_the_oracle(scored: Any, strategy: Any, count: int, low: Any, truncated: Any) -> None:
    decisions = select(scored, strategy=strategy, top_n=count, top_k=count, min_reward=low, truncated=truncated)
    assert set(chosen(decisions)) == oracle(scored, strategy, count, count, low, truncated)


@settings(max_examples=300, deadline=None)
@given(steps(), st.sampled_from(STRATEGIES), st.integers(1, 4), bounds, st.sampled_from(TRUNCATED), st.integers(0, 2))
def test_invariants_of_every_strategy(
    scored: Any, strategy: Any, count: int, low: Any, truncated: Any, seed: int
) -> None:
    decisions = select(
        scored, strategy=strategy, top_n=count, top_k=count, min_reward=low, truncated=truncated, seed=seed
    )
    assert [(d.prompt_id, d.rollout_index) for d in decisions] == [(r.prompt_id, r.rollout_index) for r in scored]
    picked = [r for r, d in zip(scored, decisions, strict=True) if d.selected]
    texts = Counter((r.prompt_id, r.response) for r in picked)
    assert all(n == 1 for n in texts.values())
    ranked = Counter(d.prompt_id for d in decisions if " of " in d.reason and "rank" in d.reason)
    if strategy.endswith("per_prompt"):
        assert Counter(r.prompt_id for r in picked) == {p: min(count, n) for p, n in ranked.items()}
    else:
        assert len(picked) == min(count, ranked.total())
    assert all(f" of {ranked.total()}" in d.reason for d in decisions if d.selected and strategy.endswith("overall"))
    if truncated == "refuse":
        assert all(r.finish_reason == "stop" for r in picked)


@settings(max_examples=300, deadline=None)
@given(
    steps(tie_across_prompts=False),
    st.sampled_from(STRATEGIES),
    st.integers(1, 4),
    st.sampled_from(TRUNCATED),
    st.randoms(),
)
def test_the_order_of_the_rollouts_does_not_matter(
    scored: Any, strategy: Any, count: int, truncated: Any, shuffle: random.Random
) -> None:
    shuffled = list(scored)
    shuffle.shuffle(shuffled)
    first, second = (
        select(s, strategy=strategy, top_n=count, top_k=count, truncated=truncated) for s in (scored, shuffled)
    )
    assert {(d.prompt_id, d.rollout_index): d for d in first} == {(d.prompt_id, d.rollout_index): d for d in second}
