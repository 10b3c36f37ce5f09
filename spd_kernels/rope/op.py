"""The projected and rotated keys as PyTorch operators: fake, CPU and GPU implementations, autograd.

The operator gives a gradient to k alone; `api` composes other operations where anything else needs one.
"""

from __future__ import annotations

from typing import Any

import torch

from spd_kernels.launch import uses_triton
from spd_kernels.project.op import project_op
from spd_kernels.project.reference import project_reference
from spd_kernels.rope.config import MAX_HEAD_DIM
from spd_kernels.rope.reference import project_rope_reference, pull_back, store


def keys(
    k: torch.Tensor,
    u: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    interleaved: bool,
    implementation: str | None,
) -> torch.Tensor:
    """The keys as a new tensor, by the kernel or by the reference."""
    if uses_triton(implementation, k.device, k.dtype) and head_dim <= MAX_HEAD_DIM:
        from spd_kernels.rope.kernel import launch_rope

        return launch_rope(k, u, cos, sin, head_dim, norm_weight, eps, interleaved)
    return project_rope_reference(k, u, cos, sin, head_dim, norm_weight, eps, interleaved)


def store_keys(
    k: torch.Tensor,
    u: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cache: torch.Tensor,
    positions: torch.Tensor,
    head_dim: int,
    eps: float,
    interleaved: bool,
    implementation: str | None,
) -> None:
    """The keys into the cache, by the kernel or by the reference."""
    if uses_triton(implementation, k.device, k.dtype):
        from spd_kernels.rope.kernel import launch_rope

        if head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim: expected at most {MAX_HEAD_DIM} for the kernel with a cache; got {head_dim}")
        launch_rope(k, u, cos, sin, head_dim, norm_weight, eps, interleaved, cache=cache, positions=positions)
    else:
        store(project_rope_reference(k, u, cos, sin, head_dim, norm_weight, eps, interleaved), cache, positions)


def gradient_of_keys(
    g: torch.Tensor,
    k: torch.Tensor | None,
    u: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm_weight: torch.Tensor | None,
    head_dim: int,
    eps: float,
    interleaved: bool,
    implementation: str | None,
) -> torch.Tensor:
    """dL/dk = (h U) U^T with h = N'(R^T g); k is needed only where there is a norm."""
    if uses_triton(implementation, g.device, g.dtype) and head_dim <= MAX_HEAD_DIM:
        from spd_kernels.project.kernel import launch_project
        from spd_kernels.rope.kernel import launch_pull_back

        p = None if k is None else launch_project(k, u, 0.0, 1.0)
        h = launch_pull_back(g, p, cos, sin, head_dim, norm_weight, eps, interleaved, out=p)
        return launch_project(h, u, 0.0, 1.0)
    p = None if k is None else project_reference(k, u)
    h = pull_back(g, p, cos, sin, head_dim, norm_weight, eps, interleaved)
    return project_reference(h, u).contiguous()


project_rope_op = torch.library.custom_op("spd_kernels::project_rope", keys, mutates_args=())
project_rope_store_op = torch.library.custom_op("spd_kernels::project_rope_store", store_keys, mutates_args=("cache",))
project_rope_gradient_op = torch.library.custom_op(
    "spd_kernels::project_rope_gradient", gradient_of_keys, mutates_args=()
)


@project_rope_op.register_fake
def _(k: torch.Tensor, *_: Any) -> torch.Tensor:
    return k.new_empty(k.shape)


@project_rope_store_op.register_fake
def _(*_: Any) -> None:
    return None


@project_rope_gradient_op.register_fake
def _(g: torch.Tensor, *_: Any) -> torch.Tensor:
    return g.new_empty(g.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    k, u, cos, sin, norm_weight, *ctx.rest = inputs
    if any(ctx.needs_input_grad[1:5]):
        raise RuntimeError(
            "torch.ops.spd_kernels.project_rope gives a gradient to k alone; "
            "spd_kernels.project_rope gives one to u, cos, sin and norm_weight too"
        )
    # Without a norm the gradient does not depend on k, which is then not kept alive for the backward pass.
    ctx.save_for_backward(None if norm_weight is None else k, u, cos, sin, norm_weight)


def _backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    k, u, cos, sin, norm_weight = ctx.saved_tensors
    head_dim, eps, interleaved, implementation = ctx.rest
    if torch.is_grad_enabled():  # a second backward may follow: operations that have one
        p = None if k is None else project_op(k, u, 0.0, 1.0, implementation)
        h = pull_back(g, p, cos, sin, head_dim, norm_weight, eps, interleaved)
        grad = project_op(h, u, 0.0, 1.0, implementation)
    else:
        grad = project_rope_gradient_op(g, k, u, cos, sin, norm_weight, *ctx.rest)
    return (grad, *(None,) * 8)


project_rope_op.register_autograd(_backward, setup_context=_setup)
