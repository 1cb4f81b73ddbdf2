"""A comparison of runs as a table of cells, with the notes that a reader of it needs, and the curves of their rewards.

What is compared is what report.json says of each; a run is compared with the first one prompt by prompt, by the
statistics of `alignment.strategy_report`. Nothing is measured anew.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.progress import duration
from alignment.report_charts import line
from alignment.run_summary import RunSummary, found, interval
from alignment.strategy_report import LABELS, aligned_scores, paired, shown
from alignment.text_table import aligned

NONE = "–"
PHASES = ("total", "setup", "rollouts", "scoring", "update", "validation", "evaluation", "overhead")
PROMISED = ("reward_gain_ci95", "judge_gain_ci95", "win_rate_ci95", "judge_win_rate_ci95", "aligned.kl_to_base_ci95")
"""Of the evaluation: what an older version may not have written."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """`results`, `times` and `config` are rows: what it is, then a cell for each run."""

    names: tuple[str, ...]
    results: list[list[str]]
    times: list[list[str]]
    config: list[list[str]]
    notes: list[str]
    curves: Mapping[str, Mapping[str, list[tuple[float, float]]]]
    """Title of a chart to its lines by run: points of RS step and value."""


def compare_runs(runs: Sequence[RunSummary]) -> Comparison:
    """All of it; the runs stand in the order given."""
    first, same, names = runs[0], _same_prompts(runs), _names(runs)
    results = [
        ["state", *(str(run.state) for run in runs)],
        ["RS steps", *(run.step for run in runs)],
        *(_row(f"{label} gain", runs, lambda e, key=f"{label}_gain": _estimate(e, key)) for label in LABELS),
        _row("win rate by reward", runs, lambda e: _rate(e, "win_rate")),
        _row("win rate by judge", runs, lambda e: _rate(e, "judge_win_rate")),
        _row("KL to base, nats", runs, _kl),
        _row("response length, tokens", runs, lambda e: _number(found(e, "aligned.response_length_mean"), ".1f")),
        _row("base's length", runs, lambda e: _number(found(e, "base.response_length_mean"), ".1f")),
        ["promotion", *(_promotion(run) for run in runs)],
        ["checkpoint", *(run.checkpoint or NONE for run in runs)],
    ]
    if same:
        others = [_against(first, run) for run in runs]
        for label in LABELS:
            results.append([f"{label} − {names[0]}", *(_paired_cell(one, f"{label}_difference") for one in others)])
    return Comparison(
        names=names,
        results=results,
        times=[[phase, *(_seconds(run, phase) for run in runs)] for phase in PHASES],
        config=config_differences([run.config for run in runs]),
        notes=[*_notes(runs, names), *([] if same else _why_unpaired(runs))],
        curves=_curves(runs, names),
    )


def _names(runs: Sequence[RunSummary]) -> tuple[str, ...]:
    """Ids; of runs in different folders that share one, the whole paths."""
    count = Counter(run.name for run in runs)
    return tuple(run.name if count[run.name] == 1 else run.run for run in runs)


def config_differences(configs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each dotted key in which not all configs agree: the key, then each one's value as JSON."""
    flat = [_flat(config) for config in configs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = ([key, *(values.get(key, NONE) for values in flat)] for key in keys)
    return [row for row in rows if len(set(row[1:])) > 1]


def text(comparison: Comparison) -> str:
    """The comparison for a terminal: results and times, what differs in the configs, then the notes."""
    names = comparison.names
    lines = aligned([["run", *names], *comparison.results, ["time", *("" for _ in names)], *comparison.times])
    config = aligned([["config", *names], *comparison.config]) if comparison.config else ["config: the same"]
    return "\n".join([*lines, "", *config, "", *comparison.notes]).rstrip()


def _row(name: str, runs: Sequence[RunSummary], cell: Any) -> list[str]:
    return [name, *(cell(run.evaluation) if run.evaluation else NONE for run in runs)]


def _estimate(evaluation: Mapping[str, Any], key: str) -> str:
    if evaluation.get(key) is None:
        return NONE
    return shown(evaluation, key) if interval(evaluation, key) else f"{evaluation[key]:+.3f}"


def _rate(evaluation: Mapping[str, Any], key: str) -> str:
    value, ends = evaluation.get(key), interval(evaluation, key)
    if value is None:
        return NONE
    return f"{value:.1%}" + (f" ({ends[0]:.1%} to {ends[1]:.1%})" if ends else "")


def _kl(evaluation: Mapping[str, Any]) -> str:
    value, ends = found(evaluation, "aligned.kl_to_base"), interval(evaluation, "aligned.kl_to_base")
    bounds = f" ({ends[0]:.2f} to {ends[1]:.2f})" if value is not None and ends else ""
    return _number(value, ".2f") + bounds


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else f"{value:{form}}"


def _promotion(run: RunSummary) -> str:
    promotion = (run.report or {}).get("promotion")
    if promotion is None:
        return NONE
    failed = [rule["name"] for rule in promotion.get("rules", ()) if rule["passed"] is False]
    return f"{promotion['verdict']}{': ' if failed else ''}{', '.join(failed)}"


def _seconds(run: RunSummary, phase: str) -> str:
    """Of a run that is not finished, what its RS steps and validations took so far."""
    if run.report is None:
        if phase == "validation":
            taken = [r["seconds"] for r in run.validations if "seconds" in r]
        else:
            taken = [r["seconds"][phase] for r in run.steps if phase in r.get("seconds", {})]
        return f"{duration(sum(taken))} so far" if taken else NONE
    seconds = run.evaluation.get("seconds") if phase == "evaluation" else found(run.report, f"seconds.{phase}")
    return NONE if seconds is None else duration(seconds)


def _same_prompts(runs: Sequence[RunSummary]) -> bool:
    """Whether all runs were evaluated, with scores for each response, on the same prompts."""
    sets = [{row["prompt_id"] for row in run.rows} if _is_scored(run) and run.rows else None for run in runs]
    return sets[0] is not None and all(one == sets[0] for one in sets)


def _is_scored(run: RunSummary) -> bool:
    return run.rows is not None and all(
        isinstance(row.get(f"aligned_{label}"), int | float) for row in run.rows for label in LABELS
    )


def _against(first: RunSummary, run: RunSummary) -> Mapping[str, Any] | None:
    if run is first:
        return None
    ours, theirs = aligned_scores(run.rows or ()), aligned_scores(first.rows or ())
    return paired(ours, theirs, list(theirs[LABELS[0]]))


def _paired_cell(differences: Mapping[str, Any] | None, key: str) -> str:
    return NONE if differences is None else shown(differences, key)


def _notes(runs: Sequence[RunSummary], names: Sequence[str]) -> list[str]:
    notes = []
    for run, name in zip(runs, names, strict=True):
        missing = [path for path in PROMISED if run.evaluation and found(run.evaluation, path) is None]
        if run.report is None:
            notes.append(f"{name} is not finished ({run.state}): it has no evaluation")
        elif found(run.report, "evaluation.aligned.kl_to_base") is None and "aligned" in run.evaluation:
            notes.append(f"{name} has no KL: it has another tokenizer than its base, or an older version wrote it")
            missing = [path for path in missing if "kl_to_base" not in path]
        if missing:
            notes.append(f"{name} was written by an older version: its report lacks {', '.join(missing)}")
    if any(run.evaluation for run in runs):
        notes.append("gains and win rates: over each run's own base; intervals: 95 %, over evaluation prompts")
    models = {str(found(run.report, "reward_model.digest")) for run in runs if run.report}
    if len(models) > 1:
        notes.append("the runs were scored by different reward models: their rewards are on different scales")
    return notes


def _why_unpaired(runs: Sequence[RunSummary]) -> list[str]:
    if any(run.report is None for run in runs):
        return []
    return ["no paired difference: the runs were not all evaluated on the same prompts"]


def _curves(runs: Sequence[RunSummary], names: Sequence[str]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    return {
        "Mean reward of all rollouts": {
            name: line(run.steps, "reward_mean") for run, name in zip(runs, names, strict=True)
        },
        "Mean reward of validations": {
            name: line(run.validations, "reward_mean") for run, name in zip(runs, names, strict=True)
        },
        "Mean judge score of validations": {
            name: line(run.validations, "judge_mean") for run, name in zip(runs, names, strict=True)
        },
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return flat
