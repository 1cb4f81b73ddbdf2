"""alignment.sft_worker, killed with -9 right after the optimizer step that SFT_KILL names."""

import os
import signal
from typing import Any
from unittest.mock import patch

from alignment import sft_training, sft_worker

real = sft_training.train_step


def killed(trainer: Any, step: int) -> Any:
    record = real(trainer, step)
    if step == int(os.environ["SFT_KILL"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return record


if __name__ == "__main__":
    with patch.object(sft_training, "train_step", killed):
        sft_worker.main()
