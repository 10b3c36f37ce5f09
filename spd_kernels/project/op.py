"""The projections as PyTorch operators: fake, CPU and GPU implementations, autograd.

The operators are what torch.compile sees. Which implementation runs is settled when they run, not when they are traced.
"""

from __future__ import annotations

from typing import Any

import torch

from spd_kernels.launch import uses_triton
from spd_kernels.project.reference import project_reference


@torch.library.custom_op("spd_kernels::project", mutates_args=())
def project_op(x: torch.Tensor, u: torch.Tensor, a: float, b: float, implementation: str | None) -> torch.Tensor:
    if uses_triton(implementation, x.device, x.dtype):
        from spd_kernels.project.kernel import launch_project

        return launch_project(x, u, a, b)
    return project_reference(x, u, a, b).contiguous()


@torch.library.custom_op("spd_kernels::project_kv", mutates_args=())
def project_kv_op(
    k: torch.Tensor,
    v: torch.Tensor,
    u_k: torch.Tensor,
    u_v: torch.Tensor,
    a: float,
    b: float,
    implementation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if uses_triton(implementation, k.device, k.dtype):
        from spd_kernels.project.kernel import launch_project_kv

        return launch_project_kv(k, v, u_k, u_v, a, b)
    return project_reference(k, u_k, a, b).contiguous(), project_reference(v, u_v, a, b).contiguous()


@project_op.register_fake
def _(x: torch.Tensor, u: torch.Tensor, a: float, b: float, implementation: str | None) -> torch.Tensor:
    return x.new_empty(x.shape)


@project_kv_op.register_fake
def _(
    k: torch.Tensor,
    v: torch.Tensor,
    u_k: torch.Tensor,
    u_v: torch.Tensor,
    a: float,
    b: float,
    implementation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


def _grad_u(x: torch.Tensor, g: torch.Tensor, u: torch.Tensor, b: float) -> torch.Tensor:
    """dL/dU = b (x^T (g U) + g^T (x U)), the two products rounded as the eager formula rounds them."""
    rows_x, rows_g = x.flatten(0, -2) if x.dim() > 1 else x[None], g.flatten(0, -2) if g.dim() > 1 else g[None]
    return b * (rows_x.mT @ (rows_g @ u) + rows_g.mT @ (rows_x @ u))


def _project_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, u, ctx.a, ctx.b, ctx.implementation = inputs
    # dL/dx needs U alone: with U fixed, x is not kept alive for the backward pass.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, u)


def _project_backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, u = ctx.saved_tensors
    grad_x = project_op(g, u, ctx.a, ctx.b, ctx.implementation) if ctx.needs_input_grad[0] else None
    grad_u = _grad_u(x, g, u, ctx.b) if ctx.needs_input_grad[1] else None
    return grad_x, grad_u, None, None, None


def _project_kv_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    k, v, u_k, u_v, ctx.a, ctx.b, ctx.implementation = inputs
    needs_u_k, needs_u_v = ctx.needs_input_grad[2:4]
    ctx.save_for_backward(k if needs_u_k else None, v if needs_u_v else None, u_k, u_v)


def _project_kv_backward(ctx: Any, g_k: torch.Tensor, g_v: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    k, v, u_k, u_v = ctx.saved_tensors
    needs_k, needs_v, needs_u_k, needs_u_v = ctx.needs_input_grad[:4]
    a, b, implementation = ctx.a, ctx.b, ctx.implementation
    grad_k: torch.Tensor | None = None
    grad_v: torch.Tensor | None = None
    if needs_k and needs_v:
        grad_k, grad_v = project_kv_op(g_k, g_v, u_k, u_v, a, b, implementation)
    elif needs_k:
        grad_k = project_op(g_k, u_k, a, b, implementation)
    elif needs_v:
        grad_v = project_op(g_v, u_v, a, b, implementation)
    grad_u_k = _grad_u(k, g_k, u_k, b) if needs_u_k else None
    grad_u_v = _grad_u(v, g_v, u_v, b) if needs_u_v else None
    return grad_k, grad_v, grad_u_k, grad_u_v, None, None, None


project_op.register_autograd(_project_backward, setup_context=_project_setup)
project_kv_op.register_autograd(_project_kv_backward, setup_context=_project_kv_setup)
