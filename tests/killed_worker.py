"""alignment.worker, killed with -9 at one moment of an RS step: RS_KILL="MOMENT STEP" names both."""

import os
import signal
from typing import Any
from unittest.mock import patch

from alignment import rs_step, trainer, worker
from alignment.run_folder import RunFolder
from models import checkpoints

# Where it is killed: the object, its attribute, and whether before or after the call.
MOMENTS: dict[str, tuple[Any, str, str]] = {
    "before rollouts": (rs_step, "_scored_share", "before"),
    "before selection": (rs_step, "decide", "before"),
    "before the rollouts are written": (RunFolder, "write_rollouts", "before"),
    "before the update": (rs_step, "train_step", "before"),
    "after the update": (rs_step, "train_step", "after"),
    "after the record": (RunFolder, "append_metrics", "after"),
    "before the validation": (rs_step, "validate", "before"),
    "after the validation": (rs_step, "validate", "after"),
    "while the checkpoint is written": (trainer, "write_optimizer_state", "after"),
    "before the checkpoint is sealed": (trainer, "seal", "before"),
    "before its name": (checkpoints, "settle_files", "after"),
    "before pruning": (trainer, "prune", "before"),
    "after pruning": (trainer, "prune", "after"),
}


def killed_in(moment: str, at: int) -> Any:
    """A patch that kills this process at a moment of RS step `at`; `train_step` and others tell which step it is."""
    owner, name, when = MOMENTS[moment]
    real, current = getattr(owner, name), {"step": 0}
    real_prompts = rs_step.step_prompts

    def step_prompts(config: Any, prompts: Any, step: int) -> Any:
        current["step"] = step
        return real_prompts(config, prompts, step)

    def killed(*arguments: Any, **options: Any) -> Any:
        if current["step"] == at and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if current["step"] == at and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    rs_step.step_prompts = step_prompts
    return patch.object(owner, name, killed)


if __name__ == "__main__":
    moment, _, step = os.environ["RS_KILL"].rpartition(" ")
    with killed_in(moment, int(step)):
        worker.main()
