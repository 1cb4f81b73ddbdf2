"""The update's gradient is that of one plain backward however the work is cut up, and it is clipped as torch clips.

Over all ZeRO stages, micro-batches, layouts and selections, even and uneven, on one rank and on two, whose cases share
one start. The engine's gradient lies within a millionth of the length of that of a plain float32 backward, and near the
float64 gradient as test_update.FLOAT32 says.
"""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.config_training import TrainingSection
from alignment.engine import Ranks, gradient_accumulation_steps
from alignment.micro_batches import sequence_micro_batches
from alignment.types import TokenSequence
from models.sequence_loss import SequenceLoss
from test_update import FLOAT32, case, check_gradient, launch, norm, results, run_update
from tiny import random_rows, tiny_llama
from update_ranks import plain_gradient, rollouts

CASES = [
    (size, layout, count)
    for (size, layout), count in zip(
        itertools.product([1, 2, 3, 8], [[], ["--padded"]]), itertools.cycle([5, 4, 5, 1, 3]), strict=False
    )
]
"""Micro-batch, layout and number of selected responses, of a global batch of 8."""
STAGES = pytest.mark.parametrize("zero_stage", range(4))


@functools.cache
def expected(count):
    """The plain gradient of the first `count` rollouts, and its loss."""
    gradient, loss, _ = plain_gradient(rollouts(count))
    return gradient, loss


@functools.cache
def in_float32(count):
    """The same by a plain backward in the engine's type."""
    return plain_gradient(rollouts(count), dtype=torch.float32)[0]


def arguments(zero_stage, grid_case):
    size, layout, count = grid_case
    options = [*layout, "--rows", str(count)]
    return {"options": options, "zero_stage": zero_stage, "micro_batch_size": size}


def check(weights, result, count):
    gradient, loss = expected(count)
    check_gradient(weights, gradient)
    check_gradient(weights, in_float32(count), within=1e-6)
    assert result["loss"] == pytest.approx(loss, rel=1e-6)
    assert result["grad_norm"] == pytest.approx(norm(gradient.values()), rel=1e-6)


def clip_below(gradient):
    """A third of the norm; nothing else in a config depends on the gradient."""
    return norm(gradient.values()) / 3


def clipped(gradient, clip):
    """What torch makes of the gradient, in float64."""
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradient.values()]
    for parameter, g in zip(parameters, gradient.values(), strict=True):
        parameter.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    return {name: parameter.grad for name, parameter in zip(gradient, parameters, strict=True)}


def check_clipped(weights, result):
    """The weights moved by the clipped gradient; the norm that is recorded is the one before."""
    gradient, _ = expected(5)
    check_gradient(weights, clipped(gradient, clip_below(gradient)))
    assert norm(weights.values()) == pytest.approx(norm(gradient.values()) / 3, rel=1e-5)
    assert result["grad_norm"] == pytest.approx(norm(gradient.values()), rel=1e-6)


def clip_settings(zero_stage):
    return {"zero_stage": zero_stage, "micro_batch_size": 2, "gradient_clip": clip_below(expected(5)[0])}


@STAGES
def test_on_one_rank_it_does_not_depend_on_micro_batches_padding_or_the_selections_size(tmp_path, zero_stage):
    for grid_case in CASES:
        check(*run_update(tmp_path, **arguments(zero_stage, grid_case)), grid_case[2])


@STAGES
def test_on_one_rank_it_is_clipped_as_torch_clips(tmp_path, zero_stage):
    check_clipped(*run_update(tmp_path, **clip_settings(zero_stage)))


def test_on_two_ranks_all_of_this_holds_too(tmp_path):
    grid = {f"{stage}-{i}": (stage, found) for stage in range(4) for i, found in enumerate(CASES)}
    clips = {f"clip-{stage}": stage for stage in range(4)}
    for name in (*grid, *clips):
        (tmp_path / name).mkdir()
    cases = [case(tmp_path / name, **arguments(*found)) for name, found in grid.items()]
    launch(2, [*cases, *(case(tmp_path / name, **clip_settings(stage)) for name, stage in clips.items())])
    for name, (_, grid_case) in grid.items():
        check(*results(tmp_path / name), grid_case[2])
    for name in clips:
        check_clipped(*results(tmp_path / name))


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=7),
    size=st.integers(1, 8),
    world_size=st.integers(1, 4),
    packed=st.booleans(),
)
def test_the_parts_of_all_ranks_add_up_to_the_whole(lengths, size, world_size, packed):
    """Any lengths, micro-batch, number of ranks and layout; the loss alone, without an engine."""
    prompts, responses = random_rows([p for p, _ in lengths]), random_rows([r for _, r in lengths], seed=1)
    rows = [
        TokenSequence((*p, *r), (False,) * len(p) + (True,) * len(r)) for p, r in zip(prompts, responses, strict=True)
    ]
    passes = gradient_accumulation_steps(TrainingSection(global_batch_size=8, micro_batch_size=size), world_size)
    shares = [
        sequence_micro_batches(rows, size, Ranks(rank, world_size), passes, packed=packed) for rank in range(world_size)
    ]
    whole = gradient_of([([row], 1.0) for row in rows], packed=False)
    parts = gradient_of([part for share in shares for part in share], packed=packed)
    assert norm([parts - whole]) <= FLOAT32 * norm([whole])


def gradient_of(parts, *, packed):
    """All entries of the gradient of the weighted parts' summed loss."""
    model = tiny_llama()
    loss = SequenceLoss(model, packed=packed)
    for sequences, weight in parts:
        (loss(sequences)[0] * weight).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])
