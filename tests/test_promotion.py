"""The gate: every rule by hand-computed values, at its border, and where its number is not there."""

import json
from pathlib import Path
from typing import Any

import pytest

from alignment.config_promotion import PromotionSection
from alignment.promotion import NOT_PROMOTED, PROMOTED, gate, sentence
from promotion_effects import rows

ALL = {"max_length_ratio": 1.2, "max_kl": 0.5, "min_distinct_ratio": 0.7}
"""Bounds that the made-up rows reach exactly; `max_judge_fall` is at its default, which they reach too."""
UP_AND_DOWN = [1.0, -1.0] * 4
"""Differences of eight prompts. Of the 10,000 means of eight draws some 39 are -1 and 313 are -0.75, the others above:
the interval ends at -0.75 and, likewise, at 0.75."""


def rules(found: list[dict[str, Any]], **config: Any) -> dict[str, dict[str, Any]]:
    return {rule["name"]: rule for rule in gate(PromotionSection(**config), found, 2, None)["rules"]}


def column(name: str, values: list[Any]) -> list[dict[str, Any]]:
    """The made-up rows with another value each in one place."""
    return [{**row, name: value} for row, value in zip(rows(), values, strict=True)]


def test_a_policy_at_all_borders_is_promoted() -> None:
    found = gate(PromotionSection(**ALL), rows(), 2, None)
    assert found["verdict"] == PROMOTED and found["rolled_back"] is None and found["alias"] is None
    assert [rule["name"] for rule in found["rules"]] == [
        "reward_gain",
        "judge_gain",
        "response_length",
        "kl_to_base",
        "distinct_2",
    ]
    values = {rule["name"]: (rule["value"], rule["ci95"], rule["bound"], rule["passed"]) for rule in found["rules"]}
    assert values == {
        "reward_gain": (0.25, [0.25, 0.25], 0.0, True),
        "judge_gain": (-0.5, [-0.5, -0.5], -0.5, True),
        "response_length": (1.2, [1.2, 1.2], 1.2, True),
        "kl_to_base": (0.5, [0.5, 0.5], 0.5, True),
        "distinct_2": (pytest.approx(0.7), None, 0.7, True),
    }
    assert sentence(found) == ("Promoted: reward_gain, judge_gain, response_length, kl_to_base and distinct_2 passed.")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("reward_gain", {"min_reward_gain": 0.25}),  # above the bound, not at it
        ("judge_gain", {"max_judge_fall": 0.499}),
        ("response_length", {"max_length_ratio": 1.199}),
        ("kl_to_base", {"max_kl": 0.499}),
        ("distinct_2", {"min_distinct_ratio": 0.701}),
    ],
)
def test_one_rule_that_fails_is_enough(name: str, config: dict[str, float]) -> None:
    found = gate(PromotionSection(**{**ALL, **config}, alias="stable"), rows(), 2, None)
    assert found["verdict"] == NOT_PROMOTED and found["alias"] is None
    assert [rule["name"] for rule in found["rules"] if not rule["passed"]] == [name]
    assert sentence(found) == f"Not promoted: {name} did not pass."


def test_intervals_decide_and_say_so() -> None:
    reward = column("aligned_reward", [row["base_reward"] + d for row, d in zip(rows(), UP_AND_DOWN, strict=True)])
    assert rules(reward, min_reward_gain=-0.74)["reward_gain"] == {
        "name": "reward_gain",
        "value": 0.0,
        "ci95": [-0.75, 0.75],
        "bound": -0.74,
        "passed": False,
        "reason": "the 95% interval -0.750 to +0.750 is not above -0.74, though its middle is: more prompts "
        "(evaluation.num_prompts) would tell",
    }
    assert rules(reward, min_reward_gain=-0.76)["reward_gain"]["reason"] == (
        "the 95% interval -0.750 to +0.750 is above -0.76"
    )
    judge = column("aligned_judge", [row["base_judge"] + d for row, d in zip(rows(), UP_AND_DOWN, strict=True)])
    assert rules(judge, max_judge_fall=0.75)["judge_gain"]["passed"]
    assert rules(judge, max_judge_fall=0.74)["judge_gain"]["reason"].startswith(
        "the 95% interval -0.750 to +0.750 is not at least -0.74 standard deviations, though its middle is"
    )
    lengths = column("aligned_tokens", [10 * (2 + d) for d in UP_AND_DOWN])  # three times the base's, or once
    assert rules(lengths, max_length_ratio=2.75)["response_length"]["ci95"] == [1.25, 2.75]
    assert rules(lengths, max_length_ratio=2.75)["response_length"]["passed"]
    assert not rules(lengths, max_length_ratio=2.74)["response_length"]["passed"]
    nats = column("kl_to_base", [1 + d for d in UP_AND_DOWN])
    assert rules(nats, max_kl=1.75)["kl_to_base"]["passed"] and not rules(nats, max_kl=1.74)["kl_to_base"]["passed"]


