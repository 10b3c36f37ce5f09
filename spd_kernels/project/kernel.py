"""The fused projection kernels.

    y = a * x + b * (x U) U^T          x, y (N, d), U (d, r)

Pass 1 accumulates c = x U for a tile of rows, pass 2 writes y = a x + b c U^T. `_project_tile` keeps c in registers;
`_project_tile_streamed` serves ranks whose c does not fit there and keeps it in a slab that its program reuses for
every tile, so that it stays in the L2 cache. See csrc_notes/project.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spd_kernels import launch, tiles
from spd_kernels.project.config import ProjectConfig, choose, columns_per_program
from spd_kernels.tiles import contract, dot, expand, row_offsets, span


@triton.jit
def _project_tile(
    x_ptr,
    u_ptr,
    y_ptr,
    tile,
    n_rows,
    inner_rows,
    d,
    first,
    last,
    r,
    a,
    b,
    stride_xo,
    stride_xi,
    stride_xd,
    stride_yo,
    stride_yi,
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
    """One tile of rows, columns first .. last - 1 of y; BLOCK_W >= r, BLOCK_K is the step over d in both passes."""
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows < n_rows
    x_rows = x_ptr + row_offsets(rows, inner_rows, stride_xo, stride_xi)[:, None]
    y_rows = y_ptr + row_offsets(rows, inner_rows, stride_yo, stride_yi)[:, None]
    offsets_r = span(0, BLOCK_W, WIDE)
    mask_r = offsets_r < r
    u_columns = u_ptr + (offsets_r * stride_ur)[None, :]
    c = contract(
        x_rows,
        u_columns,
        mask_n,
        mask_r,
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
    tl.debug_barrier()  # y may be x: every warp has read its rows before any warp writes them
    expand(
        c.to(u_ptr.dtype.element_ty),
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
        HAS_A,
        WIDEN,
        PRECISION,
        WIDE,
        BLOCK_N,
        BLOCK_K,
    )


@triton.jit
def _project_tile_streamed(
    x_ptr,
    u_ptr,
    y_ptr,
    c_ptr,
    tile,
    n_rows,
    inner_rows,
    d,
    first,
    last,
    r,
    a,
    b,
    stride_xo,
    stride_xi,
    stride_xd,
    stride_yo,
    stride_yi,
    stride_yd,
    stride_ud,
    stride_ur,
    stride_c,
    HAS_A: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of rows as two matrix products with (BLOCK_N, BLOCK_W) outputs in steps of BLOCK_K, c in the slab."""
    local_rows = tl.arange(0, BLOCK_N)
    rows = tile * BLOCK_N + local_rows
    mask_n = rows < n_rows
    x_rows = x_ptr + row_offsets(rows, inner_rows, stride_xo, stride_xi)[:, None]
    y_rows = y_ptr + row_offsets(rows, inner_rows, stride_yo, stride_yi)[:, None]
    c_rows = c_ptr + (local_rows * stride_c)[:, None]

    for start_r in range(0, r, BLOCK_W):
        offsets_r = span(start_r, BLOCK_W, WIDE)
        mask_r = offsets_r < r
        u_columns = u_ptr + (offsets_r * stride_ur)[None, :]
        c = contract(
            x_rows,
            u_columns,
            mask_n,
            mask_r,
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
        tl.store(c_rows + offsets_r[None, :], c.to(c_ptr.dtype.element_ty), mask=mask_r[None, :])

    tl.debug_barrier()  # every thread's part of c is written before any thread reads it

    for start_d in range(first, last, BLOCK_W):
        offsets_d = span(start_d, BLOCK_W, WIDE)
        mask_d = offsets_d < last
        mask = mask_n[:, None] & mask_d[None, :]
        y = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
        for start_r in range(0, r, BLOCK_K):
            offsets_r = span(start_r, BLOCK_K, WIDE)
            mask_r = offsets_r < r
            mask_u = mask_d[:, None] & mask_r[None, :]
            c = tl.load(c_rows + offsets_r[None, :], mask=mask_r[None, :], other=0.0)
            u = tl.load(
                u_ptr + (offsets_d * stride_ud)[:, None] + (offsets_r * stride_ur)[None, :], mask=mask_u, other=0.0
            )
            y = dot(c, tl.trans(u), y, WIDEN, PRECISION)
        y = b * y
        if HAS_A:
            y += a * tl.load(x_rows + (offsets_d * stride_xd)[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y_rows + (offsets_d * stride_yd)[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)

    tl.debug_barrier()  # c is read before the next tile of this program overwrites it


@triton.jit
def _project_side(
    x_ptr,
    u_ptr,
    y_ptr,
    c_ptr,
    side,
    n_rows,
    inner_rows,
    d,
    slice_d,
    r,
    a,
    b,
    stride_xo,
    stride_xi,
    stride_xd,
    stride_yo,
    stride_yi,
    stride_yd,
    stride_ud,
    stride_ur,
    stride_c,
    HAS_A: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    STREAMED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """This program's share of one tensor: a slice of the columns of one tile, or streamed of every so many tiles."""
    program = tl.program_id(0)
    first = tl.program_id(2) * slice_d
    last = tl.minimum(first + slice_d, d)
    if STREAMED:
        slab = (tl.program_id(2) * tl.num_programs(1) + side) * tl.num_programs(0) + program
        for tile in range(program, tl.cdiv(n_rows, BLOCK_N), tl.num_programs(0)):
            _project_tile_streamed(
                x_ptr,
                u_ptr,
                y_ptr,
                c_ptr + slab.to(tl.int64) * BLOCK_N * stride_c,
                tile,
                n_rows,
                inner_rows,
                d,
                first,
                last,
                r,
                a,
                b,
                stride_xo,
                stride_xi,
                stride_xd,
                stride_yo,
                stride_yi,
                stride_yd,
                stride_ud,
                stride_ur,
                stride_c,
                HAS_A,
                WIDEN,
                PRECISION,
                WIDE,
                BLOCK_N,
                BLOCK_W,
                BLOCK_K,
            )
    else:
        _project_tile(
            x_ptr,
            u_ptr,
            y_ptr,
            program,
            n_rows,
            inner_rows,
            d,
            first,
            last,
            r,
            a,
            b,
            stride_xo,
            stride_xi,
            stride_xd,
            stride_yo,
            stride_yi,
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
def project_kernel(
    x_ptr,
    u_ptr,
    y_ptr,
    c_ptr,
    n_rows,
    d,
    slice_d,
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
    r,
    stride_ud,
    stride_ur,
    HAS_A: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    STREAMED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    _project_side(
        x_ptr,
        u_ptr,
        y_ptr,
        c_ptr,
        0,
        n_rows,
        inner_rows,
        d,
        slice_d,
        r,
        a,
        b,
        stride_xo,
        stride_xi,
        stride_xd,
        stride_yo,
        stride_yi,
        stride_yd,
        stride_ud,
        stride_ur,
        stride_c,
        HAS_A,
        WIDEN,
        PRECISION,
        WIDE,
        STREAMED,
        BLOCK_N,
        BLOCK_W,
        BLOCK_K,
    )


@triton.jit
def project_kv_kernel(
    k_ptr,
    u_k_ptr,
    y_k_ptr,
    v_ptr,
    u_v_ptr,
    y_v_ptr,
    c_ptr,
    n_rows,
    d,
    slice_d,
    a,
    b,
    stride_c,
    inner_rows_k,
    stride_ko,
    stride_ki,
    stride_kd,
    stride_y_ko,
    stride_y_ki,
    stride_y_kd,
    r_k,
    stride_u_kd,
    stride_u_kr,
    inner_rows_v,
    stride_vo,
    stride_vi,
    stride_vd,
    stride_y_vo,
    stride_y_vi,
    stride_y_vd,
    r_v,
    stride_u_vd,
    stride_u_vr,
    HAS_A: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    STREAMED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Selected, not branched on, so that the program's code is there once.
    side = tl.program_id(1)
    keys = side == 0
    _project_side(
        tl.where(keys, k_ptr, v_ptr),
        tl.where(keys, u_k_ptr, u_v_ptr),
        tl.where(keys, y_k_ptr, y_v_ptr),
        c_ptr,
        side,
        n_rows,
        tl.where(keys, inner_rows_k, inner_rows_v),
        d,
        slice_d,
        tl.where(keys, r_k, r_v),
        a,
        b,
        tl.where(keys, stride_ko, stride_vo),
        tl.where(keys, stride_ki, stride_vi),
        tl.where(keys, stride_kd, stride_vd),
        tl.where(keys, stride_y_ko, stride_y_vo),
        tl.where(keys, stride_y_ki, stride_y_vi),
        tl.where(keys, stride_y_kd, stride_y_vd),
        tl.where(keys, stride_u_kd, stride_u_vd),
        tl.where(keys, stride_u_kr, stride_u_vr),
        stride_c,
        HAS_A,
        WIDEN,
        PRECISION,
        WIDE,
        STREAMED,
        BLOCK_N,
        BLOCK_W,
        BLOCK_K,
    )


# Tile numbers times BLOCK_N are 32-bit.
_MAX_ROWS = 2**31 - 256


def launch_project(
    x: torch.Tensor,
    u: torch.Tensor,
    a: float,
    b: float,
    out: torch.Tensor | None = None,
    config: ProjectConfig | None = None,
) -> torch.Tensor:
    """One launch. `out` is x itself, or contiguous and of x's shape; `config` replaces the frozen choice."""
    (y,) = _launch(project_kernel, ((x, u, out),), a, b, config)
    return y


def launch_project_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    u_k: torch.Tensor,
    u_v: torch.Tensor,
    a: float,
    b: float,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: ProjectConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch for both; `out` and `config` as in `launch_project`."""
    out_k, out_v = out if out is not None else (None, None)
    y_k, y_v = _launch(project_kv_kernel, ((k, u_k, out_k), (v, u_v, out_v)), a, b, config)
    return y_k, y_v


def _launch(
    kernel: triton.JITFunction,
    sides: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], ...],
    a: float,
    b: float,
    config: ProjectConfig | None,
) -> list[torch.Tensor]:
    x = sides[0][0]
    d = x.shape[-1]
    n_rows = x.numel() // d
    if n_rows > _MAX_ROWS:
        raise ValueError(f"x: expected at most {_MAX_ROWS} rows; got {n_rows}")
    rank = max(u.shape[1] for _, u, _ in sides)
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out for x, _, out in sides]
    if n_rows == 0:
        return outputs

    if config is None:
        config = choose(n_rows, d, rank, x.element_size(), launch.architecture(x.device))
    processors = launch.processors(x.device)
    row_tiles = triton.cdiv(n_rows, config.block_n)
    in_place = any(out is x for x, _, out in sides)
    # A program in place must be the only reader of its rows.
    slice_d = d if in_place else columns_per_program(row_tiles * len(sides), d, config, processors)
    slices = triton.cdiv(d, slice_d)
    programs = row_tiles
    slab, stride_c = outputs[0], 0
    if config.streamed:
        programs = min(programs, max(1, 2 * processors // (len(sides) * slices)))
        stride_c = triton.cdiv(rank, config.block_w) * config.block_w
        slab = torch.empty((slices * len(sides) * programs * config.block_n, stride_c), dtype=x.dtype, device=x.device)

    pointers: list[torch.Tensor] = []
    layouts: list[int] = []
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    reach = 0
    for (x, u, _), y in zip(sides, outputs, strict=True):
        rows, inner_rows, stride_o, stride_i = launch.flatten_rows(x)
        stride_d = rows.stride(-1)
        if y is not x:
            target, target_strides = y, (inner_rows * d, d, 1)
        else:
            target, target_strides = rows, (stride_o, stride_i, stride_d)
            if rows is not x:
                copies.append((x, rows))
        pointers += [rows, u, target]
        layouts += [inner_rows, stride_o, stride_i, stride_d, *target_strides, u.shape[1], u.stride(0), u.stride(1)]
        reach = max(reach, _padded(d) * stride_d, _padded(d) * u.stride(0) + _padded(rank) * u.stride(1))
    with launch.guard(x.device):
        kernel[(programs, len(sides), slices)](
            *pointers,
            slab,
            n_rows,
            d,
            slice_d,
            a,
            b,
            stride_c,
            *layouts,
            HAS_A=a != 0.0,
            WIDEN=tiles.INTERPRETING and x.dtype is torch.bfloat16,
            PRECISION=launch.float32_precision(),
            WIDE=reach >= 2**31,
            STREAMED=config.streamed,
            BLOCK_N=config.block_n,
            BLOCK_W=config.block_w,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    for x, rows in copies:
        x.copy_(rows)
    return outputs


def _padded(size: int) -> int:
    """Largest index that a masked block over this size can address, plus one."""
    return size + 256
