"""The fused routed projection.

    y_n = a * x_n + b * (x_n U_s) U_s^T,   s = index[sequence of row n];   y_n = x_n where s = -1

x, y (N, d), U (S, d, r), of which subspace s uses its first ranks[s] directions. `routed_kernel` takes tiles of rows
of one sequence; `routed_rows_kernel` takes tiles of packed rows and makes one pass for each subspace that it finds in
its tile. The passes are those of the projection: with c = x U in registers, or for large ranks in a slab that stays in
the L2 cache. See csrc_notes/routed.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spd_kernels import launch, tiles
from spd_kernels.project.config import ProjectConfig, columns_per_program
from spd_kernels.project.kernel import MAX_ROWS, padded
from spd_kernels.routed.config import choose, choose_packed, rows_per_program
from spd_kernels.tiles import contract, dot, expand, row_offsets, span


@triton.jit
def _leave_rows(
    x_rows,
    y_rows,
    mask_n,
    alone,
    first,
    last,
    stride_xd,
    stride_yd,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = x in the rows left alone, NaN in the others of mask_n."""
    for start in range(first, last, BLOCK_K):
        offsets_d = span(start, BLOCK_K, WIDE)
        mask_d = offsets_d < last
        x = tl.load(
            x_rows + (offsets_d * stride_xd)[None, :], mask=alone[:, None] & mask_d[None, :], other=float("nan")
        )
        tl.store(y_rows + (offsets_d * stride_yd)[None, :], x, mask=mask_n[:, None] & mask_d[None, :])


