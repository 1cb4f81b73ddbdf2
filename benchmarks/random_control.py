"""Does selection matter, or would any training on own samples do? The default task beside its random control.

    python -m benchmarks.random_control [--config FILE] [--set section.field=value …]

Runs the flow twice: once as configured, once with the random strategy of the same kind, the same prompts,
rollout budget and number of updates. Both are evaluated on the same prompts by the same reward model and
judge; the claim is the paired difference. Exits with 1 where its interval does not lie above 0.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from alignment.atomic_files import write_json
from alignment.config import load_config
from alignment.report_control import add_control
from alignment.run_folder import RunFolder
from alignment.statistics import Estimate, mean_difference

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "random_control.json"


def main() -> int:
    """Run both, print the comparison, write it to RESULT and into the first's report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "imdb_sentiment.yaml"), help="preset: a YAML file")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="section.field=value")
    options = parser.parse_args()
    strategy = load_config(options.config, options.overrides).selection.strategy
    control = f"selection.strategy={strategy.replace('top', 'random')}"
    load_config(options.config, [*options.overrides, control])  # refused now rather than after the first run
    runs = {
        name: _run(options.config, [*options.overrides, *extra])
        for name, extra in {"selected": [], "random": [control]}.items()
    }
    rows = {name: json.loads((run / "evaluation.json").read_text()) for name, run in runs.items()}
    result: dict[str, Any] = {"runs": {name: str(run) for name, run in runs.items()}}
    for label in ("reward", "judge"):
        result[label] = compare(rows["selected"], rows["random"], label)
        result[label]["gain_selected"] = _report(runs["selected"])["evaluation"][f"{label}_gain"]
        result[label]["gain_random"] = _report(runs["random"])["evaluation"][f"{label}_gain"]
        print(_line(label, result[label]))
    for name, run in runs.items():
        print(f"KL to base of {name}: {_report(run)['evaluation']['aligned']['kl_to_base']:.2f} nats")
    add_control(*(RunFolder(runs[name]) for name in ("selected", "random")))
    print(f"both in {runs['selected'] / 'report.html'}")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    write_json(RESULT, result)
    return 0 if all(result[label]["ci95"][0] > 0 for label in ("reward", "judge")) else 1


def compare(selected: list[dict[str, Any]], control: list[dict[str, Any]], label: str) -> dict[str, Any]:
    """Mean difference of the aligned responses' scores over the same prompts, with its paired interval."""
    theirs = {row["prompt_id"]: row[f"aligned_{label}"] for row in control}
    if set(theirs) != {row["prompt_id"] for row in selected}:
        raise SystemExit("the two runs were evaluated on different prompts: use one config and one seed for both")
    difference: Estimate = mean_difference(
        [row[f"aligned_{label}"] for row in selected], [theirs[row["prompt_id"]] for row in selected]
    )
    return {"difference": difference.value, "ci95": list(difference.ci95), "prompts": len(selected)}


def _line(label: str, r: dict[str, Any]) -> str:
    gains = f"gain {r['gain_selected']:+.3f} selected, {r['gain_random']:+.3f} random"
    return (
        f"{label}: {gains}; paired difference {r['difference']:+.3f} (95% {r['ci95'][0]:+.3f} to {r['ci95'][1]:+.3f})"
    )


def _run(preset: str, overrides: list[str]) -> Path:
    sets = [word for override in overrides for word in ("--set", override)]
    with tempfile.TemporaryDirectory() as folder:
        run_id = Path(folder) / "run_id"
        command = [sys.executable, str(ROOT / "flows" / "rs_flow.py"), "--config", "config", preset, *sets]
        if subprocess.run([*command, "run", "--run-id-file", str(run_id)]).returncode:
            raise SystemExit("the run failed, its message is above; nothing was compared")
        return Path(load_config(preset, overrides).run.root).resolve() / run_id.read_text().strip()


def _report(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


if __name__ == "__main__":
    sys.exit(main())
