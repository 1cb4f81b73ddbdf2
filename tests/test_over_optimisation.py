"""The alarm: series made by hand, and the rates of false and of missed alarms on drawn ones."""

import math
from typing import Any

import numpy as np
import pytest

from alignment.over_optimisation import SHARE, Alarm, alarms, newest_alarms

BASE = [-1.5, -0.5, 0.5, 1.5, -1.5, -0.5, 0.5, 1.5]
"""Scores of the base on 8 prompts; their standard deviation is sqrt(1.25) = 1.118."""


def validation(step: int, rewards: list[float], judged: list[float]) -> dict[str, Any]:
    means = {"reward_mean": sum(rewards) / len(rewards), "judge_mean": sum(judged) / len(judged)}
    return {"kind": "validation", "step": step, **means, "rewards": rewards, "judged": judged, "seconds": 1.0}


def series(*gains: tuple[float, float]) -> list[dict[str, Any]]:
    """Validations at steps 0, 5, 10 …, in which every prompt has gained the same; among records of other kinds."""
    records: list[dict[str, Any]] = [{"kind": "task", "name": "start", "seconds": 1.0}]
    for i, (reward, judge) in enumerate([(0.0, 0.0), *gains]):
        records += [validation(5 * i, [b + reward for b in BASE], [b + judge for b in BASE])]
        records += [{"kind": "step", "step": 5 * i + 1, "reward_mean": 9.0}]
    return records


def steps(records: list[dict[str, Any]]) -> list[int]:
    return [alarm.step for alarm in alarms(records)]


def test_what_rises_together_raises_no_alarm() -> None:
    assert steps(series((0.5, 0.4), (1.0, 0.8), (2.0, 1.0))) == []


def test_a_judge_that_stays_or_falls_while_the_reward_rises_raises_one() -> None:
    assert steps(series((0.5, 0.5), (1.0, 0.0), (2.0, 0.0))) == [10]
    assert steps(series((0.5, 0.5), (1.0, 0.5), (2.0, -1.0))) == [15]


def test_the_share_is_where_the_rule_says() -> None:
    # Equal gains on every prompt have intervals without width: the judge's must be clearly below a third.
    assert round(SHARE, 4) == 0.3333
    assert steps(series((3.0, 1.01))) == []
    assert steps(series((3.0, 0.99))) == [5]


def test_scores_of_another_unit_raise_the_same_alarms() -> None:
    records = series((1.0, 0.5), (2.0, 0.5))
    scaled = [r | {"judged": [100 * j + 7 for j in r["judged"]]} if "judged" in r else r for r in records]
    assert steps(records) == steps(scaled) == [10]


def test_an_alarm_is_told_when_it_begins_and_again_after_it_has_passed() -> None:
    records = series((1.0, 0.0), (2.0, 0.0), (2.0, 2.0), (3.0, 0.0))
    assert steps(records) == [5, 20]
    newest = [newest_alarms(records[: i + 1]) for i, r in enumerate(records) if r["kind"] == "validation"]
    assert [[a.step for a in told] for told in newest] == [[], [5], [], [], [20]]
    assert newest[4] == alarms(records)[1:]


def test_a_reward_that_falls_or_stays_raises_none() -> None:
    assert steps(series((-1.0, -2.0), (0.0, -2.0))) == []


def test_the_text_says_by_how_much() -> None:
    (alarm,) = alarms(series((2.236, -1.118)))
    assert isinstance(alarm, Alarm)
    assert alarm.text.startswith(
        "since RS step 0 the reward has risen by 2.00 standard deviations (95% +2.00 to +2.00) and the judge by -1.00 "
        "(95% -1.00 to -1.00), clearly less than 33% of it: the policy may be exploiting the reward model."
    )


def drawn(seed: int, reward_gain: float, judge_gain: float, prompts: int = 32) -> bool:
    """Whether a validation with these mean gains, in standard deviations of noise, raises an alarm."""
    rng = np.random.default_rng(seed)
    before, after = rng.normal(size=(2, prompts)), rng.normal(size=(2, prompts))
    after += np.array([[reward_gain], [judge_gain]])
    return bool(alarms([validation(i, *scores.tolist()) for i, scores in enumerate((before, after))]))


def test_noise_raises_hardly_any_and_a_clear_case_nearly_always() -> None:
    assert sum(drawn(seed, 0.0, 0.0) for seed in range(12)) <= 1
    assert sum(drawn(seed, 1.0, 0.8) for seed in range(12)) <= 1
    assert sum(drawn(seed, 3.0, 0.0) for seed in range(12)) >= 11


def means(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        {"kind": "validation", "step": i, "reward_mean": reward, "judge_mean": judge}
        for i, (reward, judge) in enumerate(pairs)
    ]


