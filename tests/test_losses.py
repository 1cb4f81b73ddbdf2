"""Losses against values computed by hand."""

import math

import pytest
import torch

from models.losses import penalised_loss_sum, response_loss_sum, token_kl


def test_response_loss_is_summed_over_tokens():
    # Two classes with logits (0, log 3): probabilities 1/4 and 3/4.
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    assert response_loss_sum(logits, torch.tensor([0, 1])).item() == pytest.approx(math.log(4) + math.log(4 / 3))


def test_token_kl_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = ½ log 2 + ½ log ⅔
    p = torch.zeros(1, 1, 2)
    q = torch.tensor([[[0.0, math.log(3)]]])
    assert token_kl(p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-7)
    assert token_kl(q, q).item() == pytest.approx(0, abs=1e-7)


def test_penalised_loss_by_hand():
    # p = (1/2, 1/2) predicts class 0: log 2 nats; its KL to q = (1/4, 3/4) as above
    base = torch.tensor([[0.0, math.log(3)]])
    loss, kl = penalised_loss_sum(torch.zeros(1, 2), base, torch.tensor([0]), kl_penalty=0.3)
    assert kl.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert loss.item() == pytest.approx(math.log(2) + 0.3 * kl.item())


def test_token_kl_is_that_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(token_kl(p, q), expected)
