"""Alerts by promtool, and every metric that an alert or the dashboard names told by the real Triton or by a run."""

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from alignment.run_folder import RunFolder
from alignment.run_metrics import METRICS, RunProgress, write_progress
from reward_fixtures import ServedRewardModel

MONITORING = Path(__file__).resolve().parent.parent / "infra" / "monitoring"
ON_A_GPU_ALONE = {"nv_gpu_utilization"}
"""Metrics that Triton tells only where it sees a GPU: not looked for here."""
PROMETHEUS_OWN = {"up"}
METRIC = r"\b(?:nv|reward|rs_run)_\w+|\bup\b"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian's package `prometheus` has it)"
)


def promtool(*arguments: str, folder: Path = MONITORING, stdin: str | None = None) -> str:
    done = subprocess.run(
        ["promtool", *arguments], cwd=folder, input=stdin, text=True, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alerts() -> list[dict]:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    """All queries: of the alerts, of the dashboard's panels and variables, of the autoscaler's metric."""
    yield from (rule["expr"] for rule in alerts())
    yield from (target["expr"] for panel in panels() for target in panel["targets"])
    variables = json.loads((MONITORING / "dashboard.json").read_text())["templating"]["list"]
    yield from (variable["definition"] for variable in variables if variable["type"] == "query")
    adapter = yaml.safe_load((MONITORING / "prometheus-adapter.yml").read_text())
    yield from (rule[key] for rule in adapter["rules"] for key in ("seriesQuery", "metricsQuery"))


@needs_promtool
def test_promtool_accepts_the_rules_and_each_fires_as_told() -> None:
    promtool("check", "rules", "alerts.yml")
    promtool("test", "rules", "alerts_test.yml")


@needs_promtool
@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus-kubernetes.yml"])
def test_promtool_accepts_the_configuration(name: str, tmp_path: Path) -> None:
    shutil.copy(MONITORING / "alerts.yml", tmp_path)
    # Debian builds its Prometheus without the discovery of pods: a fixed target stands in for it.
    text = (MONITORING / name).read_text()
    text = text.replace("kubernetes_sd_configs:\n      - role: pod", "static_configs:\n      - targets: [stand-in]")
    (tmp_path / name).write_text(text)
    assert "kubernetes_sd_configs" not in text
    promtool("check", "config", name, folder=tmp_path)


def test_every_alert_has_a_test_that_fires_it_and_says_what_to_do() -> None:
    tests = yaml.safe_load((MONITORING / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    quiet = {case["alertname"] for test in tests for case in test["alert_rule_test"] if not case.get("exp_alerts")}
    names = {rule["alert"] for rule in alerts()}
    assert fired == names and quiet >= names
    assert all({"summary", "remedy", "runbook"} == set(rule["annotations"]) for rule in alerts())


def test_the_operators_guide_has_a_section_for_each_alert() -> None:
    guide = (MONITORING.parent.parent / "docs" / "operations.md").read_text()
    sections = {f"docs/operations.md#{title.lower()}" for title in re.findall(r"^### (\w+)$", guide, re.MULTILINE)}
    assert {rule["annotations"]["runbook"] for rule in alerts()} == sections


def test_every_metric_that_is_asked_for_is_told(served_reward_model: ServedRewardModel) -> None:
    with urllib.request.urlopen(served_reward_model.metrics_url, timeout=10) as response:
        served = set(re.findall(r"^(\w+)[{ ]", response.read().decode(), re.MULTILINE))
    asked = {name for expression in expressions() for name in re.findall(METRIC, without_strings(expression))}
    assert {"nv_inference_queue_duration_us", "reward_tokens_real_total", "rs_run_step", "up"} <= asked
    assert asked - served - set(METRICS) - PROMETHEUS_OWN - ON_A_GPU_ALONE == set()


def without_strings(expression: str) -> str:
    return re.sub(r'"[^"]*"', '""', expression)


@needs_promtool
def test_promtool_can_read_every_query_of_the_dashboard_and_of_the_autoscaler(tmp_path: Path) -> None:
    adapter = yaml.safe_load((MONITORING / "prometheus-adapter.yml").read_text())["rules"]
    queries = [target["expr"].replace("$__rate_interval", "5m") for panel in panels() for target in panel["targets"]]
    for rule in adapter:
        query = rule["metricsQuery"].replace("<<.LabelMatchers>>", 'pod="p"').replace("<<.GroupBy>>", "pod")
        queries += [query, rule["seriesQuery"]]
    rules = [{"record": f"query:{i}", "expr": query} for i, query in enumerate(queries)]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", "queries.yml", folder=tmp_path)


def test_the_dashboard_is_laid_out_without_overlaps() -> None:
    every = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in every)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert all(panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in panels())


@needs_promtool
def test_promtool_accepts_a_runs_file(tmp_path: Path) -> None:
    write_progress(RunFolder(tmp_path / "7"), RunProgress(3, 8, 1_800_000_000.5, 21.5, 0.4, 1.2))
    promtool("check", "metrics", stdin=(tmp_path / "progress" / "7.prom").read_text())