def test_means_alone_need_three_rises_in_a_row() -> None:
    assert steps(means((0, 0), (1, 0), (2, -1), (3, 0))) == [3]
    assert steps(means((0, 0), (1, 0), (2, -1))) == []
    assert steps(means((0, 0), (1, 0), (2, 0.1), (3, 0))) == []  # once, the judge rose above the base
    assert steps(means((0, 0), (1, 0), (0.5, 0), (3, 0))) == []  # the reward fell
    assert steps(means((0, 0), (5, 3), (1, 0), (2, 0), (3, 0))) == [4]


def test_other_prompts_are_not_paired() -> None:
    one, other = validation(0, BASE, BASE), validation(1, [9.0], [-9.0])
    assert steps([one, other]) == []


def test_no_validation_and_one_raise_none() -> None:
    assert alarms([]) == [] and newest_alarms([]) == []
    assert alarms(series()) == [] and newest_alarms(series()) == []


def test_scores_that_are_all_equal_before() -> None:
    flat = [0.0] * 8
    assert steps([validation(0, flat, flat), validation(1, [1.0, 2.0, 3.0, 4.0] * 2, flat)]) == [1]
    assert steps([validation(0, flat, flat), validation(1, flat, flat)]) == []


def test_fewer_than_eight_prompts_raise_none() -> None:
    def few(count: int) -> list[dict[str, Any]]:
        base = BASE[:count]
        return [validation(i, [b + 3 * i for b in base], base) for i in range(5)]

    assert steps(few(7)) == []
    assert steps(few(8)) == [1]


def test_a_gain_that_batching_could_make_is_none() -> None:
    flat = [0.5] * 8
    noise = [0.5 + 9e-5] * 8
    for base in (flat, BASE):  # equal scores too, which have no deviation to measure a gain by
        assert steps([validation(0, base, base), validation(1, [b + 9e-5 for b in base], base)]) == []
        assert steps([validation(0, base, base), validation(1, [b + 2e-4 for b in base], base)]) == [1]
    # The judge's gain is none either, however small its deviation.
    gained = [b + 1.0 for b in BASE]
    assert steps([validation(0, BASE, flat), validation(1, gained, noise)]) == [1]
    assert steps(means((0, 0), (1, 9e-5), (2, 0), (3, 0))) == [3]
    assert steps(means((0, 0), (3e-5, 0), (6e-5, 0), (9e-5, 0))) == []


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, "missing"])
@pytest.mark.parametrize("key", ["reward_mean", "judge_mean", "rewards", "judged"])
def test_a_validation_with_a_score_that_is_no_number_raises_none(key: str, bad: float | str | None) -> None:
    records = [r for r in series((0.5, 0.5), (3.0, 0.0), (3.0, 0.0)) if r["kind"] == "validation"]
    one = records[2]
    if key in ("rewards", "judged"):
        records[2] = one | {key: [*one[key][:-1], None if bad == "missing" else bad]}
    elif bad == "missing":
        records[2] = {k: v for k, v in one.items() if k != key}
    else:
        records[2] = one | {key: bad}
    assert steps(records[:3]) == [] and newest_alarms(records[:3]) == []
    assert steps(records) == [15] and [a.step for a in newest_alarms(records)] == [15]
    # As the first one it is passed over: the next is what later ones are compared with.
    assert steps([records[2], records[0], records[3]]) == [15]
    assert steps([records[2]]) == [] and newest_alarms([records[2]]) == []


def shadowed(records: list[dict[str, Any]], name: str, *gains: float) -> list[dict[str, Any]]:
    """The records, with one shadow more in the validations, by which every prompt has gained the same."""
    gained = iter([0.0, *gains])
    found = []
    for record in records:
        if record["kind"] == "validation":
            scores = [100 * (b + gain) for gain in [next(gained)] for b in BASE]
            means = record.get("shadow_means", {}) | {name: sum(scores) / len(scores)}
            record = record | {"shadow_means": means, "shadowed": record.get("shadowed", {}) | {name: scores}}
        found.append(record)
    return found


def test_each_shadow_is_compared_as_the_judge_is() -> None:
    records = series((1.0, 0.5), (2.0, 1.0), (3.0, 0.5))
    assert [(a.step, a.who) for a in alarms(records)] == [(15, "the judge")]
    # In units of the shadows' own: the first follows, the second stays behind from the second validation on.
    records = shadowed(shadowed(records, "kind/3", 0.5, 1.0, 1.5), "strict/1", 0.5, 0.5, 0.5)
    told = alarms(records)
    assert [(a.step, a.who) for a in told] == [(10, "the shadow strict/1"), (15, "the judge")]
    assert "and the shadow strict/1 by +0.45 (95% +0.45 to +0.45)" in told[0].text
    assert newest_alarms(records) == told[1:]
    assert newest_alarms(records[:-2]) == told[:1]


def test_validations_before_a_shadow_was_named_are_not_its_base() -> None:
    records = series((1.0, 1.0), (2.0, 2.0), (3.0, 3.0))
    late = records[:3] + shadowed(records[3:], "strict/1", 0.0, 0.0)
    assert [(a.step, a.who) for a in alarms(late)] == [(10, "the shadow strict/1")]
