"""The report of a finished run: report.json for programs, report.html for people.

Nothing is measured here: the numbers come from metrics.jsonl and from the evaluation, and every key that the
report promises is checked to be there. `alignment.report_parts` derives what spans several steps, and
`alignment.report_page` draws the page from report.json's content and the samples alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from alignment.atomic_files import json_text, write_text
from alignment.errors import DataError
from alignment.over_optimisation import alarms, gains_by_step
from alignment.promotion import sentence
from alignment.report_parts import Devices, device_hours, scoring_totals, selection_lift
from alignment.run_folder import RunFolder, write_json
from alignment.triton_metrics import FIELDS
from alignment.types import Checkpoint, JudgeRef, RewardModelRef

REWARD_KEYS = ("reward_mean", "selected_reward_mean", "response_length_mean", "truncated_fraction")
STEP_KEYS = ("step", *REWARD_KEYS, "loss", "grad_norm", "lr")
LATER_KEYS = (
    *("judge_mean", "selected_judge_mean", "kl", "duplicate_fraction"),
    *("num_rollouts", "num_selected", "tokens_per_second"),
)
BY_MODEL_KEYS = ("member_means", "selected_member_means", "shadow_means", "selected_shadow_means")
"""Of steps, and the first of each pair of validations, in runs in which several reward models score."""
WHERE_THERE = (*BY_MODEL_KEYS, "scoring_cache", "reused_from")
"""Keys that a step or a validation has in some runs only."""
PHASES = ("rollouts", "scoring", "update")
VALIDATION_KEYS = ("step", "reward_mean", "judge_mean")
POLICY_KEYS = (
    *("reward_mean", "reward_mean_ci95", "judge_mean", "judge_mean_ci95", "response_length_mean", "distinct_2"),
    *("self_bleu", "repetition_4", "truncated_fraction", "refusal_fraction"),
)
ESTIMATES = (
    *("reward_gain", "judge_gain", "win_rate", "judge_win_rate"),
    *("length_controlled_win_rate", "judge_length_controlled_win_rate"),
)
EVALUATION_KEYS = (
    "prompts",
    *(f"{policy}.{key}" for policy in ("base", "aligned") for key in POLICY_KEYS),
    *("aligned.kl_to_base", "aligned.kl_to_base_ci95"),
    *(f"{name}{ci}" for name in ESTIMATES for ci in ("", "_ci95")),
    *(f"{test}.{key}" for test in ("sign_test", "judge_sign_test") for key in ("wins", "losses", "ties", "p_value")),
    *(f"best_of_n.{key}" for key in ("n", "win_rate", "judge_win_rate", "kl_bound")),
    "best_of_n_curve",
)
"""What the evaluation must measure, as dotted paths. It may hold more, e.g. its own `seconds`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One evaluation prompt with a response of the base and one of the aligned policy; scores have no unit.

    `base_tokens` and `aligned_tokens` are the responses' lengths.
    """

    prompt: str
    base: str
    aligned: str
    base_reward: float
    aligned_reward: float
    base_judge: float
    aligned_judge: float
    base_tokens: int
    aligned_tokens: int


def sample(row: Mapping[str, Any]) -> Sample:
    """The sample that a row of evaluation.json holds."""
    names = {"base": "base_response", "aligned": "aligned_response"}
    return Sample(**{field.name: row[names.get(field.name, field.name)] for field in fields(Sample)})


def build_report(
    *,
    run_id: str,
    metrics: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any],
    reward_model: RewardModelRef,
    judge: JudgeRef,
    base: str,
    checkpoint: Checkpoint,
    total_seconds: float,
    setup_seconds: float,
    ensemble: Mapping[str, Any] | None = None,
    promotion: Mapping[str, Any] | None = None,
    devices: Devices | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of report.json, from the records of metrics.jsonl and the evaluation of `checkpoint` against `base`.

    A step's `seconds.validation` is that of the validation after it, 0.0 without one. In `seconds`, the
    overhead is what is left of the total after setup, the phases, all validations and `evaluation.seconds`
    (taken as 0 where absent): starts of workers, loading, saving. `ensemble` says which other models scored,
    `promotion` is what the gate says of a run's policy, `devices` what the run computed on, and `lineage` what
    `alignment.report_lineage` found.

    Raises DataError for a record or an evaluation that lacks a key, or for a step recorded twice.
    """
    for path in EVALUATION_KEYS:
        _take(evaluation, path, "the evaluation")
    validations = [r for r in metrics if r.get("kind") == "validation"]
    seconds_by_step = {r["step"]: _take(r, "seconds", _name(r)) for r in validations}
    steps = [_step(r, seconds_by_step) for r in metrics if r.get("kind") == "step"]
    for kind, numbers in (("step", [s["step"] for s in steps]), ("validation", [v["step"] for v in validations])):
        if sorted(set(numbers)) != numbers:
            raise DataError(f"the {kind} records of metrics.jsonl must be of rising steps, each once; got {numbers}")
    # Records that were adopted carry the id of the run that paid for them.
    own = [r for r in metrics if r.get("run_id", run_id) == run_id]
    seconds = {"total": total_seconds, "setup": setup_seconds}
    seconds |= {phase: sum(r["seconds"][phase] for r in own if r.get("kind") == "step") for phase in PHASES}
    seconds["validation"] = sum(r["seconds"] for r in own if r.get("kind") == "validation")
    named = sum(seconds.values()) - total_seconds + evaluation.get("seconds", 0.0)
    seconds["overhead"] = max(0.0, total_seconds - named)  # phases that overlap may add up to more than the total
    told = [{key: _take(r, key, _name(r)) for key in VALIDATION_KEYS} | _where_there(r) for r in validations]
    return {
        "run_id": run_id,
        "steps": steps,
        "selection_lift": selection_lift(steps),
        "scoring_totals": scoring_totals(steps, told),
        "over_optimisation": gains_by_step(metrics),
        "alarms": [asdict(alarm) for alarm in alarms(metrics)],
        "validation": told,
        "evaluation": dict(evaluation),
        **({"promotion": dict(promotion)} if promotion else {}),
        "reward_model": {key: getattr(reward_model, key) for key in ("name", "version", "digest", "accuracy")},
        "judge": {"name": judge.name, "accuracy": judge.accuracy},
        **({"reward_ensemble": dict(ensemble)} if ensemble else {}),
        **({"rollouts": others} if (others := rollouts_of_others(steps)) else {}),
        "seconds": seconds,
        **({"device_hours": device_hours(devices, seconds, evaluation.get("seconds", 0.0))} if devices else {}),
        **({"lineage": dict(lineage)} if lineage else {}),
        "base": {"uri": base},
        "checkpoint": {"uri": checkpoint.uri, "sha256": checkpoint.sha256, "step": checkpoint.step},
    }


