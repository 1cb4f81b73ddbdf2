"""Reward models' losses against values computed by hand: at logs of small numbers σ is a fraction, and at the ends."""

import math

import pytest
import torch

from models.reward_losses import (
    bradley_terry_loss_sum,
    margin_loss_sum,
    merged_reward,
    regression_loss_sum,
    scaled_loss_sum,
)

LOG3 = math.log(3)
NAN = math.nan

# Gaps 0 and log 3: σ(0) = 1/2, and σ(log 3) = 1 / (1 + 1/3) = 3/4.
CHOSEN, REJECTED = torch.tensor([1.0, LOG3]), torch.tensor([1.0, 0.0])


def test_bradley_terry_by_hand():
    expected = math.log(2) + math.log(4 / 3)
    assert bradley_terry_loss_sum(CHOSEN, REJECTED).item() == pytest.approx(expected)


def test_a_margin_moves_the_gap():
    # Gaps less margins: 0 − log 3 and log 3 − log 3. σ(−log 3) = 1/4, σ(0) = 1/2.
    loss = margin_loss_sum(CHOSEN, REJECTED, torch.tensor([LOG3, LOG3]))
    assert loss.item() == pytest.approx(math.log(4) + math.log(2))


def test_a_scale_counts_a_pair_several_times():
    # 3 · log 2 + ½ · log 4/3
    loss = scaled_loss_sum(CHOSEN, REJECTED, torch.tensor([3.0, 0.5]))
    assert loss.item() == pytest.approx(3 * math.log(2) + 0.5 * math.log(4 / 3))


def test_without_a_margin_and_at_scale_1_both_are_bradley_and_terrys():
    plain = bradley_terry_loss_sum(CHOSEN, REJECTED)
    assert torch.equal(margin_loss_sum(CHOSEN, REJECTED, torch.zeros(2)), plain)
    assert torch.equal(scaled_loss_sum(CHOSEN, REJECTED, torch.ones(2)), plain)


@pytest.mark.parametrize(
    ("loss", "margins", "expected"),
    [
        # d/dr_chosen of −log σ(x) is −(1 − σ(x)): 1/2 at 0 and 1/4 at log 3, with the other sign for r_rejected.
        (bradley_terry_loss_sum, (), [-1 / 2, -1 / 4]),
        (margin_loss_sum, ([LOG3, LOG3],), [-3 / 4, -1 / 2]),
        (scaled_loss_sum, ([3.0, 0.0],), [-3 / 2, 0]),
    ],
    ids=["plain", "margin", "scaled"],
)
def test_gradients_of_pairs_by_hand(loss, margins, expected):
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    loss(chosen, rejected, *map(torch.tensor, margins)).backward()
    assert chosen.grad.tolist() == pytest.approx(expected)
    assert rejected.grad.tolist() == pytest.approx([-g for g in expected])


def test_far_apart_rewards_neither_overflow_nor_lose_their_gradient():
    # −log σ(x) is −x far below 0, where σ itself is 0 in float32, and 0 far above.
    chosen = torch.tensor([-1e4, 1e4, -1e30], requires_grad=True)
    rejected = torch.tensor([1e4, -1e4, 0.0])
    margins = torch.tensor([1.0, 1.0, 1.0])
    for loss in (
        bradley_terry_loss_sum(chosen, rejected),
        margin_loss_sum(chosen, rejected, margins),
        scaled_loss_sum(chosen, rejected, margins),
    ):
        assert loss.item() == pytest.approx(1e30)
        (gradient,) = torch.autograd.grad(loss, chosen)
        assert gradient.tolist() == [-1, 0, -1]
    assert bradley_terry_loss_sum(chosen[:2], rejected[:2]).item() == 2e4


def test_regression_by_hand():
    predicted = torch.tensor([[1.0, 2.0], [0.5, -1.0]], requires_grad=True)
    labels = torch.tensor([[4.0, 2.5], [0.0, 3.0]])
    loss = regression_loss_sum(predicted, labels, torch.tensor([[True, True], [True, False]]))
    loss.backward()
    assert loss.item() == 9 + 0.25 + 0.25  # (1 − 4)², (2 − 2.5)², (0.5 − 0)²
    assert predicted.grad.tolist() == [[-6, -1], [1, 0]]  # 2 (predicted − label)


@pytest.mark.parametrize("label", [NAN, math.inf, -100.0, 3e38])
@pytest.mark.parametrize("prediction", [0.0, NAN, -math.inf])
def test_what_is_not_labelled_has_neither_loss_nor_gradient(label, prediction):
    predicted = torch.tensor([[1.0, prediction], [prediction, prediction]], requires_grad=True)
    labels = torch.tensor([[3.0, label], [label, label]])
    loss = regression_loss_sum(predicted, labels, torch.tensor([[True, False], [False, False]]))
    loss.backward()
    assert loss.item() == 4
    assert predicted.grad.tolist() == [[-4, 0], [0, 0]]


def test_a_label_that_counts_and_is_not_finite_shows():
    assert regression_loss_sum(torch.zeros(1, 1), torch.tensor([[NAN]]), torch.tensor([[True]])).isnan()


def test_a_merged_reward_by_hand():
    outputs = torch.tensor([[4.0, 2.0, 1.0], [0.0, -1.0, 3.0]])
    weights = torch.tensor([0.5, 0.0, -2.0])
    assert merged_reward(outputs, weights).tolist() == [0, -6]  # 2 − 2, and 0 − 6
    assert merged_reward(outputs, torch.tensor([0.0, 1.0, 0.0])).tolist() == [2, -1]


def test_sums_do_not_depend_on_how_a_batch_was_cut():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margins = torch.randn(3, 12, generator=generator)
    for loss, inputs in (
        (bradley_terry_loss_sum, (chosen, rejected)),
        (margin_loss_sum, (chosen, rejected, margins.abs())),
        (scaled_loss_sum, (chosen, rejected, margins.abs())),
        (regression_loss_sum, (chosen.view(6, 2), rejected.view(6, 2), margins.view(6, 2) > 0)),
    ):
        whole = loss(*inputs)
        parts = sum(loss(*(tensor[rows] for tensor in inputs)) for rows in (slice(1), slice(1, 5), slice(5, None)))
        torch.testing.assert_close(parts, whole)
        assert loss(*(tensor[:0] for tensor in inputs)).item() == 0


def test_losses_of_a_bfloat16_model_are_computed_in_float32():
    # bfloat16 holds 8 bits of a number: the odd ones above 256 are none of its values.
    chosen, zeros = torch.tensor([-256.0, -101.0]).bfloat16(), torch.zeros(2).bfloat16()
    assert bradley_terry_loss_sum(chosen, zeros).item() == 357
    assert margin_loss_sum(chosen, zeros, torch.tensor([2.0, 0.0])).item() == 359
    assert scaled_loss_sum(chosen, zeros, torch.tensor([1.0, 3.0])).item() == 559
    predicted = torch.tensor([17.0, 2.0]).bfloat16()
    assert regression_loss_sum(predicted, zeros, torch.tensor([True, True])).item() == 293
    assert merged_reward(torch.tensor([[256.0, 1.0]]).bfloat16(), torch.ones(2).bfloat16()).item() == 257
