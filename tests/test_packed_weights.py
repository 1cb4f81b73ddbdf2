"""Packed weights give what the plain ones give, and leave the model as it was."""

import pytest
import torch
from torch import nn

from models import packed_weights
from models.packed_weights import STEADY_STEPS, PackedWeights

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch was built without MKL here")


@pytest.fixture
def packings(monkeypatch) -> list[int]:
    """The numbers of rows that a layer was packed for."""
    made, pack = [], packed_weights._packed
    monkeypatch.setattr(packed_weights, "_packed", lambda layer, rows: (made.append(rows), pack(layer, rows))[1])
    return made


def a_layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [2, 7, 128])
def test_the_product_is_the_layers_for_the_packed_rows_and_for_others(packings, rows, bias):
    layer = a_layer(bias)
    weights = PackedWeights(nn.ModuleList([layer]))
    for count in (rows, rows + 1):
        x = torch.randn(count, 1, 24)
        expected = (x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)).float()
        with weights.stepping(rows):
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert packings == [rows]
    assert "forward" not in vars(layer)


def test_another_number_of_rows_is_packed_for_once_it_has_lasted(packings):
    weights = PackedWeights(a_layer())
    for rows, steps in ((4, 1), (3, STEADY_STEPS), (2, 1), (3, STEADY_STEPS), (3, 2), (1, 2 * STEADY_STEPS)):
        for _ in range(steps):
            with weights.stepping(rows):
                pass
    assert packings == [4, 3]


def test_the_model_is_left_as_it_was_by_an_error(packings):
    layer = a_layer()
    with pytest.raises(KeyError), PackedWeights(layer).stepping(4):
        raise KeyError
    assert packings == [4]
    assert "forward" not in vars(layer)


def test_weights_of_another_type_or_too_large_are_left_alone(packings, monkeypatch):
    with PackedWeights(a_layer(dtype=torch.bfloat16)).stepping(4):
        pass
    monkeypatch.setattr(packed_weights, "MOST_BYTES", 24 * 40 * 4 - 1)
    with PackedWeights(a_layer()).stepping(4):
        pass
    assert packings == []
