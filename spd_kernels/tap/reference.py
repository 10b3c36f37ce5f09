"""The specification of the tap: a tensor hook that shows the gradient to the accumulator."""

from __future__ import annotations

import torch

from spd_kernels.tap.api import Accumulator


def tap_reference(x: torch.Tensor, accumulator: Accumulator, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A tensor equal to x whose gradient is also given to `accumulator.update`."""
    y = x * 1
    if y.requires_grad:
        y.register_hook(lambda g: accumulator.update(g.detach(), mask))
    return y
