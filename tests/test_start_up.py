"""What answers at once: no command imports what takes seconds before it knows what it is asked."""

import re
import subprocess
import sys

import pytest

from flow_runs import ROOT

HEAVY = {"torch", "transformers", "deepspeed", "pyarrow", "boto3", "wandb", "tritonclient", "datasets"}
MODULES = (
    *("runs", "compare", "lineage", "strategies", "hh", "scaling", "sft_stage"),
    *("models.chat", "models.policy_export", "models.registry", "infra.triton"),
)
FLOWS = ("rs_flow", "sft_flow", "reward_model_flow", "evaluate_flow", "rs_iteration_flow")


def imported(*words: str) -> set[str]:
    """Top-level modules that a command imports until it has answered."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {match.partition(".")[0] for match in re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE)}


@pytest.mark.parametrize("module", MODULES)
def test_help_imports_nothing_heavy(module: str) -> None:
    name = module if "." in module else f"alignment.{module}"
    assert not imported("-m", name, "--help") & (HEAVY | {"metaflow"})


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("word", ["--help", "show"])
def test_a_flow_answers_with_metaflow_alone(flow: str, word: str) -> None:
    found = imported(f"flows/{flow}.py", word)
    assert not found & HEAVY
    assert "metaflow" in found  # what is looked at is what is imported