def test_the_judge_has_no_unit() -> None:
    scaled = [{**row, **{key: 100 * row[key] + 7 for key in ("base_judge", "aligned_judge")}} for row in rows()]
    assert rules(scaled)["judge_gain"] == rules(rows())["judge_gain"]
    same = [{**row, "base_judge": 3.0, "aligned_judge": 3.0} for row in rows()]  # no spread, and no fall
    assert rules(same, max_judge_fall=0.0)["judge_gain"]["passed"]


def test_each_shadow_has_a_rule_of_its_own() -> None:
    two = [
        {
            **row,
            "base_shadows": {"strict/1": row["base_judge"], "other/2": 1.0},
            "aligned_shadows": {"strict/1": row["base_judge"] - 0.75, "other/2": 1.0},
        }
        for row in rows()
    ]
    found = rules(two)
    assert (found["shadow_gain:strict/1"]["value"], found["shadow_gain:strict/1"]["passed"]) == (-0.75, False)
    assert (found["shadow_gain:other/2"]["value"], found["shadow_gain:other/2"]["passed"]) == (0.0, True)
    del two[0]["aligned_shadows"]["other/2"]
    assert rules(two)["shadow_gain:other/2"]["reason"].startswith("not measured: 1 of 8 evaluation prompts have no")


@pytest.mark.parametrize(
    ("name", "key", "column_name"),
    [
        ("judge_gain", "max_judge_fall", "base_judge"),
        ("response_length", "max_length_ratio", "aligned_tokens"),
        ("kl_to_base", "max_kl", "kl_to_base"),
    ],
)
@pytest.mark.parametrize("absent", [None, float("nan")])
def test_a_number_that_is_not_there_fails_its_rule_or_is_left_out_by_the_config(
    name: str, key: str, column_name: str, absent: float | None
) -> None:
    without = rows(**{column_name: absent})
    found = gate(PromotionSection(**ALL), without, 2, None)
    rule = next(rule for rule in found["rules"] if rule["name"] == name)
    assert found["verdict"] == NOT_PROMOTED
    assert (rule["value"], rule["ci95"], rule["passed"]) == (None, None, False)
    assert rule["reason"] == (
        f"not measured: 8 of 8 evaluation prompts have no such number; promotion.{key}=null leaves the rule out"
    )
    found = gate(PromotionSection(**{**ALL, key: None}), without, 2, None)
    rule = next(rule for rule in found["rules"] if rule["name"] == name)
    assert found["verdict"] == PROMOTED and rule["passed"] is None
    assert rule["reason"] == f"left out: promotion.{key} is null"


def test_rows_of_an_older_program_have_no_lengths() -> None:
    old = [{key: value for key, value in row.items() if not key.endswith("_tokens")} for row in rows()]
    assert rules(old, max_length_ratio=9.0)["response_length"]["passed"] is False
    assert rules(old)["response_length"]["passed"] is None


def test_the_gain_is_never_left_out() -> None:
    found = rules(column("aligned_reward", [None, *[1.0] * 7]))["reward_gain"]
    assert (found["passed"], found["reason"]) == (False, "not measured: 1 of 8 evaluation prompts have no such number")
    few = gate(PromotionSection(), rows()[:7], 2, None)
    assert few["verdict"] == NOT_PROMOTED
    assert few["rules"][0]["reason"] == "not measured: an interval needs 8 evaluation prompts, and there are 7"


def test_texts_without_two_words_have_no_diversity() -> None:
    found = rules(rows(base_response="word"), min_distinct_ratio=0.1)["distinct_2"]
    assert found["reason"].startswith("not measured: no response of the base has two words")


def test_what_failed_badly_is_not_promoted_and_what_it_was_rolled_back_to_may_be() -> None:
    record = {"kind": "rollback", "step": 3, "rule": "validation", "value": 1.5, "ci95": [1.2, 1.8], "bound": 1.0}
    record["reason"] = "it fell"
    earlier, alone = (gate(PromotionSection(), rows(), step, record) for step in (2, 3))
    assert (earlier["verdict"], alone["verdict"]) == (PROMOTED, NOT_PROMOTED)
    assert earlier["rolled_back"] == {
        "to_step": 2,
        "step": 3,
        "rule": "validation",
        "value": 1.5,
        "ci95": [1.2, 1.8],
        "bound": 1.0,
        "reason": "it fell",
    }
    assert alone["rules"][-1] == {
        "name": "rollback",
        "value": 3,
        "ci95": None,
        "bound": 3,
        "passed": False,
        "reason": "RS step 3 failed badly, and the checkpoint of RS step 3 was evaluated: there was none before it",
    }


def test_the_verdict_is_one_of_the_files(tmp_path: Path) -> None:
    """Read from the disk it is the same, also where JSON has made null of a number."""
    path = tmp_path / "evaluation.json"
    for found in (rows(), rows(kl_to_base=None)):
        path.write_text(json.dumps(found))
        assert gate(PromotionSection(**ALL), json.loads(path.read_text()), 2, None) == gate(
            PromotionSection(**ALL), found, 2, None
        )
