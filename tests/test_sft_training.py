"""A step of supervised fine-tuning: its gradient and loss over ranks, ZeRO stages and layouts are plain torch's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import sft_ranks
from alignment.config_training import SftSection
from alignment.engine import optimizer_tensors, start_ranks
from alignment.micro_batches import balanced
from alignment.sft_data import SftData
from alignment.sft_training import build_trainer, train_step
from alignment.types import TokenSequence
from reward_runs import in_this_process
from sft_ranks import sequences
from tiny import tiny_llama

ROOT = Path(__file__).resolve().parent.parent


def plain_step():
    """Gradient and mean loss per counted token: each sequence alone, no padding, float64."""
    model = tiny_llama().double()
    loss, tokens = torch.zeros((), dtype=torch.float64), sum(s.num_learned for s in sequences())
    for s in sequences():
        log_p = model(torch.tensor([s.ids])).logits[0].log_softmax(-1)
        for i, counts in enumerate(s.learned):
            if counts:
                loss -= log_p[i - 1, s.ids[i]] / tokens
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


# 5 sequences: uneven over 2 ranks and over micro-batches, and fewer than the global batch of 8
@pytest.mark.parametrize(
    ("ranks", "zero_stage", "micro_batch_size", "packing"),
    [
        (1, 0, 8, "none"),
        (1, 0, 2, "none"),
        (1, 0, 8, "rows"),
        (1, 2, 2, "rows"),
        (2, 0, 2, "none"),
        (2, 3, 2, "rows"),
    ],
)
def test_gradient_and_loss_are_those_of_plain_torch(tmp_path, ranks, zero_stage, micro_batch_size, packing):
    settings = {"gradient_clip": 1e9, "global_batch_size": 8, "lr": 1.0, "lr_schedule": "constant", "max_tokens": 16}
    settings |= {"zero_stage": zero_stage, "micro_batch_size": micro_batch_size, "packing": packing}
    words = [json.dumps(settings), str(tmp_path / "out")]
    if ranks == 1:
        in_this_process(lambda: sft_ranks.run(words))
    else:
        command = [sys.executable, "-m", "alignment.one_node", f"--nproc-per-node={ranks}"]
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command.append(str(ROOT / "tests/sft_ranks.py"))
        subprocess.run([*command, *words], check=True, env={**os.environ, **environment}, timeout=180)
    weights, result = load_file(tmp_path / "out.safetensors"), json.loads((tmp_path / "out.json").read_text())
    gradient, loss = plain_step()
    before = tiny_llama().state_dict()
    assert weights.keys() == gradient.keys()
    for name, expected in gradient.items():
        torch.testing.assert_close((before[name] - weights[name]).double(), expected, atol=1e-5, rtol=1e-4)
    step = result["step"]
    assert step["loss"] == pytest.approx(loss, abs=1e-5)
    assert result["validation"]["loss"] == pytest.approx(loss, abs=1e-5)
    norm = torch.stack([g.norm() for g in gradient.values()]).norm().item()
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert (step["examples"], step["tokens"]) == (5, sum(sft_ranks.LENGTHS))
    assert step["learned_tokens"] == sum(s.num_learned for s in sequences())


def test_the_first_step_in_bfloat16_is_adamws_first():
    """|Δw| = lr wherever there is a gradient: the moments' corrections cancel in step 1, and in no other."""

    def run():
        ranks = start_ranks(threads=1, gpu=False)
        for zero_stage in (0, 1):
            section = SftSection(
                lr=1e-3, weight_decay=0, zero_stage=zero_stage, micro_batch_size=8, lr_schedule="constant"
            )
            model = tiny_llama().to(torch.bfloat16)
            trainer = build_trainer(model, section, ranks, SftData((sequences(),), (1.0,), None), seed=0)
            before = masters(trainer)
            train_step(trainer, 1)
            change = torch.cat([(a - b).abs() for a, b in zip(masters(trainer), before, strict=True)])
            assert (change > 0).float().mean() > 0.8
            torch.testing.assert_close(change[change > 0].median(), torch.tensor(1e-3), rtol=0.01, atol=0)

    def masters(trainer):
        tensors = optimizer_tensors(trainer.engine)
        return [tensor.flatten().clone() for name, tensor in tensors.items() if name.endswith(".master")]

    in_this_process(run)


@given(
    lengths=st.lists(st.integers(2, 50), min_size=1, max_size=24),
    size=st.integers(1, 5),
    spare=st.integers(0, 3),
)
def test_groups_hold_every_sequence_once_and_differ_by_no_more_than_one_of_them(lengths, size, spare):
    batch = [TokenSequence((i,) * n, (False,) * n) for i, n in enumerate(lengths)]
    count = -(-len(batch) // size) + spare
    groups = balanced(batch, size, count)
    assert len(groups) == count and all(len(group) <= size for group in groups)
    assert sorted(s.ids[0] for group in groups for s in group) == list(range(len(batch)))
    if size >= len(batch):  # no group is full, so the lightest always had room
        tokens = [sum(len(s.ids) for s in group) for group in groups]
        assert max(tokens) - min(tokens) <= max(lengths)
