"""Column sums and Gram matrix of 16-bit rows.

    sum_s = sum_n g_n          gram_s = sum_n g_n g_n^T          n over the rows of split s

Products of two 16-bit numbers are exact in fp32, so that only the summation rounds; splits are short, and their sums
are added in fp64. One program sums one tile of the upper triangle of one split. See csrc_notes/covariance.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spd_kernels import launch, tiles
from spd_kernels.covariance.config import MAX_ROWS_PER_SPLIT, PARTIAL_BYTES, choose, rows_per_split
from spd_kernels.tiles import dot, row_offsets, span


@triton.jit
def moments_kernel(
    g_ptr,
    mask_ptr,
    sum_ptr,
    gram_ptr,
    first_row,
    n_rows,
    rows_per_split,
    d,
    inner_rows,
    stride_go,
    stride_gi,
    stride_gd,
    HAS_MASK: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile_i = tl.program_id(0)
    tile_j = tl.program_id(1)
    split = tl.program_id(2)
    if tile_j < tile_i:
        return
    offsets_i = span(tile_i * BLOCK_D, BLOCK_D, WIDE)
    offsets_j = span(tile_j * BLOCK_D, BLOCK_D, WIDE)
    mask_i = offsets_i < d
    mask_j = offsets_j < d
    start = first_row + split * rows_per_split
    end = tl.minimum(start + rows_per_split, n_rows)

    sums = tl.zeros((BLOCK_D,), dtype=tl.float32)
    gram = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    for start_n in range(start, end, BLOCK_N):
        rows = start_n + tl.arange(0, BLOCK_N)
        mask_n = rows < end
        if HAS_MASK:
            mask_n = mask_n & (tl.load(mask_ptr + rows, mask=mask_n, other=0) != 0)
        g_rows = g_ptr + row_offsets(rows, inner_rows, stride_go, stride_gi)[:, None]
        g_i = tl.load(g_rows + (offsets_i * stride_gd)[None, :], mask=mask_n[:, None] & mask_i[None, :], other=0.0)
        g_j = tl.load(g_rows + (offsets_j * stride_gd)[None, :], mask=mask_n[:, None] & mask_j[None, :], other=0.0)
        gram = dot(tl.trans(g_i), g_j, gram, WIDEN, PRECISION)
        if tile_i == tile_j:
            sums += tl.sum(g_i.to(tl.float32), axis=0)

    columns_i = tile_i * BLOCK_D + tl.arange(0, BLOCK_D)
    columns_j = tile_j * BLOCK_D + tl.arange(0, BLOCK_D)
    if tile_i == tile_j:
        tl.store(sum_ptr + split * d + columns_i, sums, mask=mask_i)
    gram_rows = gram_ptr + (split.to(tl.int64) * d + columns_i) * d
    tl.store(gram_rows[:, None] + columns_j[None, :], gram, mask=mask_i[:, None] & mask_j[None, :])


# Row numbers are 32-bit; the third axis of a CUDA grid is 16-bit.
_MAX_ROWS = 2**31 - 2 * MAX_ROWS_PER_SPLIT
_MAX_SPLITS = 65535


def launch_moments(
    g: torch.Tensor,
    mask: torch.Tensor | None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Column sums (d,) and Gram matrix (d, d) of the kept rows of g (..., d), both fp64.

    Of the Gram matrix only the upper triangle means anything. `out` replaces the fp32 partial sums' allocation: two
    tensors of at least (splits, d) and (splits, d, d).
    """
    d = g.shape[-1]
    n_rows = g.numel() // d
    sums = torch.zeros(d, dtype=torch.float64, device=g.device)
    gram = torch.zeros((d, d), dtype=torch.float64, device=g.device)
    if n_rows == 0:
        return sums, gram
    if n_rows > _MAX_ROWS:
        raise ValueError(f"g: expected at most {_MAX_ROWS} rows; got {n_rows}")

    config = choose(d, launch.architecture(g.device))
    split_rows = rows_per_split(n_rows, d, config.block_d, launch.processors(g.device))
    splits = min(triton.cdiv(n_rows, split_rows), max(1, PARTIAL_BYTES // (4 * d * d)), _MAX_SPLITS)
    if out is None:
        partial_sums = torch.empty((splits, d), dtype=torch.float32, device=g.device)
        partial_grams = torch.empty((splits, d, d), dtype=torch.float32, device=g.device)
    else:
        partial_sums, partial_grams = out
    rows, inner_rows, stride_o, stride_i = launch.flatten_rows(g)
    keep = rows if mask is None else mask.reshape(-1).view(torch.uint8)
    grid_side = triton.cdiv(d, config.block_d)
    stride_d = rows.stride(-1)
    with launch.guard(g.device):
        for first_row in range(0, n_rows, splits * split_rows):
            used = min(splits, triton.cdiv(n_rows - first_row, split_rows))
            moments_kernel[(grid_side, grid_side, used)](
                rows,
                keep,
                partial_sums,
                partial_grams,
                first_row,
                n_rows,
                split_rows,
                d,
                inner_rows,
                stride_o,
                stride_i,
                stride_d,
                HAS_MASK=mask is not None,
                WIDEN=tiles.INTERPRETING and g.dtype is torch.bfloat16,
                PRECISION="ieee",
                WIDE=(d + config.block_d) * stride_d >= 2**31,
                BLOCK_N=config.block_n,
                BLOCK_D=config.block_d,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
            sums += partial_sums[:used].sum(0, dtype=torch.float64)
            gram += partial_grams[:used].sum(0, dtype=torch.float64)
    return sums, gram