@triton.jit
def _project_rows(
    x_rows,
    u_ptr,
    y_rows,
    mask_n,
    d,
    first,
    last,
    r,
    r_read,
    a,
    b,
    stride_xd,
    stride_yd,
    stride_ud,
    stride_ur,
    HAS_A: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of one subspace, columns first .. last - 1 of y; BLOCK_W >= r, BLOCK_K is the step over d in both passes."""
    offsets_r = span(0, BLOCK_W, WIDE)
    mask_u = offsets_r < r_read
    u_columns = u_ptr + (offsets_r * stride_ur)[None, :]
    c = contract(
        x_rows,
        u_columns,
        mask_n,
        mask_u,
        d,
        stride_xd,
        stride_ud,
        WIDEN,
        PRECISION,
        WIDE,
        BLOCK_N,
        BLOCK_W,
        BLOCK_K,
    )
    # What lies past the rank does not count; nor does infinity times the zeros past the columns read, which is NaN.
    c = tl.where((offsets_r < r)[None, :], c, 0.0)
    expand(
        c.to(u_ptr.dtype.element_ty),
        x_rows,
        y_rows,
        u_columns,
        mask_n,
        mask_u,
        first,
        last,
        a,
        b,
        stride_xd,
        stride_yd,
        stride_ud,
        HAS_A,
        WIDEN,
        PRECISION,
        WIDE,
        BLOCK_N,
        BLOCK_K,
    )


@triton.jit
def _project_rows_streamed(
    x_rows,
    u_ptr,
    y_rows,
    c_rows,
    mask_n,
    d,
    first,
    last,
    r,
    r_read,
    a,
    b,
    stride_xd,
    stride_yd,
    stride_ud,
    stride_ur,
    HAS_A: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same as two matrix products with (BLOCK_N, BLOCK_W) outputs in steps of BLOCK_K; c_rows is the slab."""
    for start_r in range(0, r, BLOCK_W):
        offsets_r = span(start_r, BLOCK_W, WIDE)
        mask_u = offsets_r < r_read
        c = contract(
            x_rows,
            u_ptr + (offsets_r * stride_ur)[None, :],
            mask_n,
            mask_u,
            d,
            stride_xd,
            stride_ud,
            WIDEN,
            PRECISION,
            WIDE,
            BLOCK_N,
            BLOCK_W,
            BLOCK_K,
        )
        c = tl.where((offsets_r < r)[None, :], c, 0.0)
        tl.store(c_rows + offsets_r[None, :], c.to(c_rows.dtype.element_ty), mask=mask_u[None, :])

    tl.debug_barrier()  # every thread's part of c is written before any thread reads it

    for start_d in range(first, last, BLOCK_W):
        offsets_d = span(start_d, BLOCK_W, WIDE)
        mask_d = offsets_d < last
        mask = mask_n[:, None] & mask_d[None, :]
        y = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
        for start_r in range(0, r, BLOCK_K):
            offsets_r = span(start_r, BLOCK_K, WIDE)
            mask_u = offsets_r < r_read
            c = tl.load(c_rows + offsets_r[None, :], mask=mask_u[None, :], other=0.0)
            u = tl.load(
                u_ptr + (offsets_d * stride_ud)[:, None] + (offsets_r * stride_ur)[None, :],
                mask=mask_d[:, None] & mask_u[None, :],
                other=0.0,
            )
            y = dot(c, tl.trans(u), y, WIDEN, PRECISION)
        y = b * y
        if HAS_A:
            y += a * tl.load(x_rows + (offsets_d * stride_xd)[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y_rows + (offsets_d * stride_yd)[None, :], y.to(y_rows.dtype.element_ty), mask=mask)

    tl.debug_barrier()  # c is read before the next rows of this program overwrite it


@triton.jit
def _project_rows_of(
    subspace,
    x_rows,
    y_rows,
    bank_ptr,
    ranks_ptr,
    c_ptr,
    mask_n,
    d,
    first,
    last,
    r,
    a,
    b,
    stride_c,
    stride_xd,
    stride_yd,
    stride_us,
    stride_ud,
    stride_ur,
    HAS_RANKS: tl.constexpr,
    HAS_A: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    STREAMED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Finds a subspace and its rank, and projects the rows of mask_n."""
    u_ptr = bank_ptr + subspace.to(tl.int64) * stride_us
    r_read = r
    if HAS_RANKS:
        rank = tl.load(ranks_ptr + subspace)
        r = tl.minimum(tl.maximum(rank, 0), r).to(tl.int32)
        # Whole groups are read, so that the mask does not break 16-byte loads up.
        r_read = tl.cdiv(r, GROUP) * GROUP
    if STREAMED:
        _project_rows_streamed(
            x_rows,
            u_ptr,
            y_rows,
            c_ptr + (tl.arange(0, BLOCK_N) * stride_c)[:, None],
            mask_n,
            d,
            first,
            last,
            r,
            r_read,
            a,
            b,
            stride_xd,
            stride_yd,
            stride_ud,
            stride_ur,
            HAS_A,
            WIDEN,
            PRECISION,
            WIDE,
            BLOCK_N,
            BLOCK_W,
            BLOCK_K,
        )
    else:
        _project_rows(
            x_rows,
            u_ptr,
            y_rows,
            mask_n,
            d,
            first,
            last,
            r,
            r_read,
            a,
            b,
            stride_xd,
            stride_yd,
            stride_ud,
            stride_ur,
            HAS_A,
            WIDEN,
            PRECISION,
            WIDE,
            BLOCK_N,
            BLOCK_W,
            BLOCK_K,
        )


@triton.jit
def _routed_tile(
    tile,
    x_ptr,
    bank_ptr,
    y_ptr,
    c_ptr,
    index_ptr,
    ranks_ptr,
    n_subspaces,
    tiles_each,
    rows_each,
    d,
    first,
    last,
    r,
    a,
    b,
    stride_c,
    stride_xo,
    stride_xi,
    stride_xd,
    stride_yo,
    stride_yi,
    stride_yd,
    stride_us,
    stride_ud,
    stride_ur,
    HAS_RANKS: tl.constexpr,
    HAS_A: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    STREAMED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of one sequence: its subspace is one number for the whole program."""
    sequence = tile // tiles_each
    rows = (tile % tiles_each) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows < rows_each
    x_rows = x_ptr + (sequence.to(tl.int64) * stride_xo + rows.to(tl.int64) * stride_xi)[:, None]
    y_rows = y_ptr + (sequence.to(tl.int64) * stride_yo + rows.to(tl.int64) * stride_yi)[:, None]
    subspace = tl.load(index_ptr + sequence)
    if (subspace < 0) | (subspace >= n_subspaces):
        # a block is compared: Triton 3.9's interpreter makes integers of one truth value that it spreads
        alone = mask_n & (subspace + tl.zeros_like(rows) == -1)
        _leave_rows(x_rows, y_rows, mask_n, alone, first, last, stride_xd, stride_yd, WIDE, BLOCK_K)
    else:
        _project_rows_of(
            subspace,
            x_rows,
            y_rows,
            bank_ptr,
            ranks_ptr,
            c_ptr,
            mask_n,
            d,
            first,
            last,
            r,
            a,
            b,
            stride_c,
            stride_xd,
            stride_yd,
            stride_us,
            stride_ud,
            stride_ur,
            HAS_RANKS,
            HAS_A,
            WIDEN,
            PRECISION,
            WIDE,
            STREAMED,
            GROUP,
            BLOCK_N,
            BLOCK_W,
            BLOCK_K,
        )


@triton.jit
def routed_kernel(
    x_ptr,
    bank_ptr,
    y_ptr,
    c_ptr,
    index_ptr,
    ranks_ptr,
    n_subspaces,
    n_tiles,
    tiles_each,
    rows_each,
    d,
    slice_d,
    r,
    a,
    b,
    stride_c,
    stride_xo,
    stride_xi,
    stride_xd,
    stride_yo,
    stride_yi,
    stride_yd,
    stride_us,
    stride_ud,
    stride_ur,
    HAS_RANKS: tl.constexpr,
    HAS_A: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    STREAMED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    first = tl.program_id(1) * slice_d
    last = tl.minimum(first + slice_d, d)
    if STREAMED:
        slab = tl.program_id(1) * tl.num_programs(0) + program
        for tile in tl.range(program, n_tiles, tl.num_programs(0), disable_licm=True):
            _routed_tile(
                tile,
                x_ptr,
                bank_ptr,
                y_ptr,
                c_ptr + slab.to(tl.int64) * BLOCK_N * stride_c,
                index_ptr,
                ranks_ptr,
                n_subspaces,
                tiles_each,
                rows_each,
                d,
                first,
                last,
                r,
                a,
                b,
                stride_c,
                stride_xo,
                stride_xi,
                stride_xd,
                stride_yo,
                stride_yi,
                stride_yd,
                stride_us,
                stride_ud,
                stride_ur,
                HAS_RANKS,
                HAS_A,
                WIDEN,
                PRECISION,
                WIDE,
                STREAMED,
                GROUP,
                BLOCK_N,
                BLOCK_W,
                BLOCK_K,
            )
    else:
        _routed_tile(
            program,
            x_ptr,
            bank_ptr,
            y_ptr,
            c_ptr,
            index_ptr,
            ranks_ptr,
            n_subspaces,
            tiles_each,
            rows_each,
            d,
            first,
            last,
            r,
            a,
            b,
            stride_c,
            stride_xo,
            stride_xi,
            stride_xd,
            stride_yo,
            stride_yi,
            stride_yd,
            stride_us,
            stride_ud,
            stride_ur,
            HAS_RANKS,
            HAS_A,
            WIDEN,
            PRECISION,
            WIDE,
            STREAMED,
            GROUP,
            BLOCK_N,
            BLOCK_W,
            BLOCK_K,
        )


@triton.jit
def _routed_rows_tile(
    tile,
    x_ptr,
    bank_ptr,
    y_ptr,
    c_ptr,
    rows_ptr,
    index_ptr,
    ranks_ptr,
    n_sequences,
    n_subspaces,
    n_rows,
    tile_rows,
    d,
    first,
    last,
    r,
    a,
    b,
    stride_c,
    inner_rows,
    stride_xo,
    stride_xi,
    stride_xd,
    stride_yo,
    stride_yi,
    stride_yd,
    stride_us,
    stride_ud,
    stride_ur,
    HAS_RANKS: tl.constexpr,
    HAS_A: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    STREAMED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of packed rows, of which there are tile_rows <= BLOCK_N: a pass for each subspace that is in it."""
    lanes = tl.arange(0, BLOCK_N)
    rows = tile * tile_rows + lanes
    mask_n = (lanes < tile_rows) & (rows < n_rows)
    x_rows = x_ptr + row_offsets(rows, inner_rows, stride_xo, stride_xi)[:, None]
    y_rows = y_ptr + row_offsets(rows, inner_rows, stride_yo, stride_yi)[:, None]
    sequence = tl.load(rows_ptr + rows, mask=mask_n, other=-1)
    known = (sequence >= 0) & (sequence < n_sequences)
    subspace = tl.load(index_ptr + sequence, mask=known, other=n_subspaces)
    routed = (subspace >= 0) & (subspace < n_subspaces)
    unrouted = mask_n & (routed == 0)
    if tl.max(unrouted.to(tl.int32), axis=0) > 0:
        alone = mask_n & (subspace == -1)
        _leave_rows(x_rows, y_rows, unrouted, alone, first, last, stride_xd, stride_yd, WIDE, BLOCK_K)
    # From the least subspace to the next one that is there. Their rows are disjoint, so nothing is summed.
    present = tl.where(routed, subspace, n_subspaces).to(tl.int32)
    current = tl.min(present, axis=0)
    highest = tl.max(tl.where(present < n_subspaces, present, -1), axis=0)
    for _ in tl.range(0, tl.minimum(highest - current + 1, BLOCK_N), disable_licm=True):
        if current < n_subspaces:
            _project_rows_of(
                current,
                x_rows,
                y_rows,
                bank_ptr,
                ranks_ptr,
                c_ptr,
                present == current,
                d,
                first,
                last,
                r,
                a,
                b,
                stride_c,
                stride_xd,
                stride_yd,
                stride_us,
                stride_ud,
                stride_ur,
                HAS_RANKS,
                HAS_A,
                WIDEN,
                PRECISION,
                WIDE,
                STREAMED,
                GROUP,
                BLOCK_N,
                BLOCK_W,
                BLOCK_K,
            )
            current = tl.min(tl.where(present > current, present, n_subspaces), axis=0)


@triton.jit
def routed_rows_kernel(
    x_ptr,
    bank_ptr,
    y_ptr,
    c_ptr,
    rows_ptr,
    index_ptr,
    ranks_ptr,
    n_sequences,
    n_subspaces,
    n_rows,
    n_tiles,
    tile_rows,
    d,
    slice_d,
    r,
    a,
    b,
    stride_c,
    inner_rows,
    stride_xo,
    stride_xi,
    stride_xd,
    stride_yo,
    stride_yi,
    stride_yd,
    stride_us,
    stride_ud,
    stride_ur,
    HAS_RANKS: tl.constexpr,
    HAS_A: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    STREAMED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    first = tl.program_id(1) * slice_d
    last = tl.minimum(first + slice_d, d)
    if STREAMED:
        slab = tl.program_id(1) * tl.num_programs(0) + program
        for tile in tl.range(program, n_tiles, tl.num_programs(0), disable_licm=True):
            _routed_rows_tile(
                tile,
                x_ptr,
                bank_ptr,
                y_ptr,
                c_ptr + slab.to(tl.int64) * BLOCK_N * stride_c,
                rows_ptr,
                index_ptr,
                ranks_ptr,
                n_sequences,
                n_subspaces,
                n_rows,
                tile_rows,
                d,
                first,
                last,
                r,
                a,
                b,
                stride_c,
                inner_rows,
                stride_xo,
                stride_xi,
                stride_xd,
                stride_yo,
                stride_yi,
                stride_yd,
                stride_us,
                stride_ud,
                stride_ur,
                HAS_RANKS,
                HAS_A,
                WIDEN,
                PRECISION,
                WIDE,
                STREAMED,
                GROUP,
                BLOCK_N,
                BLOCK_W,
                BLOCK_K,
            )
    else:
        _routed_rows_tile(
            program,
            x_ptr,
            bank_ptr,
            y_ptr,
            c_ptr,
            rows_ptr,
            index_ptr,
            ranks_ptr,
            n_sequences,
            n_subspaces,
            n_rows,
            tile_rows,
            d,
            first,
            last,
            r,
            a,
            b,
            stride_c,
            inner_rows,
            stride_xo,
            stride_xi,
            stride_xd,
            stride_yo,
            stride_yi,
            stride_yd,
            stride_us,
            stride_ud,
            stride_ur,
            HAS_RANKS,
            HAS_A,
            WIDEN,
            PRECISION,
            WIDE,
            STREAMED,
            GROUP,
            BLOCK_N,
            BLOCK_W,
            BLOCK_K,
        )


def launch_routed(
    x: torch.Tensor,
    bank: torch.Tensor,
    index: torch.Tensor,
    a: float,
    b: float,
    rows: torch.Tensor | None = None,
    ranks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: ProjectConfig | None = None,
) -> torch.Tensor:
    """One launch. `out` is contiguous, of x's shape, and apart from x; `config` replaces the frozen choice."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if x.numel() == 0:
        return y
    n_subspaces, d, r = bank.shape
    n_rows = x.numel() // d
    if n_rows > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows; got {n_rows}")
    n_sequences = index.shape[0]
    if config is None:
        limits = (r, x.element_size(), launch.architecture(x.device))
        if rows is None:
            config = choose(n_sequences, n_rows // n_sequences, d, *limits, ranked=ranks is not None)
        else:
            config = choose_packed(n_sequences, n_rows, *limits, ranked=ranks is not None)
    processors = launch.processors(x.device)

    index = index.contiguous()
    ranks_or_index = index if ranks is None else ranks.contiguous()
    layout: tuple[int, ...]
    if rows is None:
        kernel, rows_each = routed_kernel, n_rows // n_sequences
        source = x.reshape(n_sequences, rows_each, d)
        tiles_each = triton.cdiv(rows_each, config.block_n)
        n_tiles = n_sequences * tiles_each
        pointers: tuple[torch.Tensor, ...] = (index, ranks_or_index)
        shape: tuple[int, ...] = (n_subspaces, n_tiles, tiles_each, rows_each)
        layout = (source.stride(0), source.stride(1), source.stride(2), rows_each * d, d, 1)
    else:
        kernel = routed_rows_kernel
        source, inner_rows, stride_xo, stride_xi = launch.flatten_rows(x)
        tile_rows = rows_per_program(n_rows, config, processors)
        n_tiles = triton.cdiv(n_rows, tile_rows)
        pointers = (rows.reshape(-1).contiguous(), index, ranks_or_index)
        shape = (n_sequences, n_subspaces, n_rows, n_tiles, tile_rows)
        layout = (inner_rows, stride_xo, stride_xi, source.stride(-1), inner_rows * d, d, 1)

    slice_d = columns_per_program(n_tiles, d, config, processors)
    slices = triton.cdiv(d, slice_d)
    programs, slab, stride_c = n_tiles, y, 0
    if config.streamed:
        programs = min(n_tiles, max(1, 2 * processors // slices))
        stride_c = triton.cdiv(r, config.block_w) * config.block_w
        slab = torch.empty((slices * programs * config.block_n, stride_c), dtype=x.dtype, device=x.device)
    reach = max(padded(d) * source.stride(-1), padded(d) * bank.stride(1) + padded(r) * bank.stride(2))
    group = 16 // x.element_size()
    with launch.guard(x.device):
        kernel[(programs, slices)](
            source,
            bank,
            y,
            slab,
            *pointers,
            *shape,
            d,
            slice_d,
            r,
            a,
            b,
            stride_c,
            *layout,
            *bank.stride(),
            HAS_RANKS=ranks is not None,
            HAS_A=a != 0.0,
            WIDEN=tiles.INTERPRETING and x.dtype is torch.bfloat16,
            PRECISION=launch.precision(x.dtype),
            WIDE=reach >= 2**31,
            STREAMED=config.streamed,
            GROUP=group if r % group == 0 else 1,
            BLOCK_N=config.block_n,
            BLOCK_W=config.block_w,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y
