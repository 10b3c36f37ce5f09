"""The projections as PyTorch operators: fake, CPU and GPU implementations, autograd.

The operators are what torch.compile sees. Which implementation runs is settled when they run, not when they are traced.
"""

from __future__ import annotations

from typing import Any

import torch

from spd_kernels.checks import check_apart, share_memory
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


def overwrite(x: torch.Tensor, u: torch.Tensor, a: float, b: float, implementation: str | None) -> None:
    """The projection of x into x."""
    if share_memory(x, u):
        u = u.clone()
    if uses_triton(implementation, x.device, x.dtype):
        from spd_kernels.project.kernel import launch_project

        launch_project(x, u, a, b, out=x)
        torch.autograd.graph.increment_version(x)  # or autograd would not see that what it kept has changed
    else:
        x.copy_(project_reference(x, u, a, b))


def overwrite_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    u_k: torch.Tensor,
    u_v: torch.Tensor,
    a: float,
    b: float,
    implementation: str | None,
) -> None:
    """The projections of k and v into k and v."""
    check_apart(k, v)
    if any([share_memory(x, u) for x in (k, v) for u in (u_k, u_v)]):
        u_k, u_v = u_k.clone(), u_v.clone()
    if uses_triton(implementation, k.device, k.dtype):
        from spd_kernels.project.kernel import launch_project_kv

        launch_project_kv(k, v, u_k, u_v, a, b, out=(k, v))
        torch.autograd.graph.increment_version((k, v))
    else:
        k.copy_(project_reference(k, u_k, a, b))
        v.copy_(project_reference(v, u_v, a, b))


project_inplace_op = torch.library.custom_op("spd_kernels::project_", overwrite, mutates_args=("x",))
project_kv_inplace_op = torch.library.custom_op("spd_kernels::project_kv_", overwrite_kv, mutates_args=("k", "v"))


@torch.library.custom_op("spd_kernels::project_gradient", mutates_args=())
def project_gradient_op(
    x: torch.Tensor, g: torch.Tensor, u: torch.Tensor, a: float, b: float, needs_x: bool, implementation: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/dx, empty unless asked for, and dL/dU."""
    if uses_triton(implementation, g.device, g.dtype):
        from spd_kernels.project.gradient import launch_gradient

        ((grad_x, grad_u),) = launch_gradient(((x, g, u),), a, b, needs_x)
    else:
        grad_x = project_reference(g, u, a, b).contiguous() if needs_x else None
        grad_u = gradient_of_basis(x, g, u, b)
    return g.new_empty(0) if grad_x is None else grad_x, grad_u


@project_gradient_op.register_fake
def _(
    x: torch.Tensor, g: torch.Tensor, u: torch.Tensor, a: float, b: float, needs_x: bool, implementation: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return g.new_empty(g.shape if needs_x else 0), u.new_empty(u.shape)


@torch.library.custom_op("spd_kernels::project_kv_gradient", mutates_args=())
def project_kv_gradient_op(
    k: torch.Tensor,
    v: torch.Tensor,
    g_k: torch.Tensor,
    g_v: torch.Tensor,
    u_k: torch.Tensor,
    u_v: torch.Tensor,
    a: float,
    b: float,
    implementation: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dL/dk, dL/dv, dL/dU_k, dL/dU_v."""
    sides = ((k, g_k, u_k), (v, g_v, u_v))
    if uses_triton(implementation, g_k.device, g_k.dtype):
        from spd_kernels.project.gradient import launch_gradient

        (grad_k, grad_u_k), (grad_v, grad_u_v) = launch_gradient(sides, a, b, True)
        assert grad_k is not None and grad_v is not None
        return grad_k, grad_v, grad_u_k, grad_u_v
    grad_k, grad_v = (project_reference(g, u, a, b).contiguous() for _, g, u in sides)
    grad_u_k, grad_u_v = (gradient_of_basis(x, g, u, b) for x, g, u in sides)
    return grad_k, grad_v, grad_u_k, grad_u_v


@project_kv_gradient_op.register_fake
def _(
    k: torch.Tensor,
    v: torch.Tensor,
    g_k: torch.Tensor,
    g_v: torch.Tensor,
    u_k: torch.Tensor,
    u_v: torch.Tensor,
    a: float,
    b: float,
    implementation: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        g_k.new_empty(g_k.shape),
        g_v.new_empty(g_v.shape),
        u_k.new_empty(u_k.shape),
        u_v.new_empty(u_v.shape),
    )


def gradient_of_basis(x: torch.Tensor, g: torch.Tensor, u: torch.Tensor, b: float) -> torch.Tensor:
    """dL/dU = b (x^T (g U) + g^T (x U)), the two products rounded as the eager formula rounds them."""
    rows_x, rows_g = x.flatten(0, -2) if x.dim() > 1 else x[None], g.flatten(0, -2) if g.dim() > 1 else g[None]
    return b * (rows_x.mT @ (rows_g @ u) + rows_g.mT @ (rows_x @ u))


def _gradients(
    x: torch.Tensor | None,
    g: torch.Tensor,
    u: torch.Tensor,
    a: float,
    b: float,
    implementation: str | None,
    needs_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dL/dx and, where x was kept, dL/dU; made of differentiable operations when a second backward may follow."""
    if x is None:
        return (project_op(g, u, a, b, implementation) if needs_x else None), None
    if torch.is_grad_enabled():
        grad_x = project_op(g, u, a, b, implementation) if needs_x else None
        return grad_x, gradient_of_basis(x, g, u, b)
    made_x, grad_u = project_gradient_op(x, g, u, a, b, needs_x, implementation)
    return (made_x if needs_x else None), grad_u


def _project_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, u, ctx.a, ctx.b, ctx.implementation = inputs
    # dL/dx needs U alone: with U fixed, x is not kept alive for the backward pass.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, u)


def _project_backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, u = ctx.saved_tensors
    grad_x, grad_u = _gradients(x, g, u, ctx.a, ctx.b, ctx.implementation, ctx.needs_input_grad[0])
    return grad_x, grad_u, None, None, None


def _project_kv_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    k, v, u_k, u_v, ctx.a, ctx.b, ctx.implementation = inputs
    needs_u_k, needs_u_v = ctx.needs_input_grad[2:4]
    ctx.save_for_backward(k if needs_u_k else None, v if needs_u_v else None, u_k, u_v)


def _project_kv_backward(ctx: Any, g_k: torch.Tensor, g_v: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    k, v, u_k, u_v = ctx.saved_tensors
    needs_k, needs_v, needs_u_k, needs_u_v = ctx.needs_input_grad[:4]
    rest = (ctx.a, ctx.b, ctx.implementation)
    if needs_k and needs_v and not (needs_u_k or needs_u_v):
        return (*project_kv_op(g_k, g_v, u_k, u_v, *rest), None, None, None, None, None)
    if needs_k and needs_v and needs_u_k and needs_u_v and not torch.is_grad_enabled():
        return (*project_kv_gradient_op(k, v, g_k, g_v, u_k, u_v, *rest), None, None, None)
    grad_k, grad_u_k = _gradients(k, g_k, u_k, *rest, needs_k)
    grad_v, grad_u_v = _gradients(v, g_v, u_v, *rest, needs_v)
    return grad_k, grad_v, grad_u_k, grad_u_v, None, None, None


project_op.register_autograd(_project_backward, setup_context=_project_setup)
project_kv_op.register_autograd(_project_kv_backward, setup_context=_project_kv_setup)
