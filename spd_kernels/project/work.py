"""Bytes and FLOPs of the projections and of their gradients."""

from __future__ import annotations

from spd_kernels.roofline import Work


def project_work(n_rows: int, d: int, rank: int, itemsize: int, *, blend: bool = False, sides: int = 1) -> Work:
    """y = a x + b (x U) U^T: x, U in, y out; two products.

    A blend (a != 0) has the same work: its second read of x is served by the L2 cache.
    """
    side = Work(bytes=itemsize * (2 * n_rows * d + d * rank), flops=4 * n_rows * d * rank)
    return side * sides


def project_backward_work(
    n_rows: int, d: int, rank: int, itemsize: int, *, needs_x: bool = True, needs_u: bool = True, sides: int = 1
) -> Work:
    """dL/dx: g, U in, dL/dx out; two products. dL/dU: x, g, U in, dL/dU out; four products; g U is shared."""
    rows = 1 + needs_x + needs_u
    products = (needs_x or needs_u) + needs_x + 3 * needs_u
    side = Work(bytes=itemsize * (rows * n_rows * d + (1 + needs_u) * d * rank), flops=2 * products * n_rows * d * rank)
    return side * sides
