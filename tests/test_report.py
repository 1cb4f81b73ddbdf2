"""The report: numbers by hand, the page as a parser (not the template) sees it."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from alignment.config_promotion import PromotionSection
from alignment.errors import DataError
from alignment.promotion import gate
from alignment.report import Sample, build_report, verdict, write_report
from alignment.report_page import render_page, visible
from alignment.report_summary import summary
from alignment.run_folder import create
from alignment.types import Checkpoint, JudgeRef, RewardModelRef
from promotion_effects import rows

KEYS = {
    "": "run_id steps selection_lift scoring_totals over_optimisation alarms validation evaluation reward_model judge "
    "seconds base checkpoint",
    "steps": "step reward_mean selected_reward_mean response_length_mean truncated_fraction loss grad_norm lr seconds",
    "steps.later": "judge_mean selected_judge_mean kl duplicate_fraction num_rollouts num_selected tokens_per_second "
    "scoring_server",
    "steps.scoring_server": "mean_batch queue_ms compute_ms failures real_over_padded restarted",
    "steps.seconds": "rollouts scoring update validation",
    "validation": "step reward_mean judge_mean",
    "reward_model": "name version digest accuracy",
    "judge": "name accuracy",
    "seconds": "total setup rollouts scoring update validation overhead",
    "checkpoint": "uri sha256 step",
}
"""The keys of report.json as the contract lists them."""


SERVER = {"mean_batch": 12.5, "queue_ms": 2.25, "compute_ms": 31.0, "failures": 3, "real_over_padded": 0.925}
SERVER |= {"restarted": True}


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    record = {"kind": "step", "step": step, "reward_mean": 0.1 * step, "selected_reward_mean": 1.0 + 0.1 * step}
    record |= {"response_length_mean": 23.5, "truncated_fraction": 0.9, "duplicate_fraction": 0.0, "num_rollouts": 64}
    record |= {"num_selected": 8, "response_tokens": 180, "loss": 3.25, "grad_norm": 1.5, "lr": 2e-5}
    record |= {"judge_mean": 0.01 * step, "selected_judge_mean": 0.02 * step, "scoring_server": SERVER}
    seconds = {"rollouts": 3.0, "scoring": 1.0, "update": 2.0}
    return record | {"seconds": seconds, "tokens_per_second": 400.0, "prompt_ids": ["a"]} | changes


def metrics() -> list[dict[str, Any]]:
    validations = [
        {"kind": "validation", "step": step, "reward_mean": 0.2 * step, "judge_mean": 0.05 * step, "seconds": 4.0}
        for step in (0, 2)
    ]
    task = {"kind": "task", "name": "start", "seconds": 5.0}
    empty = step_record(3, selected_reward_mean=None, loss=None, grad_norm=None)
    return [task, validations[0], step_record(1), step_record(2), validations[1], empty]


def evaluation() -> dict[str, Any]:
    base = {"reward_mean": 0.4, "reward_mean_ci95": [0.2, 0.6], "judge_mean": 0.1, "judge_mean_ci95": [0.0, 0.2]}
    base |= {"response_length_mean": 23.0, "distinct_2": 0.91}
    base |= {"self_bleu": 0.12, "repetition_4": 0.01, "truncated_fraction": 0.9, "refusal_fraction": 0.02}
    aligned = {"reward_mean": 1.0, "reward_mean_ci95": [0.8, 1.2], "judge_mean": 0.3, "judge_mean_ci95": [0.2, 0.4]}
    aligned |= {"response_length_mean": 22.0, "distinct_2": 0.85}
    aligned |= {"self_bleu": 0.25, "repetition_4": 0.04, "truncated_fraction": 0.8, "refusal_fraction": 0.0}
    return {
        "prompts": 96,
        "base": base,
        "aligned": aligned | {"kl_to_base": 1.23, "kl_to_base_ci95": [1.0, 1.5]},
        "reward_gain": 0.6,
        "reward_gain_ci95": [0.4, 0.8],
        "judge_gain": 0.2,
        "judge_gain_ci95": [-0.1, 0.5],
        "win_rate": 0.78125,
        "win_rate_ci95": [0.7, 0.86],
        "judge_win_rate": 0.625,
        "judge_win_rate_ci95": [0.53, 0.72],
        "length_controlled_win_rate": 0.75,
        "length_controlled_win_rate_ci95": [0.65, 0.84],
        "judge_length_controlled_win_rate": 0.6,
        "judge_length_controlled_win_rate_ci95": [0.5, 0.7],
        "sign_test": {"wins": 75, "losses": 21, "ties": 0, "p_value": 2.6e-8},
        "judge_sign_test": {"wins": 58, "losses": 34, "ties": 4, "p_value": 0.0161},
        "best_of_n": {"n": 2, "win_rate": 0.89, "judge_win_rate": 0.7, "kl_bound": 0.1931},
        "best_of_n_curve": {
            "1": {"win_rate": 0.51, "judge_win_rate": 0.5, "kl_bound": 0.0},
            "2": {"win_rate": 0.89, "judge_win_rate": 0.7, "kl_bound": 0.1931},
        },
        "seconds": 7.0,
    }


def report(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "run_id": "7",
        "metrics": metrics(),
        "evaluation": evaluation(),
        "reward_model": RewardModelRef("reward_model", "3", "ab12", "runs/triton_repo", 0.81),
        "judge": JudgeRef("rotten_tomatoes judge", "runs/judge", 0.74),
        "base": "runs/cache/smollm2",
        "checkpoint": Checkpoint("runs/7/checkpoints/step-2", "cd34", 2),
        "total_seconds": 60.0,
        "setup_seconds": 12.0,
    }
    return build_report(**(arguments | changes))


def samples() -> list[Sample]:
    hostile = "</p><script>alert(1)</script> {{ 7 * 7 }} \"'& \x00\x1b[2J \u202eright to left \ud800"
    return [
        Sample("Movie review: this", "was fine\nby me", hostile, 0.1, 1.2, 0.0, 0.5, 5, 20),
        Sample(hostile, hostile, "ok", 0.1, 1.2, 0.0, -0.5, 20, 1),
    ]


class Page(HTMLParser):
    """What a browser would take from the page: elements, attributes and text by `data-key`."""

    VOID = ("meta", "link", "br", "input", "circle", "rect", "path", "line", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.values: dict[str, str] = {}
        self.text = ""
        self.open: list[tuple[str, str | None]] = []
        self.chart = ""
        self.drawn: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if (attributes.get("id") or "").startswith("chart-"):
            self.chart = (attributes["id"] or "").removeprefix("chart-")
        key = attributes.get("data-key")
        if key is not None:
            assert key not in self.values, f"{key} stands twice"
            self.values[key] = attributes.get("value") or ""
        if tag not in self.VOID:
            self.open.append((tag, key))

    def lines(self, chart: str) -> list[str]:
        """The points of each line of a chart."""
        return [points for key, points in self.drawn if key == chart]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "polyline":
            self.drawn.append((self.chart, dict(attrs)["points"] or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if all(tag != "style" for tag, _ in self.open):
            self.text += data
        for _, key in self.open:
            if key is not None and not self.values[key]:
                self.values[key] = data


def page(content: dict[str, Any] | None = None) -> Page:
    content = content or report()
    return Page(render_page(content, verdict(content), samples(), '{"seed": 0, "name": "</pre><b>"}'))


def test_the_keys_are_those_of_the_contract() -> None:
    built = report()
    assert set(built) == set(KEYS[""].split())
    for key in ("reward_model", "judge", "seconds", "checkpoint"):
        assert set(built[key]) == set(KEYS[key].split()), key
    for step in built["steps"]:
        assert set(step) == {*KEYS["steps"].split(), *KEYS["steps.later"].split()}
        assert set(step["scoring_server"]) == set(KEYS["steps.scoring_server"].split())
        assert set(step["seconds"]) == set(KEYS["steps.seconds"].split())
    assert all(set(v) == set(KEYS["validation"].split()) for v in built["validation"])
    assert built["evaluation"] == evaluation()


def test_seconds_add_up() -> None:
    built = report()
    assert [s["seconds"]["validation"] for s in built["steps"]] == [0.0, 4.0, 0.0]
    # 60 in all = 12 setup + 9 rollouts + 3 scoring + 6 update + 8 in two validations + 7 evaluation + 15 overhead
    assert built["seconds"] == {
        "total": 60.0,
        "setup": 12.0,
        "rollouts": 9.0,
        "scoring": 3.0,
        "update": 6.0,
        "validation": 8.0,
        "overhead": 15.0,
    }
    without = {k: v for k, v in evaluation().items() if k != "seconds"}
    assert report(evaluation=without)["seconds"]["overhead"] == 22.0
    assert report(total_seconds=20.0)["seconds"]["overhead"] == 0.0


def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    inner = [(f"{prefix}{k}", v) for k, v in values.items()]
    return [p for k, v in inner for p in (leaves(v, f"{k}.") if isinstance(v, dict) else [k])]


CURVE = "best_of_n_curve"


@pytest.mark.parametrize("path", [*(p for p in leaves(evaluation()) if p != "seconds" and CURVE not in p), CURVE])
def test_an_evaluation_that_lacks_a_key_is_refused(path: str) -> None:
    broken = copy.deepcopy(evaluation())
    *parents, last = path.split(".")
    inner = broken
    for parent in parents:
        inner = inner[parent]
    del inner[last]
    with pytest.raises(DataError, match=re.escape(f"the evaluation lacks {path}")):
        report(evaluation=broken)


@pytest.mark.parametrize("key", [k for k in KEYS["steps"].split() if k != "step"])
def test_a_step_record_that_lacks_a_key_is_refused(key: str) -> None:
    broken = step_record(1)
    del broken[key]
    with pytest.raises(DataError, match=f"the step record of step 1 in metrics.jsonl lacks {key}"):
        report(metrics=[broken])


def test_a_step_recorded_twice_is_refused() -> None:
    with pytest.raises(DataError, match=r"rising steps, each once; got \[1, 1\]"):
        report(metrics=[step_record(1), step_record(1)])


@pytest.mark.parametrize(
    ("reward", "judge", "said"),
    [
        (
            [0.6, 0.9],
            [0.6, 0.8],
            "The aligned model beats the base by reward (78% of 96 held-out prompts, 95% interval",
        ),
        ([0.6, 0.9], [0.6, 0.8], "The independent judge agrees (62%, 95% interval 60% to 80%)."),
        ([0.6, 0.9], [0.2, 0.4], "The independent judge disagrees"),
        ([0.6, 0.9], [0.4, 0.6], "The independent judge sees no clear difference"),
        ([0.5, 0.9], [0.6, 0.8], "is not clearly better than the base by reward"),
        ([0.5, 0.9], [0.6, 0.8], "The independent judge prefers the aligned model"),
        ([0.1, 0.4], [0.2, 0.4], "The aligned model is worse than the base by reward"),
        ([0.1, 0.4], [0.2, 0.4], "The independent judge agrees"),
    ],
)
def test_the_verdict_follows_the_intervals(reward: list[float], judge: list[float], said: str) -> None:
    content = report(evaluation=evaluation() | {"win_rate_ci95": reward, "judge_win_rate_ci95": judge})
    assert said in verdict(content)


def test_the_summary_fits_the_terminal() -> None:
    text = summary(report(), Path("runs/7/report.html"))
    lines = text.splitlines()
    assert len(lines) <= 12
    assert lines[1] == "  reward     0.400 → 1.000, gain +0.600 (95% +0.400 to +0.800)"
    assert lines[3] == "  win rate   78.1% by reward, 62.5% by the judge"
    assert lines[4] == "  the same at equal length 75.0% and 60.0%; sign test p = 2.6e-08 and 0.016"
    assert "KL to base 1.23 nats per response (95% 1.00 to 1.50); best of 2: at most 0.19" in text
    assert "time       1 min 00 s: setup 12 s, rollouts 9 s" in text
    assert lines[-1].endswith("runs/7/report.html")


def test_files_are_written(tmp_path: Path) -> None:
    folder = create(tmp_path, "7", '{"seed": 12345}')
    path = write_report(folder, report(), samples())
    assert path == folder.report_html
    assert json.loads(folder.report_json.read_text()) == report()
    assert '"seed": 12345' in Page(path.read_text()).text


def test_every_headline_number_stands_in_the_page_exactly() -> None:
    built, values = report(), page().values
    for path in leaves(evaluation()):
        if path.endswith("_mean_ci95"):  # a chart has them
            continue
        expected: Any = built["evaluation"]
        for part in path.split("."):
            expected = expected[part]
        assert json.loads(values[f"evaluation.{path}"]) == expected, path
    for key, expected in built["seconds"].items():
        assert float(values[f"seconds.{key}"]) == expected
    assert "95%: 70.0% to 86.0%" in page().text and "95%: -0.100 to +0.500" in page().text
    assert values["checkpoint.uri"] == built["checkpoint"]["uri"]
    assert values["reward_model.digest"] == "ab12"


def test_untrusted_text_stays_text() -> None:
    seen = page()
    assert not seen.open
    assert not {"script", "iframe", "object", "b"} & {tag for tag, _ in seen.elements}
    assert "</p><script>alert(1)</script> {{ 7 * 7 }} \"'& ␀␛[2J \u202eright to left ?" in seen.text
    assert '"name": "</pre><b>"' in seen.text
    assert visible("a\x00\n\t\x7f") == "a␀\n\t␡"


def test_the_page_needs_no_network_and_runs_nothing() -> None:
    for tag, attributes in page().elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "action"):
                assert value == "data:,", (tag, value)
            assert "url(" not in (value or "") and "javascript:" not in (value or "")
    policy = [a["content"] for tag, a in page().elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_the_page_is_accessible() -> None:
    elements = page().elements
    tags = [tag for tag, _ in elements]
    assert dict(elements)["html"] == {"lang": "en"}
    assert tags.count("h1") == 1 and tags.index("h1") < tags.index("h2") < tags.index("h3")
    assert tags.count("table") == tags.count("caption") == tags.count("thead") == 6
    assert all("scope" in attributes for tag, attributes in elements if tag == "th")
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, ids[0]) in ids
    charts = [a for tag, a in elements if tag == "svg" and a.get("role") == "img"]
    assert len(charts) == 13 and all("aria-labelledby" in a and "aria-describedby" in a for a in charts)
    assert all(a.get("role") == "img" or a.get("aria-hidden") == "true" for tag, a in elements if tag == "svg")


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two hex colours."""

    def luminance(colour: str) -> float:
        digits = colour if len(colour) == 7 else "#" + "".join(c * 2 for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_have_contrast_in_light_and_dark() -> None:
    template = (Path(__file__).parent.parent / "alignment/charts.html.jinja").read_text()
    schemes = re.findall(r":root \{ (.*?) \}", template)
    assert len(schemes) == 2
    for scheme in schemes:
        colour = dict(re.findall(r"--(\w+):(#\w+)", scheme))
        for ground in (colour["ground"], colour["panel"]):
            assert contrast(colour["ink"], ground) >= 7 and contrast(colour["soft"], ground) >= 4.5
            assert all(contrast(colour[s], ground) >= 4.5 for s in ("s0", "s1", "s2", "s3"))


def test_charts_place_points_by_hand() -> None:
    # Steps 0 to 3 lie on x = 48 to 424. Rewards 0.0 to 1.2 want ticks of 0.5, so y = 210 is 0 and y = 10 is 1.5.
    lines = page().lines("rewards")
    assert lines[0] == "173.3,196.7 298.7,183.3 424.0,170.0"  # all rollouts: 0.1, 0.2, 0.3
    assert lines[1] == "173.3,63.3 298.7,50.0"  # selected: 1.1, 1.2, then a step that selected nothing
    assert lines[2] == "48.0,210.0 298.7,156.7"  # validation: 0.0 at step 0, 0.4 at step 2
    assert re.search(r"Mean reward by step.{,200}0\s+0\.5\s+1\s+1\.5\s+0\s+1\s+2\s+3\s+RS step", page().text, re.DOTALL)


def test_the_judge_and_the_reward_server_stand_beside_the_rewards() -> None:
    built = report()
    assert [(s["judge_mean"], s["selected_judge_mean"]) for s in built["steps"]] == [
        (0.01, 0.02),
        (0.02, 0.04),
        (0.03, 0.06),
    ]
    assert built["steps"][0]["scoring_server"] == SERVER
    assert "".join(("1", "12.5", "2.2", "31.0", "3", "0.925", "yes")) in page().text
    assert [len(line.split()) for line in page().lines("judge")] == [3, 3, 2]  # all and selected rollouts, validation
    unknown = report(metrics=[step_record(1, scoring_server=dict.fromkeys(SERVER))])
    assert re.search(r"\b1––––––", page(unknown).text)


def test_the_kl_of_a_penalised_update_stands_beside_its_loss() -> None:
    assert "KL" not in page_of_steps(report())
    built = report(metrics=[step_record(1, kl=0.031), step_record(2, kl=None)])
    assert [s["kl"] for s in built["steps"]] == [0.031, None]
    assert re.search(r"Loss\s*KL\s*Gradient norm", page_of_steps(built))
    assert re.search(r"3\.250\s*0\.031\s*1\.500", page_of_steps(built))


def page_of_steps(built: dict[str, Any]) -> str:
    """The text of the page from the table of steps on."""
    return page(built).text.split("One row per RS step")[1]


def test_steps_recorded_before_the_shadow_was_measured_still_have_a_report() -> None:
    old = {k: v for k, v in step_record(1).items() if k not in ("judge_mean", "selected_judge_mean", "scoring_server")}
    built = report(metrics=[old])
    assert built["steps"][0]["judge_mean"] is None
    assert built["steps"][0]["scoring_server"] == dict.fromkeys(SERVER)
    assert not page(built).open


def test_an_alarm_stands_in_the_report_and_above_the_result() -> None:
    assert report()["alarms"] == [] and "Alarm" not in page().text
    validations = [
        {"kind": "validation", "step": step, "reward_mean": 1.0 * step, "judge_mean": -0.1 * step, "seconds": 1.0}
        for step in range(5)
    ]
    built = report(metrics=validations)
    (alarm,) = built["alarms"]
    assert alarm["step"] == 3 and alarm["text"].startswith("the mean reward has risen in 3 validations")
    assert page(built).values["alarms.0.text"] == alarm["text"]
    assert "alarm      at RS step 3: the judge does not follow the reward" in summary(built, "report.html")
    assert len(summary(built, "report.html").splitlines()) <= 14


def test_rollouts_of_another_run_are_named_in_report_page_and_summary() -> None:
    assert "rollouts" not in report() and "Rollouts of another run" not in page().text
    built = report(metrics=[{**r, "reused_from": "/runs/6"} if r["kind"] == "step" else r for r in metrics()])
    steps = [step["step"] for step in built["steps"]]
    assert built["rollouts"].startswith(f"RS steps {steps[0]} to {steps[-1]}: those of /runs/6, drawn by that run's")
    assert page(built).values["rollouts"] == built["rollouts"]
    assert f"rollouts   {built['rollouts']}" in summary(built, "report.html")


def charts(seen: Page) -> int:
    return sum(attributes.get("role") == "img" for _, attributes in seen.elements)


def test_an_evaluation_alone_has_no_empty_tables_and_names_its_base() -> None:
    alone = page(report(metrics=[{"kind": "task", "name": "start", "seconds": 5.0}]))
    assert [tag for tag, _ in alone.elements].count("table") == 3  # best of n, texts, time
    assert charts(alone) == 4  # before and after, win rate against KL, each by reward and by the judge
    assert alone.values["base.uri"] == "runs/cache/smollm2"
    assert "Course of the run" not in alone.text and "RS step" not in alone.text


def test_without_common_tokens_there_is_no_kl() -> None:
    without = evaluation()
    without["aligned"] |= {"kl_to_base": None, "kl_to_base_ci95": None}
    built = report(evaluation=without)
    assert "KL to base undefined: the two have different tokenizers" in summary(built, "report.html")
    assert "undefined: the two have different tokenizers" in page(built).text
    assert charts(page(built)) == charts(page()) - 2  # no plot of win rate against KL


def test_harness_tasks_stand_beside_each_other() -> None:
    tasks = {"colours": {"acc": {"base": 0.25, "aligned": 0.5}, "perplexity": {"base": 11.0, "aligned": 12.0}}}
    text = page(report(evaluation=evaluation() | {"lm_eval": tasks})).text
    assert re.search(r"colours\s*acc\s*0\.250\s*0\.500\s*colours\s*perplexity\s*11\.000\s*12\.000", text)


def test_several_reward_models_stand_in_the_report() -> None:
    assert "shadow" not in json.dumps(report())
    scores = [float(i) for i in range(8)]
    validations = [
        {
            **{"kind": "validation", "step": step, "reward_mean": 3.5 + step, "judge_mean": 3.5, "seconds": 1.0},
            **{"rewards": [s + step for s in scores], "judged": scores},
            **{"shadow_means": {"strict/2": 3.5}, "shadowed": {"strict/2": scores}},
        }
        for step in (0, 2)
    ]
    steps = [step_record(2, shadow_means={"strict/2": 1.25}, selected_shadow_means={"strict/2": 1.5})]
    shadow = {"base": 1.0, "aligned": 1.5, "gain": 0.5, "gain_ci95": [0.25, 0.75], "win_rate": 0.5}
    named = {"combine": "weighted_sum", "weights": {}, "members": [], "shadows": [{"name": "strict", "version": "2"}]}
    built = report(
        metrics=[*steps, *validations], evaluation=evaluation() | {"shadows": {"strict/2": shadow}}, ensemble=named
    )
    assert built["steps"][0]["shadow_means"] == {"strict/2": 1.25}
    assert built["steps"][0]["selected_shadow_means"] == {"strict/2": 1.5}
    assert [v["shadow_means"] for v in built["validation"]] == [{"strict/2": 3.5}] * 2
    assert "shadowed" not in built["validation"][0]
    assert built["reward_ensemble"] == named
    assert [(alarm["step"], alarm["who"]) for alarm in built["alarms"]] == [
        (2, "the judge"), (2, "the shadow strict/2")
    ]  # fmt: skip
    text = summary(built, "report.html")
    assert "alarm      at RS step 2: the shadow strict/2 does not follow the reward" in text
    assert "shadow     strict/2: 1.000 → 1.500, gain +0.500 (95% +0.250 to +0.750)" in text
    shown = page(built)
    assert "the shadow strict/2 by +0.00" in shown.values["alarms.1.text"]
    assert "Mean score of the shadow strict/2 by step" in shown.text


def test_the_verdict_on_promotion_stands_first_and_is_the_last_line() -> None:
    back = {"step": 3, "rule": "validation", "value": 1.5, "ci95": None, "bound": 1.0, "reason": "it fell <b>far</b>"}
    promoted, refused = (
        report(promotion=gate(PromotionSection(max_kl=bound), rows(), 2, back)) for bound in (None, 0.4)
    )
    assert "promotion" not in report() and "Promotion" not in page().text
    assert verdict(promoted).startswith(
        "Promoted: reward_gain, judge_gain and rollback passed. The aligned model beats"
    )
    assert verdict(promoted).endswith("The loop ended early: it fell <b>far</b>.")
    said = "Not promoted: kl_to_base did not pass."
    assert verdict(refused).startswith(f"{said} The aligned model beats")
    lines = summary(refused, "report.html").splitlines()
    assert lines[0].startswith(f"run 7: {said}") and lines[-1] == said and len(lines) <= 15
    shown = page(refused)
    assert shown.values["promotion.verdict"] == "not promoted"
    assert shown.values["promotion.rolled_back.reason"] == "it fell <b>far</b>"
    rules = {rule["name"]: i for i, rule in enumerate(refused["promotion"]["rules"])}
    assert {name: shown.values[f"promotion.rules.{i}.passed"] for name, i in rules.items()} == {
        "reward_gain": "true",
        "judge_gain": "true",
        "response_length": "null",
        "kl_to_base": "false",
        "distinct_2": "null",
        "rollback": "true",
    }
    assert "the 95% interval +0.500 to +0.500 is not at most 0.4 nats per response" in shown.text
    assert not shown.open


def test_a_run_without_steps_still_has_a_page() -> None:
    empty = report(metrics=[{"kind": "validation", "step": 0, "reward_mean": 0.2, "judge_mean": 0.1, "seconds": 1.0}])
    assert not page(empty).open
    assert "Alignment run 7" in page(empty).text
