"""vLLM serves what a run leaves: a checkpoint as it is, its optimizer's files beside the weights.

Runs where vLLM is installed: `pip install --no-deps -r requirements-vllm.txt` in an environment of its own.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from alignment.embedded import policy_folder
from models import checkpoints as cp
from models.policy import load_policy
from models.policy_export import export_policy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: requirements-vllm.txt"),
]
PROMPTS = ["Movie review: this", "a", "The sky above the port was"]
TOKENS = 8
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4)
    outputs = llm.generate(json.loads(sys.argv[2]), SamplingParams(temperature=0, max_tokens=int(sys.argv[3])))
    print("TOKENS", json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""


def write_policy(folder: Path, cache: Path) -> None:
    """A random Llama with heads of 32, the smallest that vLLM computes on a CPU, and the tiny policy's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(policy_folder("tiny", cache))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(folder)


def greedy(folder: Path) -> list[list[int]]:
    """The likeliest tokens by transformers, one forward pass each."""
    policy = load_policy(folder, prompt_format="text")
    rows = []
    for prompt in PROMPTS:
        ids, response = policy.reader.encode(prompt), []
        while len(response) < TOKENS and not set(response) & set(policy.eos_ids):
            with torch.no_grad():
                response.append(int(policy.model(torch.tensor([ids + response])).logits[0, -1].argmax()))
        rows.append(response)
    return rows


def served(folder: Path, tmp_path: Path) -> list[list[int]]:
    """The same by vLLM, in a process of its own."""
    script = tmp_path / "generate.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), json.dumps(PROMPTS), str(TOKENS)],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    found: list[list[int]] = json.loads(lines[-1].removeprefix("TOKENS "))
    return found


def test_vllm_serves_a_checkpoint_as_it_is(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    staging = cp.staging_folder(checkpoints, 3)
    write_policy(staging, tmp_path / "cache")
    cp.write_optimizer_state(staging, 0, {"0.exp_avg": torch.ones(5)})
    details = {"ranks": 1, "zero_stage": 0, "run_id": "7", "parent": {}}
    folder = Path(cp.seal(checkpoints, 3, config={"seed": 0}, details=details).uri)
    assert served(folder, tmp_path) == greedy(folder)
    cp.verify(folder)  # and it leaves nothing there


def test_vllm_serves_the_weights_of_an_export(tmp_path: Path) -> None:
    write_policy(tmp_path / "policy", tmp_path / "cache")
    policy = load_policy(tmp_path / "policy", prompt_format="text")
    version, _ = export_policy(policy, repository=tmp_path / "r", name="policy", max_new_tokens=9, card={})
    shutil.rmtree(tmp_path / "policy")
    weights = tmp_path / "r" / "policy" / version / "weights"
    assert served(weights, tmp_path) == greedy(weights)