def rollouts_of_others(steps: Sequence[Mapping[str, Any]]) -> str:
    """What to know of a run that was trained on rollouts of another run's policy; "" where all were its own."""
    found: dict[str, list[int]] = {}
    for step in steps:
        if "reused_from" in step:
            found.setdefault(step["reused_from"], []).append(step["step"])
    parts = [f"RS steps {numbers[0]} to {numbers[-1]}: those of {run}" for run, numbers in found.items()]
    told = "; ".join(parts)
    return f"{told}, drawn by that run's policies, not by this one's: off-policy, RS step 1 apart" if told else ""


def write_report(run_folder: RunFolder, report: Mapping[str, Any], samples: Sequence[Sample]) -> Path:
    """Writes report.json and report.html into the run's folder; returns the page's path. Raises DiskError."""
    from alignment.report_page import render_page

    config = run_folder.config.read_text() if run_folder.config.exists() else ""
    written = json.loads(json_text(report))  # what is no number there is none in the page either
    page = render_page(written, verdict(written), samples, config)
    write_text(run_folder.report_html, page)
    write_json(run_folder.report_json, report)  # last: it says that the report is whole
    return run_folder.report_html


def outcome(report: Mapping[str, Any]) -> str:
    """The result in a word, by the interval of the win rate by reward: improved, unclear or worse."""
    return {1: "improved", 0: "unclear", -1: "worse"}[_side(report["evaluation"]["win_rate_ci95"])]


def verdict(report: Mapping[str, Any]) -> str:
    """The result in a few sentences: promoted or not, what the reward says, and whether the judge confirms it."""
    if "promotion" not in report:
        return _result(report)
    back = report["promotion"]["rolled_back"]
    ended = f" The loop ended early: {back['reason']}." if back else ""
    return f"{sentence(report['promotion'])} {_result(report)}{ended}"


def _result(report: Mapping[str, Any]) -> str:
    e = report["evaluation"]
    reward, judge = (_side(e[f"{name}_ci95"]) for name in ("win_rate", "judge_win_rate"))
    rate = f"{e['win_rate']:.0%} of {e['prompts']} held-out prompts, {_percent_interval(e['win_rate_ci95'])}"
    said = {
        1: f"The aligned model beats the base by reward ({rate}).",
        0: f"The aligned model is not clearly better than the base by reward ({rate}).",
        -1: f"The aligned model is worse than the base by reward ({rate}).",
    }[reward]
    seen = f"{e['judge_win_rate']:.0%}, {_percent_interval(e['judge_win_rate_ci95'])}"
    if judge == 0:
        return f"{said} The independent judge sees no clear difference ({seen})."
    if reward == 0:
        return f"{said} The independent judge prefers the {'aligned model' if judge > 0 else 'base'} ({seen})."
    return f"{said} The independent judge {'agrees' if judge == reward else 'disagrees'} ({seen})."


def _step(record: Mapping[str, Any], validation_seconds: Mapping[int, float]) -> dict[str, Any]:
    step = {key: _take(record, key, _name(record)) for key in STEP_KEYS}
    seconds = {phase: _take(record, f"seconds.{phase}", _name(record)) for phase in PHASES}
    # A run may go on from one whose steps were recorded before these were measured.
    step |= {key: record.get(key) for key in LATER_KEYS}
    step["scoring_server"] = {key: record.get("scoring_server", {}).get(key) for key in FIELDS}
    step |= _where_there(record)
    return step | {"seconds": seconds | {"validation": validation_seconds.get(step["step"], 0.0)}}


def _where_there(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in WHERE_THERE if key in record}


def _take(values: Mapping[str, Any], path: str, where: str) -> Any:
    """The value at a dotted path. Raises DataError naming the path and whose it is."""
    found: Any = values
    for part in path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise DataError(f"{where} lacks {path}, which report.json promises: run that stage again")
        found = found[part]
    return found


def _name(record: Mapping[str, Any]) -> str:
    return f"the {record['kind']} record of step {record.get('step', '?')} in metrics.jsonl"


def _side(ci95: Sequence[float]) -> int:
    """1 where a win rate's interval lies above one half, -1 below, 0 where it includes it."""
    return 1 if ci95[0] > 0.5 else -1 if ci95[1] < 0.5 else 0


def _percent_interval(ci95: Sequence[float]) -> str:
    return f"95% interval {ci95[0]:.0%} to {ci95[1]:.0%}"
