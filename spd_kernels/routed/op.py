"""The routed projection as a PyTorch operator: fake, CPU and GPU implementations, autograd."""

from __future__ import annotations

from typing import Any

import torch

from spd_kernels.launch import uses_triton
from spd_kernels.routed.checks import check_routes
from spd_kernels.routed.reference import project_routed_reference


def project_rows(
    x: torch.Tensor,
    bank: torch.Tensor,
    index: torch.Tensor,
    rows: torch.Tensor | None,
    ranks: torch.Tensor | None,
    a: float,
    b: float,
    implementation: str | None,
) -> torch.Tensor:
    """The kernel or the reference; on the CPU the reference can afford to look whether all indices are in range."""
    if uses_triton(implementation, x.device, x.dtype):
        from spd_kernels.routed.kernel import launch_routed

        return launch_routed(x, bank, index, a, b, rows, ranks)
    if x.device.type == "cpu":
        check_routes(bank, index, rows, ranks)
    return project_routed_reference(x, bank, index, a, b, rows, ranks)


project_routed_op = torch.library.custom_op("spd_kernels::project_routed", project_rows, mutates_args=())


@project_routed_op.register_fake
def _(
    x: torch.Tensor,
    bank: torch.Tensor,
    index: torch.Tensor,
    rows: torch.Tensor | None,
    ranks: torch.Tensor | None,
    a: float,
    b: float,
    implementation: str | None,
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _gradient_of_bank(
    x: torch.Tensor,
    g: torch.Tensor,
    bank: torch.Tensor,
    index: torch.Tensor,
    rows: torch.Tensor | None,
    ranks: torch.Tensor | None,
    b: float,
) -> torch.Tensor:
    """dL/dU_s = b sum (x^T (g U_s) + g^T (x U_s)) over the rows of subspace s, in differentiable products.

    Nothing depends on the indices' values but what is selected, so nothing waits for them. Numbers that do not count
    are replaced, not multiplied, by zero, so that a NaN among them stays away.
    """
    d, r = bank.shape[1:]
    if x.numel() == 0:
        return torch.zeros_like(bank)
    counts = torch.ones((), dtype=torch.bool, device=bank.device)
    if ranks is not None:
        counts = torch.arange(r, device=bank.device) < ranks[:, None, None]  # (S, 1, r)
    used = torch.where(counts, bank, 0.0)
    if rows is None:
        grad = _sum_over_sequences(x.reshape(index.shape[0], -1, d), g.reshape(index.shape[0], -1, d), used, index)
    else:
        flat = rows.reshape(-1)
        known = (flat >= 0) & (flat < index.shape[0])
        # An index of no length has no element to point rows of no sequence at.
        padded = torch.cat((index, index.new_full((1,), -1)))
        subspace = padded[torch.where(known, flat, index.shape[0])]
        grad = _sum_over_rows(x.reshape(-1, d), g.reshape(-1, d), used, subspace)
    return torch.where(counts, b * grad, 0.0).to(bank.dtype)


def _sum_over_sequences(x: torch.Tensor, g: torch.Tensor, bank: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """One product a sequence, x and g (B, T, d), then a sum in fp32 at least over the sequences of a subspace."""
    routed = (index >= 0) & (index < bank.shape[0])
    subspace = torch.where(routed, index, 0)
    u = bank.index_select(0, subspace)
    each = x.mT @ (g @ u) + g.mT @ (x @ u)  # (B, d, r)
    each = torch.where(routed[:, None, None], each, 0.0)
    wide = torch.promote_types(bank.dtype, torch.float32)
    return torch.zeros_like(bank, dtype=wide).index_add(0, subspace, each.to(wide))


def _sum_over_rows(x: torch.Tensor, g: torch.Tensor, bank: torch.Tensor, subspace: torch.Tensor) -> torch.Tensor:
    """One product over all rows a subspace, the rows of the others zero."""
    each = []
    for s, u in enumerate(bank.unbind(0)):
        chosen = (subspace == s)[:, None]
        x_s, g_s = torch.where(chosen, x, 0.0), torch.where(chosen, g, 0.0)
        each.append(x_s.mT @ (g_s @ u) + g_s.mT @ (x_s @ u))
    return torch.stack(each)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, bank, index, rows, ranks, ctx.a, ctx.b, ctx.implementation = inputs
    # dL/dx needs the bank alone: with the bank fixed, x is not kept alive for the backward pass.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, bank, index, rows, ranks)


def _backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, bank, index, rows, ranks = ctx.saved_tensors
    grad_x: torch.Tensor | None = None
    grad_bank: torch.Tensor | None = None
    if ctx.needs_input_grad[0]:
        grad_x = project_routed_op(g, bank, index, rows, ranks, ctx.a, ctx.b, ctx.implementation)
    if ctx.needs_input_grad[1]:
        grad_bank = _gradient_of_bank(x, g, bank, index, rows, ranks, ctx.b)
    return grad_x, grad_bank, None, None, None, None, None, None


project_routed_op.register_autograd(_backward, setup_context=_setup)
