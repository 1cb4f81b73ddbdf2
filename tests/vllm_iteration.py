"""Two RS steps of a worker, by either engine and greedily; for tests/test_vllm.py.

    python tests/vllm_iteration.py ROOT OUT.json OVERRIDE …

The reward server is a stand-in; see config_effects.py.
"""

import json
import sys
from pathlib import Path

import config_effects as see
from alignment.config import load_config
from alignment.judge_stage import prepare_judge
from flow_runs import SMOKE


def main(root: str, out: str, *overrides: str) -> None:
    own = [f"run.root={root}", "wandb.mode=disabled", "judge.num_train_pairs=64", "loop.val_check_interval=1"]
    config = load_config(SMOKE, [*own, *overrides])
    prepare_judge(config, Path(root) / "judge", lambda _: None)
    done = see.run_iteration(config)
    steps = [[row["response"] for row in done.trainer.run.read_rollouts(step)] for step in (1, 2)]
    validation = [record["reward_mean"] for record in done.metrics if record["kind"] == "validation"]
    Path(out).write_text(json.dumps({"steps": steps, "validation": validation}))


if __name__ == "__main__":
    main(*sys.argv[1:])
