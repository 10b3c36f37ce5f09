"""Number, mean and centred sum of squares of 16-bit rows, added to accumulators.

    s = sum_n g_n        gram = sum_n g_n g_n^T        C' = gram - s s^T / n                   of the rows n given
    m += (s/n - m) n/(N+n)        C += C' + Nn/(N+n) (s/n - m)(s/n - m)^T        N += n        (Chan's update)

Products of two 16-bit numbers are exact in fp32, so that only the summation rounds. `moments_kernel` sums one tile of
the upper triangle over one split of the rows; `mean_kernel` adds the splits' column sums and moves the mean;
`merge_kernel` adds the splits' tiles, takes out the mean and adds to C. The last two work in fp64, in a fixed order.
All three serve several sites (accumulators of one width, rows of one layout) in one launch.
See csrc_notes/covariance.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from spd_kernels import launch, tiles
from spd_kernels.covariance.config import (
    CHUNK_ROWS,
    COUNT_COLUMNS,
    FEW_SPLITS,
    MANY_SPLITS,
    MAX_ROWS_PER_SPLIT,
    MEAN_COLUMNS,
    MEAN_SPLITS,
    MERGE_ELEMENTS,
    MERGE_WARPS,
    PARTIAL_BYTES,
    SITES,
    MomentsConfig,
    choose,
    splits_of,
)
from spd_kernels.tiles import dot, row_offsets, span

# An accumulator's count (), mean (d,) and upper triangle of C (d, d): fp64, contiguous, updated in place.
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit
def _pick(site, p_0, p_1, p_2, p_3):
    """The site's pointer: selected, not branched on, so that the program's code is there once."""
    return tl.where(site == 0, p_0, tl.where(site == 1, p_1, tl.where(site == 2, p_2, p_3)))


@triton.jit
def _triangle(tile):
    """Row and column, row <= column, of a tile of the upper triangle, numbered column by column."""
    column = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded.
    column = tl.where(column * (column + 1) // 2 > tile, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= tile, column + 1, column)
    return tile - column * (column + 1) // 2, column


@triton.jit
def _rows(
    mask_ptr,
    start_n,
    end,
    inner_rows,
    stride_go,
    stride_gi,
    HAS_MASK: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Offsets of rows, (BLOCK_N,), and which of them count."""
    rows = start_n + tl.arange(0, BLOCK_N)
    keep = rows < end
    if HAS_MASK:
        keep = keep & (tl.load(mask_ptr + rows, mask=keep, other=0) != 0)
    if FLAT:  # spares a division for every row
        return rows.to(tl.int64) * stride_gi, keep
    return row_offsets(rows, inner_rows, stride_go, stride_gi), keep


