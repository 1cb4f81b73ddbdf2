"""The page of a reward model, as a parser sees it, and the sentences on it, by hand."""

import copy
import json
import re
from functools import cache
from typing import Any

import numpy as np
import pytest

from alignment.reward_findings import findings, headline
from alignment.reward_page import reward_page
from alignment.reward_quality import as_json, pair_quality, regression_quality
from test_report import Page, contrast

HOSTILE = "</style><script>alert(1)</script> {{ 7 * 7 }} \"'& \x00 \ud800"


def quality(pairs: int = 120) -> dict[str, Any]:
    measured: dict[str, Any] = json.loads(measured_json(pairs))
    return measured


@cache
def measured_json(pairs: int) -> str:
    rng = np.random.default_rng(0)
    rewards, lengths = rng.normal(size=(2, pairs)), rng.integers(1, 50, size=(2, pairs))
    rewards[0] += 1.0
    return json.dumps(as_json(pair_quality(*rewards.tolist(), *lengths.tolist(), seed=0)))


def card() -> dict[str, Any]:
    validations = [
        {"step": step, "set": name, "accuracy": 0.5 + 0.001 * step, "loss": 0.7 - 0.001 * step}
        for step in (0, 100) for name in ("reviews", "chats")
    ]  # fmt: skip
    return {
        "name": "reward_model",
        "version": "3",
        "base": "minilm",
        "digest": "ab12",
        "recipe_digest": "cd34",
        "data": {
            "digest": "ef56",
            "sets": [
                {
                    "role": "trained on",
                    "source": "train.jsonl",
                    "examples": 800,
                    "texts_cut": 9,
                    "left_out": {"prompts differ": 3, "malformed": 1},
                },
                {"role": "measured on", "source": "test.jsonl", "examples": 120, "texts_cut": 0, "left_out": {}},
            ],
        },
        "training": {"losses": [0.7, 0.6, 0.5], "validations": validations},
        "quality": {
            "reviews": quality(),
            "chats": quality(40),
            "ratings": as_json(regression_quality([[1.0], [2.0]], [[1.0], [4.0]], ["helpful"])),
        },
    }


