"""A finished run's report with its random control in it: the same recipe, but responses chosen by lot.

`benchmarks.random_control` runs both. Nothing that the report said is changed; `control` joins it, and the page is
drawn again.
"""

import json
from typing import Any

from alignment.errors import DataError
from alignment.report import sample, write_report
from alignment.run_folder import RunFolder
from alignment.statistics import mean_difference

RATES = ("win_rate", "win_rate_ci95", "judge_win_rate", "judge_win_rate_ci95")
KL = ("kl_to_base", "kl_to_base_ci95")


def add_control(run: RunFolder, control: RunFolder) -> dict[str, Any]:
    """Put what `control` reached into the report of `run`, and return that. Both are finished.

    `control` of the report holds its rates and KL, and of each score the paired difference run − control. Raises
    DataError where the two were evaluated on different prompts, and DiskError.
    """
    ours, theirs = (json.loads(folder.report_json.read_text()) for folder in (run, control))
    rows, other = (json.loads((folder.path / "evaluation.json").read_text()) for folder in (run, control))
    found = {
        "run_id": theirs["run_id"],
        "strategy": json.loads(control.config.read_text())["selection"]["strategy"],
        **{key: theirs["evaluation"][key] for key in RATES},
        **{key: theirs["evaluation"]["aligned"][key] for key in KL},
    }
    for label in ("reward", "judge"):
        by_prompt = {row["prompt_id"]: row[f"aligned_{label}"] for row in other}
        if set(by_prompt) != {row["prompt_id"] for row in rows}:
            raise DataError(
                f"{run.path} and {control.path} were evaluated on different prompts: "
                "use one config and one seed for both"
            )
        difference = mean_difference(
            [row[f"aligned_{label}"] for row in rows], [by_prompt[row["prompt_id"]] for row in rows]
        )
        found |= {f"{label}_difference": difference.value, f"{label}_difference_ci95": list(difference.ci95)}
    write_report(run, {**ours, "control": found}, [sample(row) for row in rows])
    return found