@triton.jit
def moments_kernel(
    g_0_ptr,
    g_1_ptr,
    g_2_ptr,
    g_3_ptr,
    mask_0_ptr,
    mask_1_ptr,
    mask_2_ptr,
    mask_3_ptr,
    sum_ptr,
    gram_ptr,
    first_row,
    last_row,
    rows_per_split,
    d,
    stride_sum,
    inner_rows,
    stride_go,
    stride_gi,
    stride_gd,
    HAS_MASK: tl.constexpr,
    FLAT: tl.constexpr,
    SINGLE: tl.constexpr,
    ONCE: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COUNT: tl.constexpr,
):
    """SINGLE: one tile holds all of d, so that no program needs two panels of columns. ONCE: a program on the diagonal
    loads its panel once for both operands."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    site = tl.program_id(2)
    partial = (site * tl.num_programs(1) + split).to(tl.int64)
    g_ptr = _pick(site, g_0_ptr, g_1_ptr, g_2_ptr, g_3_ptr)
    mask_ptr = _pick(site, mask_0_ptr, mask_1_ptr, mask_2_ptr, mask_3_ptr)
    tile_i, tile_j = _triangle(tile)
    offsets_i = span(tile_i * BLOCK_D, BLOCK_D, WIDE)
    offsets_j = span(tile_j * BLOCK_D, BLOCK_D, WIDE)
    mask_i = offsets_i < d
    mask_j = offsets_j < d
    # The left operand is addressed as its transpose: a transposition of the loaded tile would keep sm_80 from copying
    # it asynchronously.
    g_i_ptr = g_ptr + (offsets_i * stride_gd)[:, None]  # (BLOCK_D, 1)
    g_j_ptr = g_ptr + (offsets_j * stride_gd)[None, :]  # (1, BLOCK_D)
    start = first_row + split * rows_per_split
    end = tl.minimum(start + rows_per_split, last_row)

    # Two levels of fp32: a chunk's sum is rounded as often as the matrix unit adds to it, the total once a chunk.
    # Emptying one accumulator inside a single loop would serialise Hopper's matrix instructions.
    total = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    sums = tl.zeros((BLOCK_D,), dtype=tl.float32)
    count = 0
    for chunk in range(start, end, CHUNK_N):
        chunk_end = tl.minimum(chunk + CHUNK_N, end)
        if HAS_MASK:
            rows = chunk + tl.arange(0, CHUNK_N)
            kept = tl.sum((tl.load(mask_ptr + rows, mask=rows < chunk_end, other=0) != 0).to(tl.int32), axis=0)
            count += kept
            chunk_end = tl.where(kept > 0, chunk_end, chunk)
        else:
            count += chunk_end - chunk
        gram = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
        if SINGLE or tile_i == tile_j:
            # Summed over the block's rows once a chunk: element by element within it.
            column = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
            for start_n in range(chunk, chunk_end, BLOCK_N):
                offsets_n, keep = _rows(
                    mask_ptr, start_n, chunk_end, inner_rows, stride_go, stride_gi, HAS_MASK, FLAT, BLOCK_N
                )
                g = tl.load(g_j_ptr + offsets_n[:, None], mask=keep[:, None] & mask_j[None, :], other=0.0)
                if ONCE:
                    g_t = tl.trans(g)
                else:
                    g_t = tl.load(g_i_ptr + offsets_n[None, :], mask=mask_i[:, None] & keep[None, :], other=0.0)
                gram = dot(g_t, g, gram, WIDEN, PRECISION)
                column += g.to(tl.float32)
            sums += tl.sum(column, axis=0)
        else:
            for start_n in range(chunk, chunk_end, BLOCK_N):
                offsets_n, keep = _rows(
                    mask_ptr, start_n, chunk_end, inner_rows, stride_go, stride_gi, HAS_MASK, FLAT, BLOCK_N
                )
                g_i = tl.load(g_i_ptr + offsets_n[None, :], mask=mask_i[:, None] & keep[None, :], other=0.0)
                g_j = tl.load(g_j_ptr + offsets_n[:, None], mask=keep[:, None] & mask_j[None, :], other=0.0)
                gram = dot(g_i, g_j, gram, WIDEN, PRECISION)
        total += gram

    # Whole tiles and whole blocks of columns, so that nothing is masked; a column behind them counts the rows.
    side = tl.arange(0, BLOCK_D)
    if SINGLE or tile_i == tile_j:
        tl.store(sum_ptr + partial * stride_sum + tile_i * BLOCK_D + side, sums)
        if tile == 0:
            tl.store(sum_ptr + partial * stride_sum + stride_sum - COUNT, tl.cast(count, tl.float32))
    tile_ptr = gram_ptr + (partial * tl.num_programs(0) + tile) * (BLOCK_D * BLOCK_D)
    tl.store(tile_ptr + side[:, None] * BLOCK_D + side[None, :], total)


@triton.jit
def mean_kernel(
    sum_ptr,
    stage_ptr,
    count_0_ptr,
    count_1_ptr,
    count_2_ptr,
    count_3_ptr,
    mean_0_ptr,
    mean_1_ptr,
    mean_2_ptr,
    mean_3_ptr,
    splits,
    d,
    stride_sum,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Moves the mean; stages what `merge_kernel` needs: s / sqrt(n), sqrt(Nn / (N + n)) delta, and n."""
    site = tl.program_id(1)
    count_ptr = _pick(site, count_0_ptr, count_1_ptr, count_2_ptr, count_3_ptr)
    mean_ptr = _pick(site, mean_0_ptr, mean_1_ptr, mean_2_ptr, mean_3_ptr)
    stage_ptr += site * (2 * d + 1)
    offsets_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offsets_d < d
    sums = tl.zeros((BLOCK_D,), dtype=tl.float64)
    n = tl.zeros((), dtype=tl.float64)
    for first in range(0, splits, BLOCK_S):
        offsets_s = first + tl.arange(0, BLOCK_S)
        mask_s = offsets_s < splits
        rows = sum_ptr + (site * splits + offsets_s) * stride_sum
        part = tl.load(rows[:, None] + offsets_d[None, :], mask=mask_s[:, None], other=0.0)
        sums += tl.sum(part.to(tl.float64), axis=0)
        n += tl.sum(tl.load(rows + stride_sum - COUNT, mask=mask_s, other=0.0).to(tl.float64), axis=0)

    before = tl.load(count_ptr)
    mean = tl.load(mean_ptr + offsets_d, mask=mask_d, other=0.0)
    some = tl.maximum(n, 1.0)
    share = n / tl.maximum(before + n, 1.0)
    delta = sums / some - mean
    tl.store(mean_ptr + offsets_d, mean + delta * share, mask=mask_d)
    tl.store(stage_ptr + offsets_d, sums / tl.sqrt(some), mask=mask_d)
    tl.store(stage_ptr + d + offsets_d, delta * tl.sqrt(before * share), mask=mask_d)
    if tl.program_id(0) == 0:
        tl.store(stage_ptr + 2 * d, n)


