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
