"""A finished run in a few lines for the terminal."""

from collections.abc import Mapping
from typing import Any

from alignment.progress import duration
from alignment.promotion import sentence
from alignment.report import verdict


def summary(report: Mapping[str, Any], page: str) -> str:
    """At most 15 lines for the terminal, one for each shadow, and one where another run drew the rollouts.

    `page` is where report.html lies.
    """
    e, seconds = report["evaluation"], report["seconds"]
    best = e["best_of_n"]
    lines = [f"run {report['run_id']}: {verdict(report)}"]
    # One line for each of whom, whatever the number of alarms: each was told when it came.
    for who in dict.fromkeys(alarm["who"] for alarm in report["alarms"]):
        at = ", ".join(str(alarm["step"]) for alarm in report["alarms"] if alarm["who"] == who)
        lines.append(f"  alarm      at RS step {at}: {who} does not follow the reward")
    if "rollouts" in report:
        lines.append(f"  rollouts   {report['rollouts']}")
    for label, key in (("reward", "reward"), ("judge", "judge")):
        low, high = e[f"{key}_gain_ci95"]
        before, after, gain = e["base"][f"{key}_mean"], e["aligned"][f"{key}_mean"], e[f"{key}_gain"]
        lines.append(f"  {label:<10} {before:.3f} → {after:.3f}, gain {gain:+.3f} (95% {low:+.3f} to {high:+.3f})")
    for name, shadow in e.get("shadows", {}).items():
        low, high = shadow["gain_ci95"]
        scores = f"{shadow['base']:.3f} → {shadow['aligned']:.3f}, gain {shadow['gain']:+.3f}"
        lines.append(f"  shadow     {name}: {scores} (95% {low:+.3f} to {high:+.3f})")
    lines.append(f"  win rate   {e['win_rate']:.1%} by reward, {e['judge_win_rate']:.1%} by the judge")
    lines.append(
        f"  the same at equal length {e['length_controlled_win_rate']:.1%} and "
        f"{e['judge_length_controlled_win_rate']:.1%}; sign test p = {e['sign_test']['p_value']:.2g} and "
        f"{e['judge_sign_test']['p_value']:.2g}"
    )
    lines.append(
        f"  best of {best['n']:<2} {best['win_rate']:.1%} by reward, {best['judge_win_rate']:.1%} by the judge"
    )
    if e["aligned"]["kl_to_base"] is None:
        lines.append("  KL to base undefined: the two have different tokenizers")
    else:
        low, high = e["aligned"]["kl_to_base_ci95"]
        lines.append(
            f"  KL to base {e['aligned']['kl_to_base']:.2f} nats per response (95% {low:.2f} to {high:.2f}); "
            f"best of {best['n']}: at most {best['kl_bound']:.2f}"
        )
    phases = {k: v for k, v in seconds.items() if k != "total"}
    if "seconds" in e:
        phases["evaluation"] = e["seconds"]
    parts = ", ".join(f"{name} {duration(value)}" for name, value in phases.items())
    lines.append(f"  time       {duration(seconds['total'])}: {parts}")
    lines.append(f"  checkpoint {report['checkpoint']['uri']}")
    gate = [sentence(report["promotion"])] if "promotion" in report else []
    return "\n".join([*lines, f"  report     {page}", *gate])
