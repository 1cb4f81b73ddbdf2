"""The output head in chunks against the same loss from whole logits, and the architectures that it suits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from models import head as heads
from models.head import Reference, TokenHead, has_plain_head, loss_sums
from models.sequence_loss import SequenceLoss
from test_packing import MODELS, SMALL, loss_by_hand, sequences

WIDTH, VOCABULARY = 6, 11


def inputs(tokens, with_bias, with_base):
    """Hidden states, a head, targets, and a base with a head of its own; all random."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def linear():
        layer = torch.nn.Linear(WIDTH, VOCABULARY, bias=with_bias)
        for parameter in layer.parameters():
            parameter.data.copy_(normal(*parameter.shape))
        return layer

    hidden = normal(tokens, WIDTH).requires_grad_()
    base = Reference(normal(tokens, WIDTH), linear()) if with_base else None
    return hidden, linear(), torch.randint(VOCABULARY, (tokens,), generator=generator), base


def gradients(sums, hidden, layer):
    (3 * sums[0]).backward()
    found = [hidden.grad, *(p.grad for p in layer.parameters())]
    hidden.grad = None
    layer.zero_grad()
    return found


@settings(deadline=None)
@given(tokens=st.integers(1, 20), chunk=st.integers(1, 24), with_bias=st.booleans(), kl=st.sampled_from([0.0, 0.7]))
def test_chunks_change_no_sum_and_no_gradient(tokens, chunk, with_bias, kl):
    hidden, layer, targets, base = inputs(tokens, with_bias, kl > 0)
    whole = loss_sums(layer(hidden), targets, base and base.head(base.hidden).detach(), kl)
    expected = gradients(whole, hidden, layer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "CHUNK", chunk)
        chunked = TokenHead(layer, kl)(hidden, targets, base)
        torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=1e-6)
        for got, wanted in zip(gradients(chunked, hidden, layer), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-6)


def test_a_base_that_shares_the_head_is_read_through_it():
    hidden, layer, targets, base = inputs(5, False, True)
    chunked = TokenHead(layer, 0.5)(hidden, targets, Reference(base.hidden, None))
    torch.testing.assert_close(chunked, loss_sums(layer(hidden), targets, layer(base.hidden), 0.5))


def test_no_gradient_is_taken_of_what_is_frozen_or_only_measured():
    hidden, layer, targets, _ = inputs(5, False, False)
    layer.requires_grad_(False)
    TokenHead(layer, 0.0)(hidden, targets, None)[0].backward()
    F.cross_entropy(layer(copy := hidden.detach().requires_grad_()), targets, reduction="sum").backward()
    torch.testing.assert_close(hidden.grad, copy.grad)
    assert layer.weight.grad is None
    with torch.no_grad():
        assert not TokenHead(layer.requires_grad_(), 0.0)(hidden, targets, None).requires_grad


def test_bfloat16_sums_of_many_chunks_are_kept_in_float32(monkeypatch):
    monkeypatch.setattr(heads, "CHUNK", 1)
    layer = torch.nn.Linear(1, 2, bias=False).to(torch.bfloat16)
    layer.weight.data.zero_()
    hidden, targets = torch.ones(1000, 1, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.long)
    TokenHead(layer, 0.0)(hidden, targets, None)[0].backward()
    # each token's slope is (-1/2, 1/2); bfloat16 would stop counting at 128
    assert layer.weight.grad.flatten().tolist() == [-500, 500]


@MODELS
def test_plain_heads_are_known(model):
    assert has_plain_head(model)


def test_logits_that_are_changed_behind_the_head_are_taken_from_the_model():
    torch.manual_seed(0)
    sizes = {"intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3}
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, **sizes, head_dim=8, final_logit_softcapping=2.0))
    scaled = CohereForCausalLM(CohereConfig(**SMALL, **sizes, logit_scale=0.5))
    for model in (capped.eval(), scaled.eval()):
        assert not has_plain_head(model)
        with torch.no_grad():
            expected = sum(loss_by_hand(model, s) for s in sequences())
            for packed in (False, True):
                loss = SequenceLoss(model, packed=packed)
                assert loss.head is None
                assert float(loss(sequences())) == pytest.approx(expected, rel=1e-5)
