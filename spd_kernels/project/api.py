"""The public projections."""

from __future__ import annotations

import torch

from spd_kernels.checks import check_in_place, check_pair, check_projection
from spd_kernels.launch import Implementation, needs_operator, uses_triton
from spd_kernels.project.op import (
    overwrite,
    overwrite_kv,
    project_inplace_op,
    project_kv_inplace_op,
    project_kv_op,
    project_op,
)
from spd_kernels.project.reference import project_reference


def project(
    x: torch.Tensor,
    u: torch.Tensor,
    *,
    a: float = 0.0,
    b: float = 1.0,
    implementation: Implementation | None = None,
) -> torch.Tensor:
    """a * x + b * (x @ u) @ u.T, with gradients to x and to u.

    (a, b) = (0, 1) projects onto the columns of an orthonormal u, (1, -1) erases them, (1 - s, s) blends. a = 0 means
    that there is no x term. Double backward works.

    Args:
        x: (..., d), any strides, fp32, fp16 or bf16; fp64 on the reference path. May be empty.
        u: (d, r) with 1 <= r <= d, of x's dtype and on its device. Neither size need be a multiple of anything.
        implementation: "triton", "reference" or "auto" (Triton on a GPU, the reference elsewhere). None takes the
            environment variable SPD_KERNELS_IMPLEMENTATION, else "auto".
    """
    check_projection(x, u)
    # The operator costs the host more than a small projection does: only who needs it pays.
    if torch.compiler.is_compiling():
        return project_op(x, u, float(a), float(b), implementation)
    if not uses_triton(implementation, x.device, x.dtype):
        return project_reference(x, u, a, b)
    if needs_operator(x, u):
        return project_op(x, u, float(a), float(b), implementation)
    from spd_kernels.project.kernel import launch_project

    return launch_project(x, u, float(a), float(b))


def project_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    u_k: torch.Tensor,
    u_v: torch.Tensor,
    *,
    a: float = 0.0,
    b: float = 1.0,
    implementation: Implementation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`project` of keys with u_k and of values with u_v: one launch on a GPU.

    k and v are alike in shape, dtype and device; the ranks of u_k and u_v may differ.
    """
    check_pair(k, v)
    check_projection(k, u_k, "k", "u_k")
    check_projection(v, u_v, "v", "u_v")
    if torch.compiler.is_compiling():
        return project_kv_op(k, v, u_k, u_v, float(a), float(b), implementation)
    if not uses_triton(implementation, k.device, k.dtype):
        return project_reference(k, u_k, a, b), project_reference(v, u_v, a, b)
    if needs_operator(k, v, u_k, u_v):
        return project_kv_op(k, v, u_k, u_v, float(a), float(b), implementation)
    from spd_kernels.project.kernel import launch_project_kv

    return launch_project_kv(k, v, u_k, u_v, float(a), float(b))


def project_(
    x: torch.Tensor,
    u: torch.Tensor,
    *,
    a: float = 0.0,
    b: float = 1.0,
    implementation: Implementation | None = None,
) -> torch.Tensor:
    """`project` that writes over x, whatever its strides, and returns it.

    There are no gradients: while they are on, neither x nor u may need one (ValueError). Nor may elements of x share
    memory, as those of an expanded tensor do (ValueError). u may be a view of x's memory: it is read as it was.
    """
    check_projection(x, u)
    check_in_place(x, (u,))
    if needs_operator(x, u):
        project_inplace_op(x, u, float(a), float(b), implementation)
    else:
        overwrite(x, u, float(a), float(b), implementation)
    return x


def project_kv_(
    k: torch.Tensor,
    v: torch.Tensor,
    u_k: torch.Tensor,
    u_v: torch.Tensor,
    *,
    a: float = 0.0,
    b: float = 1.0,
    implementation: Implementation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`project_kv` that writes over k and v and returns them; see `project_`.

    k and v may be interleaved in one storage, as slices of a fused projection are, but share no element (ValueError).
    """
    check_pair(k, v)
    check_projection(k, u_k, "k", "u_k")
    check_projection(v, u_v, "v", "u_v")
    check_in_place(k, (u_k, u_v), "k")
    check_in_place(v, (u_k, u_v), "v")
    if needs_operator(k, v, u_k, u_v):
        project_kv_inplace_op(k, v, u_k, u_v, float(a), float(b), implementation)
    else:
        overwrite_kv(k, v, u_k, u_v, float(a), float(b), implementation)
    return k, v
