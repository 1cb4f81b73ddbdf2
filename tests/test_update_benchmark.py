"""The benchmark of the update: all compared ways train on the same tokens to the same loss, here on the tiny policy."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignment.disk import count_parameters
from alignment.embedded import policy_folder
from alignment.engine import start_ranks
from benchmarks.peers.plain_torch import PlainLoop
from benchmarks.peers.supervised_trainers import hf_trainer, trl_trainer
from benchmarks.rounds import check_same_work
from benchmarks.update_setup import matrix_rate, operations, rollouts, uniform_rollouts, updating
from reward_runs import alone


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The tiny policy's folder, in a process with a group of its own."""
    threads = torch.get_num_threads()
    with alone():
        start_ranks(threads=1, gpu=False)
    yield policy_folder("tiny", tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(threads)


def test_plain_torch_does_the_same_work(policy):
    examples = uniform_rollouts(3, 12, vocabulary=60)
    ours, theirs = updating(policy, examples, 3), PlainLoop(policy, examples).step
    check_same_work({"ours": ours(), "theirs": theirs()})
    assert ours() == pytest.approx(theirs(), abs=1e-5)  # no weight has moved


def ragged(policy, tmp_path):
    """Ten examples of HH pairs: more than a batch of the peers', and no multiple of it."""
    pairs = [
        {
            "chosen": f"\n\nHuman: {'why ' * (i % 4 + 1)}\n\nAssistant: {'because ' * (i + 1)}",
            "rejected": f"\n\nHuman: {'why ' * (i % 4 + 1)}\n\nAssistant: no",
        }
        for i in range(12)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return rollouts(policy, 10, file)


def test_the_trainers_do_the_same_work_on_ragged_examples(policy, tmp_path):
    examples = ragged(policy, tmp_path)
    assert len({len(r.response_ids) for r in examples}) == 10
    ways = {"ours": updating(policy, examples, 8), "transformers": hf_trainer(policy, examples)}
    check_same_work({name: way() for name, way in ways.items()})
    check_same_work({name: way() for name, way in ways.items()})


def test_trl_does_the_same_work_on_ragged_examples(policy, tmp_path):
    pytest.importorskip("trl", reason="needs requirements-trl.txt")
    examples = ragged(policy, tmp_path)
    check_same_work({"ours": updating(policy, examples, 8)(), "trl": trl_trainer(policy, examples)()})


def test_without_dialogues_the_examples_are_the_products_own(policy):
    examples = rollouts(policy, 3, None)
    assert len(examples) == 3 and all(r.prompt_ids and r.num_tokens > 1 for r in examples)


def test_the_limit_counts_the_head_where_it_is_needed(policy):
    (one,) = uniform_rollouts(1, 5, vocabulary=60)  # 5 tokens, 4 of which are learned
    model = AutoModelForCausalLM.from_pretrained(policy)
    head = model.lm_head.weight.numel()
    body = count_parameters(policy) - head
    assert operations(policy, [one]) == 6 * (5 * body + 4 * head)
    assert matrix_rate(policy, 16) > 0
