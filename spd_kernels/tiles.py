"""Triton helpers that more than one kernel uses. Importing this module imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

# Read at the moment the kernels are decorated, so that it always tells what they were decorated as.
INTERPRETING: bool = bool(triton.knobs.runtime.interpret)


@triton.jit
def dot(p, q, acc, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p @ q with fp32 accumulation.

    WIDEN is for the interpreter, which multiplies the raw bit patterns of bf16 operands.
    """
    if WIDEN:
        p = p.to(tl.float32)
        q = q.to(tl.float32)
    return tl.dot(p, q, acc, input_precision=PRECISION)


@triton.jit
def row_offsets(rows, inner_rows, stride_outer, stride_inner):
    """int64 element offsets of int32 row numbers over two leading axes, (outer, inner) flattened."""
    return (rows // inner_rows).to(tl.int64) * stride_outer + (rows % inner_rows).to(tl.int64) * stride_inner


@triton.jit
def span(start, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """start .. start + BLOCK - 1; WIDE where such an index times its stride can pass 2^31.

    32-bit offsets halve the registers that addresses take.
    """
    offsets = start + tl.arange(0, BLOCK)
    if WIDE:
        offsets = offsets.to(tl.int64)
    return offsets


@triton.jit
def contract(
    x_rows,
    u_columns,
    mask_n,
    mask_r,
    d,
    stride_xd,
    stride_ud,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CLEAR: tl.constexpr = True,
):
    """x U of a tile of rows and a block of directions, (BLOCK_N, BLOCK_W) in fp32, in steps of BLOCK_K over d.

    x_rows (BLOCK_N, 1) and u_columns (1, BLOCK_W) point at column 0 of the rows and at row 0 of the directions.
    CLEAR makes c zero for missing directions, which those who store c need not ask for.
    """
    c = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        offsets_d = span(start, BLOCK_K, WIDE)
        mask_d = offsets_d < d
        x = tl.load(x_rows + (offsets_d * stride_xd)[None, :], mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        u = tl.load(u_columns + (offsets_d * stride_ud)[:, None], mask=mask_d[:, None] & mask_r[None, :], other=0.0)
        c = dot(x, u, c, WIDEN, PRECISION)
    if CLEAR:  # an infinity in x times the zeros that stand for missing directions is not a number
        c = tl.where(mask_r[None, :], c, 0.0)
    return c


@triton.jit
def expand(
    c,
    x_rows,
    y_rows,
    u_columns,
    mask_n,
    mask_r,
    first,
    last,
    a,
    b,
    stride_xd,
    stride_yd,
    stride_ud,
    HAS_A: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = a x + b c U^T of a tile of rows, columns first .. last - 1, in steps of BLOCK_K; c is of U's type.

    May write where x lies: a column of x is read, if at all, before it is written.
    """
    for start in range(first, last, BLOCK_K):
        offsets_d = span(start, BLOCK_K, WIDE)
        mask_d = offsets_d < last
        mask = mask_n[:, None] & mask_d[None, :]
        u = tl.load(u_columns + (offsets_d * stride_ud)[:, None], mask=mask_d[:, None] & mask_r[None, :], other=0.0)
        y = b * dot(c, tl.trans(u), tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32), WIDEN, PRECISION)
        if HAS_A:
            y += a * tl.load(x_rows + (offsets_d * stride_xd)[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y_rows + (offsets_d * stride_yd)[None, :], y.to(y_rows.dtype.element_ty), mask=mask)
