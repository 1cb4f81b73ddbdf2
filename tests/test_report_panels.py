"""The panels of report.html: their numbers by hand, and that every one of them is on the page of a full report."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignment.charts import SHARES, dot_chart, line_chart, share_chart, y_place
from alignment.config import load_config
from alignment.errors import DataError
from alignment.over_optimisation import gains_by_step
from alignment.report import Sample, verdict, write_report
from alignment.report_charts import charts_of
from alignment.report_control import add_control
from alignment.report_lineage import lineage_of
from alignment.report_page import MOST_SAMPLES, render_page
from alignment.report_parts import Devices, device_hours, devices_of, scoring_totals, selection_lift
from alignment.run_folder import RunFolder, create, write_json
from alignment.statistics import best_of_n_curve, best_of_n_kl_bound, best_of_n_win_rate
from flow_runs import SMOKE
from made_up_report import CONFIG, full_report
from test_report import Page, evaluation, report

PANELS = (
    *("Result", "Promotion", "Win rate and KL", "Tasks", "Samples", "Course of the run", "Length and diversity"),
    *("Over-optimisation", "Reward server", "Time and cost by phase", "Lineage"),
)


@pytest.mark.parametrize("values", [[0.3, 0.1 + 0.2], [1e17, 1e17], [1e-12, 2e-12], [0.0], [-3.0, -3.0]])
def test_equal_values_are_drawn_whatever_their_last_digits(values: list[float]) -> None:
    (drawn,) = line_chart("key", "Title", "x", "y", {"all": list(enumerate(values))}).series
    assert all(y == pytest.approx(drawn.points[0][1]) and 10 < y < 210 for _, y, _ in drawn.points)
    (dot,) = dot_chart("key", "Title", "y", {"base": (values[0], (values[0], values[-1]))}).series
    assert dot.points[0][1] == pytest.approx(drawn.points[0][1])


def test_best_of_n_for_each_n_by_hand() -> None:
    # Rewards 1, 3, 2 against 1.5: two of three win; of pairs {1,3} {1,2} {3,2} the best always wins; so does 3.
    # The judge gives 0, 0, 1 against 0.5: the best pick it only as the single one and in the pair {1,2}.
    curve = best_of_n_curve([[1.0, 3.0, 2.0]], [1.5], [[0.0, 0.0, 1.0]], [0.5])
    assert list(curve) == ["1", "2", "3"]
    assert [of["win_rate"] for of in curve.values()] == pytest.approx([2 / 3, 1.0, 1.0])
    assert [of["judge_win_rate"] for of in curve.values()] == pytest.approx([1 / 3, 1 / 3, 0.0])
    assert [of["kl_bound"] for of in curve.values()] == [best_of_n_kl_bound(k) for k in (1, 2, 3)]


def test_the_curve_ends_at_best_of_n_with_its_ties() -> None:
    pool, judge = [[2.0, 2.00001, 1.0], [0.0, 5.0, 5.0]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    arguments = (pool, [1.5, 9.0], judge, [0.5, 0.5])
    last = best_of_n_curve(*arguments)["3"]
    assert (last["win_rate"], last["judge_win_rate"]) == best_of_n_win_rate(*arguments) == (0.5, 1.0)


def step(number: int, reward: float, selected: float | None, **more: Any) -> dict[str, Any]:
    judged = {"judge_mean": 0.5, "selected_judge_mean": None if selected is None else 0.25}
    server = {"failures": 2, "restarted": number == 2}
    record = {"step": number, "reward_mean": reward, "selected_reward_mean": selected, **judged}
    return record | {"scoring_server": server, "scoring_cache": {"hits": 3, "misses": 1}} | more


def test_what_spans_several_steps_by_hand() -> None:
    steps = [step(1, 0.5, 1.0), step(2, 0.5, 2.0), step(3, 0.5, None)]
    assert selection_lift(steps) == {"reward": 1.0, "judge": -0.25}
    assert selection_lift(steps[2:]) == {"reward": None, "judge": None}
    totals = {"failures": 6, "restarts": 1, "cache_hits": 9, "cache_misses": 3}
    assert scoring_totals(steps, []) == totals
    assert scoring_totals([], [{"scoring_cache": {"hits": 1, "misses": 0}}])["cache_hits"] == 1
    unknown = {"step": 1, "scoring_server": {"failures": None, "restarted": None}}
    assert set(scoring_totals([unknown], []).values()) == {None}


def test_hours_are_those_of_the_devices_that_a_phase_holds() -> None:
    # One node of 8 GPUs for an hour of setup, two nodes for half an hour of rollouts, one for 6 minutes of evaluation.
    found = device_hours(Devices("GPU", 8, 2), {"total": 6000.0, "setup": 3600.0, "rollouts": 1800.0}, 360.0)
    assert found["device"] == "GPU"
    assert found["phases"] == pytest.approx({"setup": 8.0, "rollouts": 8.0, "evaluation": 0.8})
    assert found["total"] == pytest.approx(16.8)
    assert devices_of(load_config(SMOKE, ["resources.cpu=3"])) == Devices("CPU core", 3, 1)
    assert devices_of(load_config(SMOKE, ["loop.executor=disaggregated", "loop.steps_per_iteration=1"])) is None


def validation(number: int, reward: float, judge: float) -> dict[str, Any]:
    scores = [0.0, 2.0] * 4  # of standard deviation 1
    record = {"kind": "validation", "step": number, "reward_mean": 1.0 + reward, "judge_mean": 1.0 + judge}
    return record | {"rewards": [s + reward for s in scores], "judged": [s + judge for s in scores]}


def test_gains_since_the_first_validation_are_in_its_standard_deviations() -> None:
    records = [validation(0, 0.0, 0.0), validation(2, 0.5, 0.25), validation(4, 1.0, -0.25)]
    reward, judge = gains_by_step(records)
    assert (reward["who"], judge["who"]) == ("the reward", "the judge")
    assert reward["points"] == [{"step": n, "gain": gain, "ci95": [gain, gain]} for n, gain in ((2, 0.5), (4, 1.0))]
    assert [p["gain"] for p in judge["points"]] == [0.25, -0.25]
    assert gains_by_step(records[:1]) == gains_by_step([]) == []
    many = [validation(i, 0.1, 0.1) for i in range(100)]
    assert len(gains_by_step(many)[0]["points"]) == 33


def test_a_chart_of_shares_places_points_and_intervals_by_hand() -> None:
    # x from 0 to 2 lies on 48 to 424, shares from 0 to 1 on 210 to 10.
    dots = {"Aligned": ((1.0, [0.5, 2.0]), (0.75, [0.5, 1.0]))}
    chart = share_chart("k", "title", "x", "Best of n", {"best of 1": (0.0, 0.5), "best of 2": (0.5, 0.75)}, dots, "")
    curve, aligned = chart.series
    assert curve.path == "48.0,110.0 142.0,60.0"
    assert aligned.path == "236.0,60.0"
    assert aligned.whiskers == [(142.0, 60.0, 424.0, 60.0), (236.0, 110.0, 236.0, 10.0)]
    assert chart.guide == (48, 110.0, 424, 110.0)
    assert chart.description.endswith("Aligned: 75.0% (95% 50.0% to 100.0%) at 1 (0.5 to 2)")


def test_lines_have_whiskers_where_there_are_intervals_and_zero_where_asked() -> None:
    chart = line_chart(
        "k", "t", "x", "y", {"a": [(1, 1.0), (2, 2.0)]}, "", {"a": [(0.5, 1.5), (1.0, 3.0)]}, with_zero=True
    )
    assert [label for _, label in chart.y_ticks] == ["0", "1", "2", "3"]
    (line,) = chart.series
    ends = [end for whisker in line.whiskers for end in (whisker[1], whisker[3])]
    assert ends == pytest.approx([210 - 200 / 6, 110.0, 210 - 200 / 3, 10.0])
    assert y_place(0.5, SHARES) == 110.0


def full_page() -> tuple[dict[str, Any], Page]:
    built, samples = full_report()
    written = json.loads(json.dumps(built))
    return written, Page(render_page(written, verdict(written), samples, CONFIG))


def test_a_full_report_has_every_panel_and_only_numbers_of_report_json() -> None:
    built, page = full_page()
    assert not page.open
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h2") == len(PANELS) and all(panel in page.text for panel in PANELS)
    assert "Promoted: reward_gain" in page.text and "Alarm at RS step" in page.text
    assert len(page.values) > 100
    for key, shown in page.values.items():
        expected: Any = built
        for part in key.split("."):
            expected = expected[int(part)] if isinstance(expected, list) else expected[part]
        assert shown == expected or json.loads(shown) == expected, key
    charts = charts_of(built)
    assert all(charts.values())
    assert [s.name for s in charts["frontier"][0].series] == ["Best of n", "Aligned", "Random control"]
    assert [s.name for s in charts["over"][0].series] == ["the reward", "the judge", "the shadow strict_reward/2"]


def test_samples_know_their_places_by_each_change() -> None:
    changes = ((0.5, 0.0), (-1.0, 2.0), (2.0, -1.0))
    samples = [Sample("p", "b", "a", 1.0, 1.0 + up, 0.0, judge, 10, 10 + i) for i, (up, judge) in enumerate(changes)]
    html = render_page(report(), "said", samples, CONFIG)
    styles = re.findall(r'class="sample".*?style="(.*?)"', html)
    assert styles == [
        "--reward:1;--judge:1;--tokens:2;",
        "--reward:2;--judge:0;--tokens:1;",
        "--reward:0;--judge:2;--tokens:0;",
    ]
    many = Page(render_page(report(), "said", samples * 100, CONFIG))
    assert [a.get("class") for _, a in many.elements].count("sample") == MOST_SAMPLES
    assert "The first 200 of 300 prompts" in many.text


def finished_run(root: Path, run_id: str, shift: float) -> RunFolder:
    folder = create(root, run_id, CONFIG)
    row = {"prompt": "p", "base_response": "b", "aligned_response": "a", "base_tokens": 1, "aligned_tokens": 1}
    row |= {"base_reward": 0.0, "base_judge": 0.0}
    rows = [{**row, "prompt_id": f"p{i}", "aligned_reward": i + shift, "aligned_judge": i - shift} for i in range(8)]
    write_json(folder.path / "evaluation.json", rows)
    write_report(folder, report(run_id=run_id), [])
    return folder


def test_a_control_joins_the_report_and_changes_nothing_in_it(tmp_path: Path) -> None:
    run, control = finished_run(tmp_path, "7", 0.5), finished_run(tmp_path, "8", 0.0)
    before = json.loads(run.report_json.read_text())
    found = add_control(run, control)
    assert found["run_id"] == "8" and found["strategy"] == "top_per_prompt"
    assert (found["reward_difference"], found["reward_difference_ci95"]) == (0.5, [0.5, 0.5])
    assert (found["judge_difference"], found["win_rate"]) == (-0.5, evaluation()["win_rate"])
    assert json.loads(run.report_json.read_text()) == {**before, "control": found}
    page = Page(run.report_html.read_text())
    assert page.values["control.reward_difference"] == "0.5" and "Random control" in page.text
    write_json(control.path / "evaluation.json", [])
    with pytest.raises(DataError, match="evaluated on different prompts"):
        add_control(run, control)


def test_a_broken_chain_is_told_and_the_report_is_still_made(tmp_path: Path) -> None:
    folder = create(tmp_path, "7", CONFIG)
    fault = lineage_of(folder, 2)
    assert set(fault) == {"fault"} and "holds no finished checkpoint" in fault["fault"]
    assert "The chain of manifests is broken" in Page(render_page(report(lineage=fault), "said", [], CONFIG)).text
