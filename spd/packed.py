"""Linear layers with their weights in oneDNN's layout: faster on the CPU for passes over few rows.

What torch calls by itself (MKL) reaches half of an AMD core's arithmetic at 8 rows and three quarters at 64, oneDNN on
packed weights nine tenths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SMALLEST = 2**18
"""Elements of a weight below which it lies in the cache anyway: at 192 x 768 and below 0.4 to 1.2 times as fast packed,
at 768 x 768 and above 1.1 to 3.2 times with four rows or more."""

FEWEST = 4
"""Rows below which a layer is its own: with one it is 0.6 to 1.0 times as fast packed."""

LARGEST = 2 * 2**30
"""Bytes of weights beyond which a second copy is not worth its memory."""


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside the block, the model's plain linear layers in float32 on the CPU run on packed copies of their weights.

    Results differ in rounding alone. A weight that is changed inside the block shows no effect, but where gradients
    are on, a layer is its own. Parameters, modules and hooks stay where they are; blocks may be nested.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and _fits(module)]
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not available or sum(layer.weight.nbytes for layer in layers) > LARGEST:
        layers = []
    try:
        for layer in layers:
            layer.forward = _forward(layer, layer.forward)  # type: ignore[method-assign, assignment]
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _fits(layer: nn.Linear) -> bool:
    return (
        layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
        and type(layer.weight) is nn.Parameter
        and layer.weight.numel() >= SMALLEST
        and "forward" not in vars(layer)  # offloaded, of an outer block, or someone else's
    )


def _forward(layer: nn.Linear, own: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
    bias = None if layer.bias is None else layer.bias.detach()
    fewest = FEWEST * layer.in_features

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.numel() < fewest or x.dtype != torch.float32:
            return own(x)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    return forward