def paths(values: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every part of a card stands, lists of records included."""
    if isinstance(values, dict):
        inner = list(values.items())
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        inner = list(enumerate(values))
    else:
        return [prefix]
    below = [path for key, value in inner for path in paths(value, (*prefix, key))]
    return [prefix, *below] if prefix else below


def without(values: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    broken = copy.deepcopy(values)
    inner = broken
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return broken


def test_numbers_stand_on_the_page_exactly() -> None:
    content = card()
    values = Page(reward_page(content)).values
    for i, name in enumerate(("reviews", "chats")):
        measured = content["quality"][name]
        assert int(values[f"quality.{i}.pairs"]) == measured["pairs"]
        for key in ("accuracy", "over_shorter_wins", "over_longer_wins"):
            assert float(values[f"quality.{i}.{key}"]) == measured[key]["value"]
        for key in ("loss", "chosen_mean", "rejected_mean", "reward_mean", "reward_std"):
            assert float(values[f"quality.{i}.{key}"]) == measured[key]
        assert float(values[f"quality.{i}.margin.quantiles.50"]) == measured["margin"]["quantiles"]["50"]
        assert float(values[f"quality.{i}.calibration.expected_error"]) == measured["calibration"]["expected_error"]
        assert float(values[f"quality.{i}.length_correlation.pearson"]) == measured["length_correlation"]["pearson"]


def test_the_page_says_what_was_trained_on_what() -> None:
    text = Page(reward_page(card())).text
    assert "Reward model reward_model, version 3" in text
    assert re.search(r"800 examples of train\.jsonl; left out:\s+3 \(prompts differ\),\s+1 \(malformed\)", text)
    assert "120 examples of test.jsonl" in text and "minilm" in text
    assert re.search(r"helpful\s*2\s*2\.000\s*1\.000", text)  # squared errors 0 and 4; two points lie on a line


def test_learning_curves_by_hand() -> None:
    # Steps 0 to 100 lie on x = 48 to 424. Losses 0.5 to 0.7 get ticks of 0.05: y = 210 is 0.5 and y = 10 is 0.7.
    seen = Page(reward_page(card()))
    lines = [a for tag, a in seen.elements if tag == "polyline"]
    assert lines[0] == {"class": "l s0", "points": "51.8,10.0 55.5,110.0 59.3,210.0"}
    assert lines[1] == {"class": "l s1", "points": "48.0,10.0 424.0,110.0"}
    # The accuracy of the same set, in the same style: 0.5 and 0.6 are the ends of its axis.
    assert lines[3] == {"class": "l s1", "points": "48.0,210.0 424.0,10.0"}


def test_long_learning_curves_are_averaged_in_blocks() -> None:
    content = {"training": {"losses": [1.0, 3.0] * 250 + [7.0]}}  # 501 losses: 250 pairs of mean 2, then a 7 alone
    seen = Page(reward_page(content))
    assert "training batches, means of 2 steps: 2 at step 2, 7 at step 501" in seen.text
    (line,) = [a["points"] for tag, a in seen.elements if tag == "polyline"]
    assert line is not None and len(line.split()) == 251


def test_bars_by_hand() -> None:
    measured = as_json(pair_quality([1.0, 1.0, 0.0, 1.0], [0.0] * 4, [2, 2, 2, 2], [1, 1, 1, 3], seed=0))
    seen = Page(reward_page({"quality": {"x": measured}}))
    bars = [a for tag, a in seen.elements if tag == "rect" and (a.get("class") or "").startswith("b ")]
    # Accuracy 3.5 of 4, shorter wins 1 of 4, longer wins 3 of 4, from y = 210 up over 200 units
    assert [(a["class"], a["y"], a["height"]) for a in bars[:3]] == [
        ("b s0", "35.0", "175.0"), ("b s1", "160.0", "50.0"), ("b s1", "60.0", "150.0")
    ]  # fmt: skip
    # Confidence 0.5 once and σ(1) = 0.731 three times: a third of, and the whole of, a quarter of the height
    assert [(a["class"], float(a["height"] or 0)) for a in bars[3:5]] == [("b s2", 16.7), ("b s2", 50.0)]
    # Margins 0, 1, 1, 1 in bins of 0.1 from -1 to 1
    assert [a["class"] for a in bars[5:]] == ["b s1"] * 10 + ["b s0"] * 10
    assert [float(a["height"] or 0) > 0 for a in bars[5:]] == [False] * 10 + [True] + [False] * 8 + [True]


def test_untrusted_text_stays_text() -> None:
    content = card()
    content |= {"name": HOSTILE, "version": HOSTILE, "base": HOSTILE, "digest": HOSTILE, HOSTILE: HOSTILE}
    content["train_pairs"] = {"source": HOSTILE, "used": 1, "left_out": {HOSTILE: 2}}
    content["quality"] = {HOSTILE: quality()}
    content["training"]["validations"] = [{"step": 1, "set": HOSTILE, "accuracy": 0.5, "loss": 0.5}]
    page = reward_page(content)
    seen = Page(page)
    assert page.encode() and not seen.open
    assert not {"script", "iframe"} & {tag for tag, _ in seen.elements}
    assert "</style><script>alert(1)</script> {{ 7 * 7 }} \"'& ␀ ?" in seen.text


def test_the_page_is_self_contained_and_accessible() -> None:
    page = reward_page(card())
    elements = Page(page).elements
    assert page.startswith("<!doctype html>")
    for tag, attributes in elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and "url(" not in (value or "")
            assert name not in ("src", "href", "action") or value == "data:,", tag
    assert [a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy"] == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    ]
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a[name] in ids for _, a in elements for name in ("aria-labelledby", "aria-describedby") if name in a)
    charts = [a for tag, a in elements if tag == "svg" and a.get("role") == "img"]
    assert len(charts) == 2 + 2 * 3  # two learning curves; accuracy, reliability and margins of two sets of pairs
    tags = [tag for tag, _ in elements]
    assert tags.count("h1") == 1 and tags.count("table") == tags.count("caption") == tags.count("thead")
    assert all("scope" in a for tag, a in elements if tag == "th")


def test_colours_have_contrast_in_light_and_dark() -> None:
    schemes = re.findall(r":root \{ (.*?) \}", reward_page({}))
    assert len(schemes) == 2
    for scheme in schemes:
        colour = dict(re.findall(r"--(\w+):(#\w+)", scheme))
        for ground in (colour["ground"], colour["panel"]):
            assert contrast(colour["ink"], ground) >= 7 and contrast(colour["soft"], ground) >= 4.5
            assert all(contrast(colour[s], ground) >= 4.5 for s in ("s0", "s1", "s2"))


def test_an_empty_card_still_has_a_page() -> None:
    for content in ({}, {"quality": {"x": {}, "y": None}, "training": {}}):
        seen = Page(reward_page(content))
        assert not seen.open
        assert "not measured on held-out data: nothing is known of its quality" in seen.text
        assert "The card holds no learning curve." in seen.text


def test_a_card_may_lack_any_part() -> None:
    content = card()
    del content["quality"]["chats"]
    calibration = content["quality"]["reviews"]["calibration"]
    calibration["bins"] = calibration["bins"][:2]
    for path in paths(content):
        seen = Page(reward_page(without(content, path)))
        assert not seen.open and "What was trained on what" in seen.text, path


def test_null_is_the_same_as_missing() -> None:
    content = card()
    for key in content:
        assert reward_page(content | {key: None}) == reward_page(without(content, (key,)))
    content["quality"]["reviews"]["accuracy"]["ci95"] = None
    assert reward_page(content) == reward_page(without(content, ("quality", "reviews", "accuracy", "ci95")))


def told(**changes: Any) -> list[tuple[bool, str]]:
    return [(f.good, f.text) for f in findings(changes)]


def interval(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "ci95": [low, high]}


@pytest.mark.parametrize(
    ("changes", "good", "text"),
    [
        ({"accuracy": interval(0.7, 0.6, 0.8)}, True, "It is better than guessing"),
        ({"accuracy": interval(0.55, 0.5, 0.6)}, False, "It is not clearly better than guessing"),
        ({"accuracy": interval(0.3, 0.2, 0.4)}, False, "Are chosen and rejected answers swapped?"),
        ({"pairs": 99}, False, "Only 99 pairs were measured"),
        ({"reward_std": 0.0}, False, "Every answer gets the same reward"),
        ({"over_shorter_wins": interval(0.1, 0.05, 0.15)}, True, "It beats the rule “the shorter answer wins”"),
        ({"over_shorter_wins": interval(0.1, -0.05, 0.25)}, False, "+10.0 percentage points, 95% interval -5.0 to"),
        ({"over_longer_wins": interval(-0.1, -0.2, -0.05)}, False, "It loses to the rule “the longer answer wins”"),
        ({"calibration": {"expected_error": 0.1}}, True, "10.0 percentage points away from how often it is right"),
        ({"length_correlation": {"pearson": 0.1, "spearman": -0.5}}, True, "correlation -0.50"),
        ({"length_correlation": {"pearson": 0.6, "spearman": None}}, False, "will learn to write longer answers"),
        ({"length_correlation": {"pearson": 0.1, "spearman": -0.51}}, False, "Shorter answers get clearly higher"),
    ],
)  # fmt: skip
def test_each_finding_by_hand(changes: dict[str, Any], good: bool, text: str) -> None:
    ((is_good, sentence),) = told(**changes)
    assert is_good is good and text in sentence


@pytest.mark.parametrize(("correct", "kind"), [(0.6, "it is too sure of itself"), (1.0, "it is too modest")])
def test_bad_calibration_has_a_direction(correct: float, kind: str) -> None:
    bins = [
        {"low": 0.75, "high": 0.8, "count": 9, "confidence": 0.8, "correct": correct},
        {"low": 0.8, "high": 0.85, "count": 0, "confidence": None, "correct": None},
    ]
    ((good, sentence),) = told(calibration={"expected_error": 0.2, "bins": bins})
    assert not good and kind in sentence


def test_what_is_unknown_or_undefined_is_not_judged() -> None:
    assert told() == []
    assert told(pairs=100, reward_std=1.0, length_correlation={"pearson": None, "spearman": None}) == []


def test_the_headline_by_hand() -> None:
    measured = {"pairs": 1200, "accuracy": interval(0.7125, 0.65, 0.77)}
    expected = "On x the preferred answer gets the higher reward in 71.2% of 1,200 pairs (95% interval 65% to 77%)."
    assert headline("x", measured) == expected
    assert headline("x", {}) is None
    rated = as_json(regression_quality([[1.0], [2.0]], [[1.0], [None]], ["helpful"]))
    assert headline("x", rated) == "On x its predictions are compared with 2 rated answers."
    assert "reward in 50.0%." in str(headline("x", {"accuracy": {"value": 0.5}}))


def test_a_card_read_back_from_its_file_gives_the_same_page() -> None:
    assert reward_page(json.loads(json.dumps(card()))) == reward_page(card())
