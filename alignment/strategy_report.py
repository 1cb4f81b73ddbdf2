"""The comparison of runs that were trained on the same rollouts: what each reached, and its paired difference.

All were evaluated on the same prompts with the same samples of the base. A difference is that of the aligned responses'
scores, prompt by prompt, with the 95 % interval of `alignment.statistics`; several comparisons with one control are
several intervals of 95 % each, not corrected for their number.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.errors import DataError
from alignment.run_folder import RunFolder
from alignment.statistics import mean_difference, win_rate
from alignment.text_table import aligned

LABELS = ("reward", "judge")
Scores = Mapping[str, Mapping[str, float]]
"""The aligned response's scores by prompt id, under "reward" and "judge"."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A finished run: `scores` holds the aligned response's scores by prompt id, under "reward" and "judge".

    `kept` are the responses that it selected in all RS steps, `kept_reward` their mean reward, `updates` its optimizer
    steps.
    """

    name: str
    run: str
    selection: Mapping[str, Any]
    steps: int
    kept: int
    kept_reward: float | None
    updates: int
    evaluation: Mapping[str, Any]
    scores: Scores


def measured(name: str, run: str, folder: RunFolder) -> Measured:
    """What the files of a finished run say; `run` names it. Raises DataError where one is missing."""
    try:
        config, rows, report = (
            json.loads((folder.path / file).read_text()) for file in ("config.json", "evaluation.json", "report.json")
        )
    except FileNotFoundError as error:
        raise DataError(f"{run} lacks {error.filename}: resume that run, which writes it at its end") from error
    steps = [r for r in folder.read_metrics() if r["kind"] == "step"]
    kept = sum(r["num_selected"] for r in steps)
    total = sum(r["selected_reward_mean"] * r["num_selected"] for r in steps if r["num_selected"])
    return Measured(
        name=name,
        run=run,
        selection=config["selection"],
        steps=len(steps),
        kept=kept,
        kept_reward=total / kept if kept else None,
        updates=sum(r["optimizer_steps"] for r in steps),
        evaluation=report["evaluation"],
        scores=aligned_scores(rows),
    )


def compare(runs: Sequence[Measured], control: str) -> dict[str, Any]:
    """What comparison.json holds: `control`, `prompts`, and `strategies`, one entry a run. Raises DataError."""
    other = next(run for run in runs if run.name == control)
    prompts = list(other.scores["reward"])
    for run in runs:
        if set(run.scores["reward"]) != set(prompts):
            raise DataError(
                f"{run.run} and {other.run} were evaluated on different prompts: give both the same evaluation section"
            )
    return {"control": control, "prompts": len(prompts), "strategies": [_entry(run, other, prompts) for run in runs]}


def _entry(run: Measured, control: Measured, prompts: Sequence[str]) -> dict[str, Any]:
    e = run.evaluation
    entry: dict[str, Any] = {
        "name": run.name,
        "run": run.run,
        "selection": dict(run.selection),
        **{key: getattr(run, key) for key in ("steps", "kept", "kept_reward", "updates")},
        **{f"{label}_gain{ci}": e[f"{label}_gain{ci}"] for label in LABELS for ci in ("", "_ci95")},
        "kl_to_base": e["aligned"]["kl_to_base"],
    }
    if run is control:
        return entry
    return entry | paired(run.scores, control.scores, prompts)


def paired(ours: Scores, theirs: Scores, prompts: Sequence[str]) -> dict[str, Any]:
    """`<label>_difference` and `<label>_win_rate`, each with its `_ci95`, of one run's aligned policy to another's."""
    found: dict[str, Any] = {}
    for label in LABELS:
        one, other = ([side[label][prompt] for prompt in prompts] for side in (ours, theirs))
        difference, rate = mean_difference(one, other), win_rate(one, other)
        found |= {
            f"{label}_difference": difference.value,
            f"{label}_difference_ci95": list(difference.ci95),
            f"{label}_win_rate": rate.value,
            f"{label}_win_rate_ci95": list(rate.ci95),
        }
    return found


def aligned_scores(rows: Sequence[Mapping[str, Any]]) -> Scores:
    """From the rows of evaluation.json."""
    return {label: {row["prompt_id"]: row[f"aligned_{label}"] for row in rows} for label in LABELS}


def table(result: Mapping[str, Any]) -> str:
    """The comparison as text: a row a strategy, and below what the columns mean."""
    head = ["strategy", "kept", "reward", "updates", "KL", *(f"{label} gain" for label in LABELS)]
    head += [f"{label} − control" for label in LABELS]
    rows = [head, *(_row(entry, result["control"]) for entry in result["strategies"])]
    return "\n".join(
        [
            f"strategies on the rollouts of {result['rollouts']}",
            *aligned(rows),
            "kept, reward: responses kept in all RS steps, and their mean reward; updates: optimizer steps",
            "KL: to the base, nats per response; gains: over the base; intervals: 95 % each, over evaluation prompts",
            f"− control: to {result['control']}, paired over {result['prompts']} prompts",
            "Another run's policy drew the rollouts: from RS step 2 on the strategies train off-policy.",
        ]
    )


def _row(entry: Mapping[str, Any], control: str) -> list[str]:
    kept, kl = entry["kept_reward"], entry["kl_to_base"]
    cells = [entry["name"], str(entry["kept"]), "–" if kept is None else f"{kept:.3f}", str(entry["updates"])]
    cells.append("–" if kl is None else f"{kl:.2f}")
    cells += [shown(entry, f"{label}_gain") for label in LABELS]
    if entry["name"] == control:
        return [*cells, "control", "control"]
    return [*cells, *(shown(entry, f"{label}_difference") for label in LABELS)]


def shown(entry: Mapping[str, Any], key: str) -> str:
    """An estimate with its interval, `+0.457 (+0.231 to +0.695)`."""
    low, high = entry[f"{key}_ci95"]
    return f"{entry[key]:+.3f} ({low:+.3f} to {high:+.3f})"
