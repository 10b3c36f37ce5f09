"""The public tap. It moves no data of its own, so it has no kernel: its cost is the accumulator's update."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Accumulator(Protocol):
    """What a tap feeds: `GradientCovariance`, or anything with its `update`."""

    def update(self, g: torch.Tensor, mask: torch.Tensor | None = None) -> Any: ...


def tap(x: torch.Tensor, accumulator: Accumulator, mask: torch.Tensor | None = None) -> torch.Tensor:
    """x itself on the way forward; on the way back, `accumulator.update(gradient, mask)` and the gradient unchanged.

    Where no gradient will flow (x does not require one, or gradients are off) x is returned as it is and the
    accumulator sees nothing. For eager mode: the update is a side effect of the backward pass.

    Args:
        x: (..., d).
        mask: boolean, of x's leading shape; rows that are False, such as padding, are not rows.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x
    return _Tap.apply(x, accumulator, mask)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, accumulator: Accumulator, mask: torch.Tensor | None) -> torch.Tensor:
        ctx.accumulator, ctx.mask = accumulator, mask
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (g,) = grads
        with torch.no_grad():
            ctx.accumulator.update(g.detach(), ctx.mask)
        return g, None, None
