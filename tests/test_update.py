"""The update against one plain backward in torch: loss, gradient norm and gradient, over ranks and ZeRO stages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import update_ranks
from alignment.config_training import TrainingSection
from alignment.engine import Ranks, _check_finite, gradient_accumulation_steps, learning_rate
from alignment.errors import TrainingError
from alignment.update import _length, deal
from models.sampling import Sampling, draw
from reward_runs import in_this_process
from tiny import tiny_llama
from update_ranks import BASE_SEED, RESPONSE_LENGTHS, rollouts

ROOT = Path(__file__).resolve().parent.parent


def run_update(tmp_path, ranks, steps=1, plain=True, options=(), **settings):
    """`update` on ranks of its own, or in this process with plain gradients on one; the weights and the StepUpdate."""
    settings = {"gradient_clip": 1e9, "global_batch_size": 8, **settings}
    words = [
        json.dumps(settings),
        str(tmp_path / "out"),
        str(steps),
        *(["--plain-gradient"] if plain else []),
        *options,
    ]
    if ranks == 1 and plain:
        in_this_process(lambda: update_ranks.run(words))
    else:
        command = [sys.executable, "-m", "alignment.one_node", f"--nproc-per-node={ranks}"]
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command.append(str(ROOT / "tests/update_ranks.py"))
        subprocess.run([*command, *words], check=True, env={**os.environ, **environment}, timeout=180)
    return load_file(tmp_path / "out.safetensors"), json.loads((tmp_path / "out.json").read_text())


def plain_gradient(rows, kl_penalty=0.0):
    """Gradient and loss of mean cross-entropy per response token: each row alone, no padding, float64."""
    model, base = tiny_llama().double(), tiny_llama(BASE_SEED).double()
    tokens = sum(len(r.response_ids) for r in rows)
    loss = torch.zeros((), dtype=torch.float64)
    for r in rows:
        ids, responses = torch.tensor([r.prompt_ids + r.response_ids]), slice(len(r.prompt_ids) - 1, -1)
        logits = model(ids).logits[0, responses]
        loss += torch.nn.functional.cross_entropy(logits, torch.tensor(r.response_ids), reduction="sum") / tokens
        p, q = (torch.distributions.Categorical(logits=x) for x in (logits, base(ids).logits[0, responses].detach()))
        loss += kl_penalty * torch.distributions.kl_divergence(p, q).sum() / tokens
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "micro_batch_size"), [(1, 0, 8), (1, 0, 2), (1, 2, 2), (2, 0, 1), (2, 1, 2), (2, 2, 2)]
)
def test_gradient_is_that_of_one_plain_backward(tmp_path, ranks, zero_stage, micro_batch_size):
    # 5 responses: uneven over 2 ranks, over micro-batches, and fewer than the global batch of 8
    weights, result = run_update(tmp_path, ranks, zero_stage=zero_stage, micro_batch_size=micro_batch_size)
    gradient, loss = plain_gradient(rollouts())
    before = tiny_llama().state_dict()
    for name, expected in gradient.items():
        torch.testing.assert_close((before[name] - weights[name]).double(), expected, atol=1e-6, rtol=1e-4)
    assert result["loss"] == pytest.approx(loss, abs=1e-6)
    norm = torch.stack([g.norm() for g in gradient.values()]).norm().item()
    assert result["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert result["response_tokens"] == sum(RESPONSE_LENGTHS)
    assert result["optimizer_steps"] == 1


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 0), (2, 2)])
def test_penalty_adds_the_gradient_of_the_exact_kl_to_the_base(tmp_path, ranks, zero_stage):
    weights, result = run_update(tmp_path, ranks, zero_stage=zero_stage, micro_batch_size=2, kl_penalty=0.3)
    gradient, loss = plain_gradient(rollouts(), kl_penalty=0.3)
    before = tiny_llama().state_dict()
    assert weights.keys() == before.keys()  # the base is not among them
    for name, expected in gradient.items():
        torch.testing.assert_close((before[name] - weights[name]).double(), expected, atol=1e-6, rtol=1e-4)
    assert result["loss"] == pytest.approx(loss, abs=1e-6)


def test_each_optimizer_step_is_normalised_by_its_own_tokens(tmp_path):
    weights, result = run_update(tmp_path, 1, global_batch_size=3, micro_batch_size=1)
    model = tiny_llama()
    for rows in (rollouts()[:3], rollouts()[3:]):  # the second step starts from the first one's weights
        tokens = sum(r.num_tokens for r in rows)
        model.zero_grad()
        for r in rows:
            logits = model(torch.tensor([r.prompt_ids + r.response_ids])).logits[0, len(r.prompt_ids) - 1 : -1]
            (
                torch.nn.functional.cross_entropy(logits, torch.tensor(r.response_ids), reduction="sum") / tokens
            ).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad
    assert result["optimizer_steps"] == 2
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(weights[name], expected, atol=1e-5, rtol=1e-3)


def test_weights_are_bit_identical_when_repeated(tmp_path):
    first, _ = run_update(tmp_path, 1, steps=3, plain=False, lr=1e-3)
    second, _ = run_update(tmp_path, 1, steps=3, plain=False, lr=1e-3)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], tiny_llama().state_dict()["lm_head.weight"])


def test_dropout_draws_from_its_named_stream_alone(tmp_path):
    first, _ = run_update(tmp_path, 1, options=["--dropout", "1"])
    second, _ = run_update(tmp_path, 1, options=["--dropout", "5000"])
    without, _ = run_update(tmp_path, 1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], without["lm_head.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_is_an_error_that_names_the_rate(value):
    with pytest.raises(TrainingError, match=r"loss is (nan|inf).*training\.lr"):
        _check_finite(value, "loss", "training")
    with pytest.raises(TrainingError, match=r"training\.lr"):
        draw(torch.full((1, 4), float("nan")), torch.tensor([0.5]), Sampling(1))


def test_deal_gives_all_ranks_equally_many_micro_batches_and_every_row_once():
    training = TrainingSection(global_batch_size=8, micro_batch_size=2)
    rows = rollouts()
    accumulation = gradient_accumulation_steps(training, 2)
    shares = [deal(rows, 2, Ranks(rank, 2), accumulation, _length) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]
    dealt = sorted(r.prompt_id for share in shares for micro_batch in share for r in micro_batch)
    assert dealt == ["0", "1", "2", "3", "4"]
    assert shares[1][1] == []  # rank 1 runs short: a micro-batch of zero weight


def test_learning_rate_by_hand():
    def rates(**settings):
        training = TrainingSection(lr=1.0, **settings)
        return [learning_rate(step, training, max_steps=5) for step in range(1, 6)]

    assert rates() == [1, 1, 1, 1, 1]
    assert rates(warmup_steps=2) == [0.5, 1, 1, 1, 1]
    assert rates(lr_schedule="linear", min_lr=0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert rates(lr_schedule="cosine") == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)
    assert rates(lr_schedule="linear", warmup_steps=2) == pytest.approx([0.5, 1, 1, 0.5, 0])
