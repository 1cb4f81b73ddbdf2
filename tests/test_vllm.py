"""vLLM as the engine of rollouts, against the policy's own model; and it serves what a run leaves.

A policy whose head is tied to its embedding and one whose is not: on a CPU vLLM keeps copies of both layers. Runs where
vLLM is installed: `pip install --no-deps -r requirements-vllm.txt` in an environment of its own.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
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
ROOT = Path(__file__).resolve().parent.parent
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


def write_policy(folder: Path, cache: Path, *, tied: bool = False) -> None:
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
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(folder)


def in_a_process(tmp_path: Path, *command: str) -> None:
    """Run a script of these tests to its end."""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    write_policy(folder, tmp_path_factory.mktemp("cache"), tied=request.param)
    return folder


@pytest.fixture(scope="module")
def drawn(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/vllm_samples.py tells of the policy."""
    place = tmp_path_factory.mktemp("drawn")
    in_a_process(place, str(ROOT / "tests" / "vllm_samples.py"), str(folder), str(place / "out.json"))
    return dict(json.loads((place / "out.json").read_text()))


def worst(rows: list[dict[str, Any]]) -> float:
    """The largest difference between vLLM's log-probability of a token and the trainer's."""
    return max(abs(a - b) for row in rows for a, b in zip(row["log_probs"], row["expected"], strict=True))


def tokens(rows: list[dict[str, Any]]) -> list[list[int]]:
    return [row["ids"] for row in rows]


def test_its_log_probabilities_are_the_trainers_before_and_after_the_weights_change(drawn: dict[str, Any]) -> None:
    assert worst(drawn["before"]) < 1e-4
    assert worst(drawn["after"]) < 1e-4
    assert tokens(drawn["before"]) != tokens(drawn["after"])
    assert min(map(min, (row["expected"] for row in drawn["after"]))) < -1  # else agreement would say nothing


def test_a_sample_is_its_streams_whatever_the_batch(drawn: dict[str, Any]) -> None:
    rows = drawn["after"]
    assert tokens(drawn["alone"]) == tokens(rows[4:])
    assert len({tuple(ids) for ids in tokens(rows)}) == len(rows)  # two of the prompts are the same


def test_each_response_ends_for_its_reason(drawn: dict[str, Any]) -> None:
    for row in drawn["before"] + drawn["after"]:
        assert (row["reason"] == "stop") == (row["ids"][-1] == 1)
        assert 1 not in row["ids"][:-1]
        assert row["reason"] == "stop" or len(row["ids"]) == 12


def test_greedily_both_engines_say_the_same(drawn: dict[str, Any]) -> None:
    for in_process, vllm in drawn["greedy"].values():
        assert vllm == in_process
    plain, long, penalised = (vllm for _, vllm in drawn["greedy"].values())
    assert [plain[0][1], len(plain[0][2])] == ["stop", 3]
    assert min(len(ids) for _, _, ids in long + penalised) >= 8
    assert long != penalised


def test_a_stop_string_ends_a_response_as_in_process(drawn: dict[str, Any]) -> None:
    stop, in_process, vllm = drawn["stopped"]
    assert vllm == in_process
    response, reason, ids = vllm[0]
    assert (stop in response, reason) == (False, "stop") and len(ids) < 12


def test_it_draws_from_the_restricted_distribution(drawn: dict[str, Any]) -> None:
    counts, exact = drawn["first_tokens"]["counts"], drawn["first_tokens"]["probabilities"]
    drawable = [i for i, p in enumerate(exact) if p > 0]
    assert sum(counts[i] for i in drawable) == sum(counts) == 2000
    expected = [2000 * exact[i] / sum(exact) for i in drawable]  # float32's rounding: SciPy wants equal sums
    test = scipy.stats.chisquare([counts[i] for i in drawable], expected)
    assert 2 < len(drawable) < 20 and test.pvalue > 1e-3


def test_a_generator_that_is_closed_leaves_nothing_behind(drawn: dict[str, Any]) -> None:
    assert drawn["closed"] == [0, 1, 2]  # the fourth prompt's hundred samples were under way; all else was drawn after


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_ranks_draw_what_one_does(
    folder: Path, drawn: dict[str, Any], tmp_path: Path, tensor_parallel: int
) -> None:
    for left in Path("/dev/shm").glob(
        "-tp:0-*-cpushm_*"
    ):  # by a process that was killed: the names are always the same
        left.unlink()
    words = [str(ROOT / "tests" / "vllm_ranks.py"), str(folder), str(tmp_path / "out"), str(tensor_parallel)]
    in_a_process(tmp_path, "-m", "alignment.one_node", "--nproc-per-node=2", *words)
    for rank, expected in enumerate([drawn["before"], drawn["before"][4:]]):
        rows = json.loads((tmp_path / f"out.{rank}").read_text())
        assert tokens(rows) == tokens(expected)
        assert worst(rows) < 1e-4


def test_a_run_is_the_same_with_either_engine(folder: Path, tmp_path: Path) -> None:
    """Greedily: so the second step shows that the weights of the first update were handed over."""
    found = {}
    for engine in ("in_process", "vllm"):
        words = [str(tmp_path / engine), str(tmp_path / f"{engine}.json"), f"policy.model={folder}", "training.lr=0.01"]
        script = str(ROOT / "tests" / "vllm_iteration.py")
        in_a_process(tmp_path, script, *words, f"rollouts.engine={engine}", "rollouts.temperature=0")
        found[engine] = json.loads((tmp_path / f"{engine}.json").read_text())
    first, second = found["vllm"]["steps"]
    assert found["vllm"]["steps"] == found["in_process"]["steps"]
    assert found["vllm"]["validation"] == found["in_process"]["validation"]
    assert len(first) == len(second) == 16 and len(set(found["vllm"]["validation"])) == 3


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
