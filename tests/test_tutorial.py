"""Every command of docs/tutorial-hh-rlhf.md, in its order, in one shell, as the page has it.

What differs from a reader's run is what the page says: PAIRS and PRESET. The preset is hh_small.yaml with models of
random weights and few texts. `sbatch` is a stand-in that runs the script at once.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.triton_setup import free_ports

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "docs" / "tutorial-hh-rlhf.md"
SAMPLE = ROOT.parent / "shared/data/hh-harmless-sample.jsonl.gz"
NUMBER = r"[-+]?\d+(?:\.\d+)?"
NEEDED = ("alignment", "configs", "flows", "infra", "models", "triton_repo")

TINY: dict[str, dict[str, Any]] = {
    "policy": {"model": "tiny"},
    "prompts": {"max_prompt_tokens": 200},
    "sft": {"num_train": 400, "max_tokens": 250, "lr": 1e-3, "max_steps": 4, "val_check_interval": 2},
    "rollouts": {"num_rollout_samples": 4, "max_new_tokens": 12},
    "reward": {"model": "tiny"},
    "reward_training": {"num_train": 64, "num_held_out": 32, "lr": 1e-3, "val_check_interval": 2},
    "training": {"lr": 1e-3},
    "loop": {"max_steps": 2, "steps_per_iteration": 1, "val_check_interval": 1, "save_interval": 1},
    "validation": {"num_prompts": 4},
    "evaluation": {"num_prompts": 8},
    "resources": {"cpu": 1, "memory": 4000, "threads": 1},
    "wandb": {"mode": "disabled"},
}

SBATCH = """#!/bin/bash
# A stand-in for Slurm's: runs the script here and now.
echo "Submitted batch job 1"
exec bash "$1"
"""


def blocks() -> list[tuple[str, str]]:
    """(language, content) of each fenced block of the page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", TUTORIAL.read_text(), flags=re.MULTILINE | re.DOTALL)


def pattern(line: str) -> str:
    """A line of output as a regular expression: any number for a number, anything for an ellipsis."""
    words = re.split(f"(…|{NUMBER})", line.strip())
    return "".join(".*" if word == "…" else NUMBER if i % 2 else re.escape(word) for i, word in enumerate(words))


def small_preset(path: Path) -> Path:
    """hh_small.yaml with tiny models and fewer steps."""
    preset = yaml.safe_load((ROOT / "configs" / "hh_small.yaml").read_text())
    for section, values in TINY.items():
        preset[section] = preset.get(section, {}) | values
    path.write_text(yaml.safe_dump(preset))
    return path


def pairs(path: Path) -> Path:
    """The real pairs, or where they are not there as many made-up ones in their form."""
    if SAMPLE.exists():
        return SAMPLE
    start = "\n\nHuman: Question {i}, what is it about?\n\nAssistant:"
    good, bad = " It is about a friend.", " It is about nothing."
    lines = [{"chosen": start.format(i=i) + good, "rejected": start.format(i=i) + bad} for i in range(995)]
    lines += [{"chosen": "no dialogue", "rejected": "either"}] * 5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_page_holds_commands_and_their_output_and_nothing_else_that_looks_like_a_command() -> None:
    languages = [language for language, _ in blocks()]
    assert set(languages) == {"bash", "text"}
    assert TUTORIAL.read_text().count("```") == 2 * len(languages)
    prose = re.sub(r"^```.*?^```$", "", TUTORIAL.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert ".venv/bin/" not in prose
    assert not re.search(r"^( {4}|\t|~~~)", prose, flags=re.MULTILINE)  # other ways to write a block


@pytest.mark.slow
def test_every_command_runs_and_prints_what_the_page_shows(tmp_path: Path) -> None:
    for name in NEEDED:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PRESET": str(small_preset(tmp_path / "small.yaml")),
        "PAIRS": str(pairs(tmp_path / "pairs.jsonl")),
        "PORT": str(free_ports(1)[0]),
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(tmp_path),
        "METAFLOW_USER": "tester",
        "DS_ACCELERATOR": "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    page = blocks()
    commands = [content for language, content in page if language == "bash"]
    script = "".join(f"echo '::: {number}'\n{content}\n" for number, content in enumerate(commands))
    script = f"set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{script}echo '::: end'\n"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    outputs = re.split(r"^::: (?:\d+|end)\n", done.stdout, flags=re.MULTILINE)[1:-1]
    assert len(outputs) == len(commands)

    shown = iter(outputs)
    output = ""
    for language, content in page:
        if language == "bash":
            output = next(shown)
            continue
        missing = [line for line in content.splitlines() if not re.search(pattern(line), output)]
        assert not missing, f"the page shows {missing}, and the command printed\n{output}"
