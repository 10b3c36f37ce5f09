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
from spd_kernels.project.config import choose
from spd_kernels.tiles import dot, row_offsets, span


@triton.jit
def _project_tile(
    x_ptr,
    u_ptr,
    y_ptr,
    tile,
    n_rows,
    inner_rows,
    d,
    r,
    a,
    b,
    stride_xo,
    stride_xi,
    stride_xd,
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
    """One tile of rows; BLOCK_W >= r, BLOCK_K is the step over d in both passes."""
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows < n_rows
    x_rows = x_ptr + row_offsets(rows, inner_rows, stride_xo, stride_xi)[:, None]
    y_rows = y_ptr + (rows.to(tl.int64) * d)[:, None]
    offsets_r = span(0, BLOCK_W, WIDE)
    mask_r = offsets_r < r
    u_columns = u_ptr + (offsets_r * stride_ur)[None, :]

    c = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        offsets_d = span(start, BLOCK_K, WIDE)
        mask_d = offsets_d < d
        x = tl.load(x_rows + (offsets_d * stride_xd)[None, :], mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        u = tl.load(u_columns + (offsets_d * stride_ud)[:, None], mask=mask_d[:, None] & mask_r[None, :], other=0.0)
        c = dot(x, u, c, WIDEN, PRECISION)
    c = c.to(u_ptr.dtype.element_ty)

    for start in range(0, d, BLOCK_K):
        offsets_d = span(start, BLOCK_K, WIDE)
        mask_d = offsets_d < d
        mask = mask_n[:, None] & mask_d[None, :]
        u = tl.load(u_columns + (offsets_d * stride_ud)[:, None], mask=mask_d[:, None] & mask_r[None, :], other=0.0)
        y = b * dot(c, tl.trans(u), tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32), WIDEN, PRECISION)
        if HAS_A:
            y += a * tl.load(x_rows + (offsets_d * stride_xd)[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y_rows + offsets_d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


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
    r,
    a,
    b,
    stride_xo,
    stride_xi,
    stride_xd,
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
    y_rows = y_ptr + (rows.to(tl.int64) * d)[:, None]
    c_rows = c_ptr + (local_rows * stride_c)[:, None]

    for start_r in range(0, r, BLOCK_W):
        offsets_r = span(start_r, BLOCK_W, WIDE)
        mask_r = offsets_r < r
        c = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
        for start_d in range(0, d, BLOCK_K):
            offsets_d = span(start_d, BLOCK_K, WIDE)
            mask_d = offsets_d < d
            mask_u = mask_d[:, None] & mask_r[None, :]
            x = tl.load(x_rows + (offsets_d * stride_xd)[None, :], mask=mask_n[:, None] & mask_d[None, :], other=0.0)
            u = tl.load(
                u_ptr + (offsets_d * stride_ud)[:, None] + (offsets_r * stride_ur)[None, :], mask=mask_u, other=0.0
            )
            c = dot(x, u, c, WIDEN, PRECISION)
        tl.store(c_rows + offsets_r[None, :], c.to(c_ptr.dtype.element_ty), mask=mask_r[None, :])

    tl.debug_barrier()  # every thread's part of c is written before any thread reads it

    for start_d in range(0, d, BLOCK_W):
        offsets_d = span(start_d, BLOCK_W, WIDE)
        mask_d = offsets_d < d
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
        tl.store(y_rows + offsets_d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)

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
    r,
    a,
    b,
    stride_xo,
    stride_xi,
    stride_xd,
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
    """This program's share of one tensor: one tile, or when streamed every num_programs-th."""
    program = tl.program_id(0)
    if STREAMED:
        slab = (side * tl.num_programs(0) + program).to(tl.int64) * BLOCK_N
        for tile in range(program, tl.cdiv(n_rows, BLOCK_N), tl.num_programs(0)):
            _project_tile_streamed(
                x_ptr,
                u_ptr,
                y_ptr,
                c_ptr + slab * stride_c,
                tile,
                n_rows,
                inner_rows,
                d,
                r,
                a,
                b,
                stride_xo,
                stride_xi,
                stride_xd,
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
            r,
            a,
            b,
            stride_xo,
            stride_xi,
            stride_xd,
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
    a,
    b,
    stride_c,
    inner_rows,
    stride_xo,
    stride_xi,
    stride_xd,
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
        r,
        a,
        b,
        stride_xo,
        stride_xi,
        stride_xd,
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
    a,
    b,
    stride_c,
    inner_rows_k,
    stride_ko,
    stride_ki,
    stride_kd,
    r_k,
    stride_u_kd,
    stride_u_kr,
    inner_rows_v,
    stride_vo,
    stride_vi,
    stride_vd,
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
        tl.where(keys, r_k, r_v),
        a,
        b,
        tl.where(keys, stride_ko, stride_vo),
        tl.where(keys, stride_ki, stride_vi),
        tl.where(keys, stride_kd, stride_vd),
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
    x: torch.Tensor, u: torch.Tensor, a: float, b: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """One launch; `out` (contiguous, of x's shape) replaces the allocation."""
    (y,) = _launch(project_kernel, ((x, u, out),), a, b)
    return y


def launch_project_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    u_k: torch.Tensor,
    u_v: torch.Tensor,
    a: float,
    b: float,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch for both; `out` as in `launch_project`."""
    out_k, out_v = out if out is not None else (None, None)
    y_k, y_v = _launch(project_kv_kernel, ((k, u_k, out_k), (v, u_v, out_v)), a, b)
    return y_k, y_v


def _launch(
    kernel: triton.JITFunction,
    sides: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], ...],
    a: float,
    b: float,
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

    config = choose(n_rows, rank, x.element_size())
    programs = triton.cdiv(n_rows, config.block_n)
    slab, stride_c = outputs[0], 0
    if config.streamed:
        programs = min(programs, max(1, 2 * launch.processors(x.device) // len(sides)))
        stride_c = triton.cdiv(rank, config.block_w) * config.block_w
        slab = torch.empty((len(sides) * programs * config.block_n, stride_c), dtype=x.dtype, device=x.device)

    pointers: list[torch.Tensor] = []
    layouts: list[int] = []
    reach = 0
    for (x, u, _), y in zip(sides, outputs, strict=True):
        rows, inner_rows, stride_o, stride_i = launch.flatten_rows(x)
        stride_d = rows.stride(-1)
        pointers += [rows, u, y]
        layouts += [inner_rows, stride_o, stride_i, stride_d, u.shape[1], u.stride(0), u.stride(1)]
        reach = max(reach, _padded(d) * stride_d, _padded(d) * u.stride(0) + _padded(rank) * u.stride(1))
    with launch.guard(x.device):
        kernel[(programs, len(sides))](
            *pointers,
            slab,
            n_rows,
            d,
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
    return outputs


def _padded(size: int) -> int:
    """Largest index that a masked block over this size can address, plus one."""
    return size + 256
