"""The specification of the projection: plain PyTorch, any device, float64-capable."""

from __future__ import annotations

import torch


def project_reference(x: torch.Tensor, u: torch.Tensor, a: float = 0.0, b: float = 1.0) -> torch.Tensor:
    """a * x + b * (x @ u) @ u.T; with a = 0 there is no x term, so that infinities in x do not become 0 * inf."""
    y = (x @ u) @ u.mT
    if b != 1.0:
        y = y * b
    return y if a == 0.0 else y.add(x, alpha=a)
