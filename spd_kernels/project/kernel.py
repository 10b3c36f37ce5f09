"""The fused projection kernels.

    y = a * x + b * (x U) U^T          x, y (N, d), U (d, r)

Pass 1 accumulates c = x U for a tile of rows, pass 2 writes y = a x + b c U^T. `_project_tile` keeps c in registers;
`_project_tile_streamed` serves ranks whose c does not fit there and keeps it in a slab that its program reuses for
every tile, so that it stays in the L2 cache. See csrc_notes/project.md.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

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
def contract_streamed(
    x_rows,
    u_ptr,
    c_rows,
    mask_n,
    d,
    r,
    stride_xd,
    stride_ud,
    stride_ur,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLAB: tl.constexpr,
):
    """c = x U of a tile of rows into memory, a block of directions at a time; a slab has room for missing rows."""
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
            CLEAR=False,
        )
        mask = mask_r[None, :] if SLAB else mask_n[:, None] & mask_r[None, :]
        tl.store(c_rows + offsets_r[None, :], c.to(c_rows.dtype.element_ty), mask=mask)


@triton.jit
def expand_streamed(
    c_rows,
    x_rows,
    y_rows,
    u_ptr,
    mask_n,
    first,
    last,
    r,
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
    SLAB: tl.constexpr,
):
    """y = a x + b c U^T of a tile of rows, columns first .. last - 1, with c from memory; may write where x lies."""
    for start_d in range(first, last, BLOCK_W):
        offsets_d = span(start_d, BLOCK_W, WIDE)
        mask_d = offsets_d < last
        mask = mask_n[:, None] & mask_d[None, :]
        y = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
        for start_r in range(0, r, BLOCK_K):
            offsets_r = span(start_r, BLOCK_K, WIDE)
            mask_r = offsets_r < r
            mask_u = mask_d[:, None] & mask_r[None, :]
            mask_c = mask_r[None, :] if SLAB else mask_n[:, None] & mask_r[None, :]
            c = tl.load(c_rows + offsets_r[None, :], mask=mask_c, other=0.0)
            u = tl.load(
                u_ptr + (offsets_d * stride_ud)[:, None] + (offsets_r * stride_ur)[None, :], mask=mask_u, other=0.0
            )
            y = dot(c, tl.trans(u), y, WIDEN, PRECISION)
        y = b * y
        if HAS_A:
            y += a * tl.load(x_rows + (offsets_d * stride_xd)[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y_rows + (offsets_d * stride_yd)[None, :], y.to(y_rows.dtype.element_ty), mask=mask)


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
    contract_streamed(
        x_rows,
        u_ptr,
        c_rows,
        mask_n,
        d,
        r,
        stride_xd,
        stride_ud,
        stride_ur,
        WIDEN,
        PRECISION,
        WIDE,
        BLOCK_N,
        BLOCK_W,
        BLOCK_K,
        SLAB=True,
    )
    tl.debug_barrier()  # every thread's part of c is written before any thread reads it
    expand_streamed(
        c_rows,
        x_rows,
        y_rows,
        u_ptr,
        mask_n,
        first,
        last,
        r,
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
        SLAB=True,
    )
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
    a,
    b,
    n_rows,
    d,
    slice_d,
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
    a,
    b,
    n_rows,
    d,
    slice_d,
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
MAX_ROWS = 2**31 - 256

Side = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # x, u, out
Layout = tuple[torch.Size, tuple[int, ...], torch.Size, tuple[int, ...], bool]  # of x and of u; whether out is x


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
    kernel: triton.JITFunction, sides: tuple[Side, ...], a: float, b: float, config: ProjectConfig | None
) -> list[torch.Tensor]:
    x = sides[0][0]
    dtype, device = x.dtype, x.device
    layouts = tuple([(x.shape, x.stride(), u.shape, u.stride(), out is x) for x, u, out in sides])
    plan = _plan(layouts, dtype, device, a != 0.0, launch.precision(dtype), config)
    outputs: list[torch.Tensor] = []
    pointers: list[torch.Tensor] = []
    for (x, u, out), copied in zip(sides, plan.copied, strict=True):
        y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        rows = x.contiguous() if copied else x
        outputs.append(y)
        pointers += (rows, u, rows if y is x else y)
    if not plan.grid[0]:
        return outputs
    slab = pointers[0] if plan.slab is None else torch.empty(plan.slab, dtype=dtype, device=device)
    with launch.guard(device):
        kernel[plan.grid](*pointers, slab, a, b, *plan.integers, **plan.constants)
    for (x, _, out), rows in zip(sides, pointers[::3], strict=True):
        if out is x and rows is not x:
            x.copy_(rows)
    return outputs


@dataclass(frozen=True, slots=True)
class Plan:
    """What a launch takes besides the tensors and a, b."""

    grid: tuple[int, int, int]
    copied: tuple[bool, ...]  # sides whose leading axes do not merge into two
    slab: tuple[int, int] | None
    integers: tuple[int, ...]
    constants: dict[str, Any]


# Bounded, for sequence lengths may be of any number.
@functools.lru_cache(maxsize=1024)
def _plan(
    layouts: tuple[Layout, ...],
    dtype: torch.dtype,
    device: torch.device,
    has_a: bool,
    precision: str,
    config: ProjectConfig | None,
) -> Plan:
    """A launch follows from the layouts alone, and working it out costs the host more than the launch itself."""
    shape = layouts[0][0]
    d = shape[-1]
    n_rows = shape[:-1].numel()
    if n_rows > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows; got {n_rows}")
    rank = max(u_shape[1] for _, _, u_shape, _, _ in layouts)
    if config is None:
        config = choose(n_rows, d, rank, dtype.itemsize, launch.architecture(device))
    processors = launch.processors(device)
    tiles_n = triton.cdiv(n_rows, config.block_n)
    # A program in place must be the only reader of its rows.
    in_place = any(layout[-1] for layout in layouts)
    slice_d = d if in_place or not n_rows else columns_per_program(tiles_n * len(layouts), d, config, processors)
    slices = triton.cdiv(d, slice_d)
    programs, slab, stride_c = tiles_n, None, 0
    if config.streamed:
        programs = min(programs, max(1, 2 * processors // (len(layouts) * slices)))
        stride_c = triton.cdiv(rank, config.block_w) * config.block_w
        slab = (slices * len(layouts) * programs * config.block_n, stride_c)

    copied: list[bool] = []
    integers: list[int] = [n_rows, d, slice_d, stride_c]
    reach = 0
    for x_shape, x_stride, (_, r), (stride_ud, stride_ur), writes_x in layouts:
        x = torch.empty_strided(x_shape, x_stride, device="meta")
        rows, inner_rows, stride_o, stride_i = launch.flatten_rows(x)
        stride_d = rows.stride(-1)
        target = (stride_o, stride_i, stride_d) if writes_x else (inner_rows * d, d, 1)
        copied.append(rows is not x)
        integers += (inner_rows, stride_o, stride_i, stride_d, *target, r, stride_ud, stride_ur)
        reach = max(reach, padded(d) * stride_d, padded(d) * stride_ud + padded(rank) * stride_ur)
    constants = {
        "HAS_A": has_a,
        "WIDEN": tiles.INTERPRETING and dtype is torch.bfloat16,
        "PRECISION": precision,
        "WIDE": reach >= 2**31,
        "STREAMED": config.streamed,
        "BLOCK_N": config.block_n,
        "BLOCK_W": config.block_w,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return Plan((programs, len(layouts), slices), tuple(copied), slab, tuple(integers), constants)


def padded(size: int) -> int:
    """Largest index that a masked block over this size can address, plus one."""
    return size + 256
