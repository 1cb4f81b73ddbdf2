"""Weights laid out once for the products of many decoding steps.

MKL copies the weight of each float32 product into an order of its own first. With few rows, as in decoding, that and
reading the weight from memory are a good part of the product's time; a weight that lies in that order already
(MKL's packed GEMM, which torch has for its compiler) is read once, in sequence.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MOST_BYTES = 2 * 2**30
"""Weights beyond this are left as they are: the packed ones stand beside them in memory."""

STEADY_STEPS = 8
"""Steps of one number of rows after which the weights are packed for it: packing takes about as long as a step, and
spares a seventh of each."""


class PackedWeights:
    """The linear layers of a model on a CPU in float32, packed for the number of rows that its steps have.

    A packed weight is for one number of rows: the first steps' at once, another when it has lasted. The weights must
    not change meanwhile. Models elsewhere, of other types or beyond `MOST_BYTES` compute as they do without.
    """

    def __init__(self, model: nn.Module) -> None:
        linear = (module for module in model.modules() if type(module) is nn.Linear)
        layers = [layer for layer in linear if "forward" not in vars(layer)]  # one that others have replaced is theirs
        held = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
        plain = all(one.weight.device.type == "cpu" and one.weight.dtype == torch.float32 for one in layers)
        packs = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # its operator wants both
        self._layers = layers if plain and held <= MOST_BYTES and packs else []
        self._forwards: list[Callable[[Tensor], Tensor]] = []
        self._packed_rows, self._rows, self._steps = 0, 0, 0

    @contextmanager
    def stepping(self, rows: int) -> Iterator[None]:
        """In this context the model reads one token of each of `rows` rows."""
        self._steps = self._steps + 1 if rows == self._rows else 1
        self._rows = rows
        if rows != self._packed_rows and rows > 1 and (not self._packed_rows or self._steps > STEADY_STEPS):
            self._forwards.clear()  # before the new ones take memory
            self._forwards += [_packed(layer, rows) for layer in self._layers]
            self._packed_rows = rows
        if rows != self._packed_rows:
            yield
            return
        for layer, forward in zip(self._layers, self._forwards, strict=True):
            vars(layer)["forward"] = forward
        try:
            yield
        finally:
            for layer in self._layers:
                del vars(layer)["forward"]


def _packed(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    """The layer's forward pass for inputs of `rows` rows; for others, torch computes what the layer would."""
    weight, bias = layer.weight.detach(), layer.bias
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)

    def forward(inputs: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkl._mkl_linear(inputs, packed, weight, bias, rows)
        return product

    return forward