@triton.jit
def merge_kernel(
    gram_ptr,
    stage_ptr,
    count_0_ptr,
    count_1_ptr,
    count_2_ptr,
    count_3_ptr,
    scatter_0_ptr,
    scatter_1_ptr,
    scatter_2_ptr,
    scatter_3_ptr,
    splits,
    tiles_of,
    d,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program adds BLOCK_E neighbouring elements of a tile over all splits."""
    SLICES: tl.constexpr = BLOCK_D * BLOCK_D // BLOCK_E
    site = tl.program_id(1)
    tile = tl.program_id(0) // SLICES
    count_ptr = _pick(site, count_0_ptr, count_1_ptr, count_2_ptr, count_3_ptr)
    scatter_ptr = _pick(site, scatter_0_ptr, scatter_1_ptr, scatter_2_ptr, scatter_3_ptr)
    stage_ptr += site * (2 * d + 1)
    tile_i, tile_j = _triangle(tile)
    elements = (tl.program_id(0) % SLICES) * BLOCK_E + tl.arange(0, BLOCK_E)
    rows = tile_i * BLOCK_D + elements // BLOCK_D
    columns = tile_j * BLOCK_D + elements % BLOCK_D
    mask = (rows <= columns) & (columns < d)

    gram = tl.zeros((BLOCK_E,), dtype=tl.float64)
    for first in range(0, splits, BLOCK_S):
        offsets_s = first + tl.arange(0, BLOCK_S)
        partials = ((site * splits + offsets_s).to(tl.int64) * tiles_of + tile) * (BLOCK_D * BLOCK_D)
        part = tl.load(gram_ptr + partials[:, None] + elements[None, :], mask=(offsets_s < splits)[:, None], other=0.0)
        gram += tl.sum(part.to(tl.float64), axis=0)

    gram -= tl.load(stage_ptr + rows, mask=mask, other=0.0) * tl.load(stage_ptr + columns, mask=mask, other=0.0)
    gram += tl.load(stage_ptr + d + rows, mask=mask, other=0.0) * tl.load(stage_ptr + d + columns, mask=mask, other=0.0)
    scatter = scatter_ptr + rows.to(tl.int64) * d + columns
    tl.store(scatter, tl.load(scatter, mask=mask, other=0.0) + gram, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(count_ptr, tl.load(count_ptr) + tl.load(stage_ptr + 2 * d))


# Row numbers are 32-bit.
_MAX_ROWS = 2**31 - 2 * MAX_ROWS_PER_SPLIT


def launch_moments(
    g: torch.Tensor,
    mask: torch.Tensor | None = None,
    out: State | None = None,
    config: MomentsConfig | None = None,
    partials: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> State:
    """Adds the kept rows of g (..., d) to `out`, or to zeros: count, mean and C, of which the upper triangle counts.

    `config` replaces the frozen choice, `partials` the allocation of the splits' sums (see `partial_shapes`).
    """
    if out is None:
        count, mean, scatter = (
            torch.zeros(shape, dtype=torch.float64, device=g.device) for shape in ((), g.shape[-1:], 2 * g.shape[-1:])
        )
        out = (count, mean, scatter)
    launch_sites([out], [g], [mask], config, partials)
    return out


def launch_sites(
    states: Sequence[State],
    gradients: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    config: MomentsConfig | None = None,
    partials: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Adds the kept rows of each gradient to its own state, in as few launches as devices and layouts allow."""
    for g in gradients:
        if g.numel() // g.shape[-1] > _MAX_ROWS:
            raise ValueError(f"g: expected at most {_MAX_ROWS} rows; got {g.numel() // g.shape[-1]}")
    for group in _groups(states, gradients, masks):
        _launch_group(group, config, partials)


# A state, the tensor that holds its rows, and its mask as one row of bytes.
_Site = tuple[State, torch.Tensor, torch.Tensor | None]
# Width, rows, rows of the inner axis, strides of the outer, the inner and the last axis.
_Layout = tuple[int, int, int, int, int, int]


def _groups(
    states: Sequence[State], gradients: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
) -> Iterator[tuple[_Layout, list[_Site]]]:
    """Sites that one launch serves: alike in device, type, layout and having a mask, no state twice."""
    groups: list[tuple[object, _Layout, list[_Site]]] = []
    for state, g, mask in zip(states, gradients, masks, strict=True):
        if g.numel() == 0:
            continue
        rows, inner_rows, stride_o, stride_i = launch.flatten_rows(g)
        layout = (g.shape[-1], g.numel() // g.shape[-1], inner_rows, stride_o, stride_i, rows.stride(-1))
        keep = None if mask is None else mask.reshape(-1).view(torch.uint8)
        key = (g.device, g.dtype, mask is None, layout)
        for other, _, sites in groups:
            if other == key and len(sites) < SITES and all(state[0] is not taken[0] for taken, _, _ in sites):
                sites.append((state, rows, keep))
                break
        else:
            groups.append((key, layout, [(state, rows, keep)]))
    return ((layout, sites) for _, layout, sites in groups)


def partial_shapes(sites: int, splits: int, d: int, block_d: int) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """Shapes of the splits' sums: columns, padded to whole blocks, with the number of rows behind them; tiles."""
    side = triton.cdiv(d, block_d)
    return (sites, splits, side * block_d + COUNT_COLUMNS), (sites, splits, side * (side + 1) // 2, block_d, block_d)


def _launch_group(
    group: tuple[_Layout, list[_Site]],
    config: MomentsConfig | None,
    partials: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    (d, n_rows, inner_rows, stride_o, stride_i, stride_d), sites = group
    g = sites[0][1]
    if config is None:
        config = choose(d, launch.architecture(g.device))
    side = triton.cdiv(d, config.block_d)
    triangle = side * (side + 1) // 2
    splits = splits_of(n_rows, triangle * len(sites), config, launch.processors(g.device))
    split_rows = triton.cdiv(triton.cdiv(n_rows, splits), config.block_n) * config.block_n
    split_rows = min(split_rows, MAX_ROWS_PER_SPLIT)
    tile_bytes = 4 * config.block_d**2 * triangle * len(sites)
    splits = min(splits, triton.cdiv(n_rows, split_rows), max(1, PARTIAL_BYTES // tile_bytes))

    if partials is None:
        shapes = partial_shapes(len(sites), splits, d, config.block_d)
        sums, grams = (torch.empty(shape, dtype=torch.float32, device=g.device) for shape in shapes)
    else:
        sums, grams = partials
    stage = torch.empty(len(sites) * (2 * d + 1), dtype=torch.float64, device=g.device)
    padded = sites + [sites[0]] * (SITES - len(sites))
    gradients = [rows for _, rows, _ in padded]
    masked = padded[0][2] is not None
    keeps = [rows if keep is None else keep for _, rows, keep in padded]
    # The interpreter takes as long for a program, however small.
    elements = config.block_d**2 // 2 if tiles.INTERPRETING else MERGE_ELEMENTS
    counts, means, scatters = zip(*(state for state, _, _ in padded), strict=True)
    stride_sum = sums.shape[-1]
    with launch.guard(g.device):
        for first_row in range(0, n_rows, splits * split_rows):
            used = min(splits, triton.cdiv(n_rows - first_row, split_rows))
            moments_kernel[(triangle, used, len(sites))](
                *gradients,
                *keeps,
                sums,
                grams,
                first_row,
                n_rows,
                split_rows,
                d,
                stride_sum,
                inner_rows,
                stride_o,
                stride_i,
                stride_d,
                HAS_MASK=masked,
                FLAT=inner_rows == n_rows,
                SINGLE=side == 1,
                ONCE=config.once,
                WIDEN=tiles.INTERPRETING and g.dtype is torch.bfloat16,
                PRECISION="ieee",
                WIDE=(d + config.block_d) * stride_d >= 2**31,
                CHUNK_N=CHUNK_ROWS,
                BLOCK_N=config.block_n,
                BLOCK_D=config.block_d,
                COUNT=COUNT_COLUMNS,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
            mean_kernel[(triton.cdiv(d, MEAN_COLUMNS), len(sites))](
                sums,
                stage,
                *counts,
                *means,
                used,
                d,
                stride_sum,
                BLOCK_S=MEAN_SPLITS,
                BLOCK_D=MEAN_COLUMNS,
                COUNT=COUNT_COLUMNS,
            )
            merge_kernel[(triangle * config.block_d**2 // elements, len(sites))](
                grams,
                stage,
                *counts,
                *scatters,
                used,
                triangle,
                d,
                BLOCK_S=FEW_SPLITS if used <= FEW_SPLITS else MANY_SPLITS,
                BLOCK_E=elements,
                BLOCK_D=config.block_d,
                num_warps=MERGE_WARPS,
            )
