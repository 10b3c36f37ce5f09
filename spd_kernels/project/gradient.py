"""The projection's gradients in two launches.

    dL/dx = a g + b (g U) U^T          dL/dU = b (x^T (g U) + g^T (x U))          x, g (N, d), U (d, r)

`coefficients_kernel` is the projection of g that also keeps c_g = g U, and c_x = x U beside it, (N, r) each.
`basis_kernel` sums x^T c_g + g^T c_x over a range of rows for a tile of U; the ranges are then added in fp32, always in
the same order. See csrc_notes/project.md.
"""

# Arguments of a jitted function are traced, not typed.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from spd_kernels import launch, tiles
from spd_kernels.project.config import BasisConfig, ProjectConfig, choose_basis, choose_coefficients, rows_per_split
from spd_kernels.project.kernel import MAX_ROWS, contract_streamed, expand_streamed, padded
from spd_kernels.tiles import contract, dot, expand, row_offsets, span


@triton.jit
def coefficients_kernel(
    k_ptr,
    g_k_ptr,
    u_k_ptr,
    y_k_ptr,
    c_x_k_ptr,
    c_g_k_ptr,
    v_ptr,
    g_v_ptr,
    u_v_ptr,
    y_v_ptr,
    c_x_v_ptr,
    c_g_v_ptr,
    a,
    b,
    n_rows,
    d,
    stride_c,
    inner_rows_k,
    stride_ko,
    stride_ki,
    stride_kd,
    inner_rows_g_k,
    stride_g_ko,
    stride_g_ki,
    stride_g_kd,
    r_k,
    stride_u_kd,
    stride_u_kr,
    inner_rows_v,
    stride_vo,
    stride_vi,
    stride_vd,
    inner_rows_g_v,
    stride_g_vo,
    stride_g_vi,
    stride_g_vd,
    r_v,
    stride_u_vd,
    stride_u_vr,
    HAS_A: tl.constexpr,
    HAS_Y: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    STREAMED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Both sides' c_x, c_g and (HAS_Y) dL/dx for one tile of rows; BLOCK_W >= r unless STREAMED."""
    keys = tl.program_id(1) == 0
    x_ptr = tl.where(keys, k_ptr, v_ptr)
    g_ptr = tl.where(keys, g_k_ptr, g_v_ptr)
    u_ptr = tl.where(keys, u_k_ptr, u_v_ptr)
    y_ptr = tl.where(keys, y_k_ptr, y_v_ptr)
    c_x_ptr = tl.where(keys, c_x_k_ptr, c_x_v_ptr)
    c_g_ptr = tl.where(keys, c_g_k_ptr, c_g_v_ptr)
    inner_rows_x = tl.where(keys, inner_rows_k, inner_rows_v)
    stride_xo = tl.where(keys, stride_ko, stride_vo)
    stride_xi = tl.where(keys, stride_ki, stride_vi)
    stride_xd = tl.where(keys, stride_kd, stride_vd)
    inner_rows_g = tl.where(keys, inner_rows_g_k, inner_rows_g_v)
    stride_go = tl.where(keys, stride_g_ko, stride_g_vo)
    stride_gi = tl.where(keys, stride_g_ki, stride_g_vi)
    stride_gd = tl.where(keys, stride_g_kd, stride_g_vd)
    r = tl.where(keys, r_k, r_v)
    stride_ud = tl.where(keys, stride_u_kd, stride_u_vd)
    stride_ur = tl.where(keys, stride_u_kr, stride_u_vr)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows < n_rows
    rows_x = x_ptr + row_offsets(rows, inner_rows_x, stride_xo, stride_xi)[:, None]
    rows_g = g_ptr + row_offsets(rows, inner_rows_g, stride_go, stride_gi)[:, None]
    rows_y = y_ptr + (rows.to(tl.int64) * d)[:, None]
    rows_c_x = c_x_ptr + (rows.to(tl.int64) * stride_c)[:, None]
    rows_c_g = c_g_ptr + (rows.to(tl.int64) * stride_c)[:, None]
    if STREAMED:
        contract_streamed(
            rows_x,
            u_ptr,
            rows_c_x,
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
            SLAB=False,
        )
        contract_streamed(
            rows_g,
            u_ptr,
            rows_c_g,
            mask_n,
            d,
            r,
            stride_gd,
            stride_ud,
            stride_ur,
            WIDEN,
            PRECISION,
            WIDE,
            BLOCK_N,
            BLOCK_W,
            BLOCK_K,
            SLAB=False,
        )
        if HAS_Y:
            tl.debug_barrier()  # every thread's part of c_g is written before any thread reads it
            expand_streamed(
                rows_c_g,
                rows_g,
                rows_y,
                u_ptr,
                mask_n,
                0,
                d,
                r,
                a,
                b,
                stride_gd,
                1,
                stride_ud,
                stride_ur,
                HAS_A,
                WIDEN,
                PRECISION,
                WIDE,
                BLOCK_N,
                BLOCK_W,
                BLOCK_K,
                SLAB=False,
            )
    else:
        offsets_r = span(0, BLOCK_W, WIDE)
        mask_r = offsets_r < r
        mask_c = mask_n[:, None] & mask_r[None, :]
        u_columns = u_ptr + (offsets_r * stride_ur)[None, :]
        c = contract(
            rows_x,
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
        tl.store(rows_c_x + offsets_r[None, :], c.to(c_x_ptr.dtype.element_ty), mask=mask_c)
        c = contract(
            rows_g,
            u_columns,
            mask_n,
            mask_r,
            d,
            stride_gd,
            stride_ud,
            WIDEN,
            PRECISION,
            WIDE,
            BLOCK_N,
            BLOCK_W,
            BLOCK_K,
        ).to(c_g_ptr.dtype.element_ty)
        tl.store(rows_c_g + offsets_r[None, :], c, mask=mask_c)
        if HAS_Y:
            expand(
                c,
                rows_g,
                rows_y,
                u_columns,
                mask_n,
                mask_r,
                0,
                d,
                a,
                b,
                stride_gd,
                1,
                stride_ud,
                HAS_A,
                WIDEN,
                PRECISION,
                WIDE,
                BLOCK_N,
                BLOCK_K,
            )


@triton.jit
def basis_kernel(
    k_ptr,
    g_k_ptr,
    c_x_k_ptr,
    c_g_k_ptr,
    v_ptr,
    g_v_ptr,
    c_x_v_ptr,
    c_g_v_ptr,
    partial_ptr,
    b,
    n_rows,
    d,
    stride_c,
    split_rows,
    tiles_r,
    inner_rows_k,
    stride_ko,
    stride_ki,
    stride_kd,
    inner_rows_g_k,
    stride_g_ko,
    stride_g_ki,
    stride_g_kd,
    r_k,
    inner_rows_v,
    stride_vo,
    stride_vi,
    stride_vd,
    inner_rows_g_v,
    stride_g_vo,
    stride_g_vi,
    stride_g_vd,
    r_v,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One side's partial sum over the rows of one split, for one tile of U."""
    split = tl.program_id(1)
    side = tl.program_id(2)
    keys = side == 0
    x_ptr = tl.where(keys, k_ptr, v_ptr)
    g_ptr = tl.where(keys, g_k_ptr, g_v_ptr)
    c_x_ptr = tl.where(keys, c_x_k_ptr, c_x_v_ptr)
    c_g_ptr = tl.where(keys, c_g_k_ptr, c_g_v_ptr)
    inner_rows_x = tl.where(keys, inner_rows_k, inner_rows_v)
    stride_xo = tl.where(keys, stride_ko, stride_vo)
    stride_xi = tl.where(keys, stride_ki, stride_vi)
    stride_xd = tl.where(keys, stride_kd, stride_vd)
    inner_rows_g = tl.where(keys, inner_rows_g_k, inner_rows_g_v)
    stride_go = tl.where(keys, stride_g_ko, stride_g_vo)
    stride_gi = tl.where(keys, stride_g_ki, stride_g_vi)
    stride_gd = tl.where(keys, stride_g_kd, stride_g_vd)
    r = tl.where(keys, r_k, r_v)
    offsets_d = span(tl.program_id(0) // tiles_r * BLOCK_D, BLOCK_D, WIDE)
    offsets_r = tl.program_id(0) % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_d = offsets_d < d
    mask_r = offsets_r < r
    start = split * split_rows
    end = tl.minimum(start + split_rows, n_rows)

    grad_u = tl.zeros((BLOCK_D, BLOCK_R), dtype=tl.float32)
    for start_n in range(start, end, BLOCK_N):
        rows = start_n + tl.arange(0, BLOCK_N)
        mask_n = rows < end
        mask_x = mask_n[:, None] & mask_d[None, :]
        mask_c = mask_n[:, None] & mask_r[None, :]
        rows_x = x_ptr + row_offsets(rows, inner_rows_x, stride_xo, stride_xi)[:, None]
        rows_g = g_ptr + row_offsets(rows, inner_rows_g, stride_go, stride_gi)[:, None]
        offsets_c = (rows.to(tl.int64) * stride_c)[:, None] + offsets_r[None, :]
        x = tl.load(rows_x + (offsets_d * stride_xd)[None, :], mask=mask_x, other=0.0)
        c_g = tl.load(c_g_ptr + offsets_c, mask=mask_c, other=0.0)
        grad_u = dot(tl.trans(x), c_g, grad_u, WIDEN, PRECISION)
        g = tl.load(rows_g + (offsets_d * stride_gd)[None, :], mask=mask_x, other=0.0)
        c_x = tl.load(c_x_ptr + offsets_c, mask=mask_c, other=0.0)
        grad_u = dot(tl.trans(g), c_x, grad_u, WIDEN, PRECISION)

    slab = (side * tl.num_programs(1) + split).to(tl.int64) * d * stride_c
    offsets = (offsets_d * stride_c)[:, None] + offsets_r[None, :]
    tl.store(partial_ptr + slab + offsets, b * grad_u, mask=mask_d[:, None] & mask_r[None, :])


Side = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x, g, u


def launch_gradient(
    sides: tuple[Side, ...],
    a: float,
    b: float,
    needs_x: bool,
    config: ProjectConfig | None = None,
    basis_config: BasisConfig | None = None,
) -> list[tuple[torch.Tensor | None, torch.Tensor]]:
    """dL/dx (None unless needs_x) and dL/dU of one tensor, or of two alike in shape; two launches and a short sum."""
    x = sides[0][0]
    dtype, device = x.dtype, x.device
    layouts = tuple([(x.shape, x.stride(), g.stride(), u.shape, u.stride()) for x, g, u in sides])
    plan = _plan(layouts, dtype, device, a != 0.0, needs_x, launch.precision(dtype), config, basis_config)
    grads_x: list[torch.Tensor | None] = []
    if not plan.rows_grid[0]:
        return [(torch.empty_like(g) if needs_x else None, torch.zeros_like(u)) for _, g, u in sides]
    pointers: list[torch.Tensor] = []
    basis_pointers: list[torch.Tensor] = []
    for (x, g, u), (copy_x, copy_g) in zip(sides, plan.copied, strict=True):
        c_x, c_g = torch.empty((2, *plan.coefficients), dtype=dtype, device=device)
        x, g = (x.contiguous() if copy_x else x), (g.contiguous() if copy_g else g)
        y = torch.empty(x.shape, dtype=dtype, device=device) if needs_x else None
        grads_x.append(y)
        pointers += (x, g, u, c_g if y is None else y, c_x, c_g)
        basis_pointers += (x, g, c_x, c_g)
    # A single tensor is both sides of a grid that has one.
    repeat = 2 // len(sides)
    partials = torch.empty(plan.partials, dtype=torch.float32, device=device)
    with launch.guard(device):
        coefficients_kernel[plan.rows_grid](*pointers * repeat, a, b, *plan.integers, **plan.constants)
        basis_kernel[plan.basis_grid](
            *basis_pointers * repeat, partials, b, *plan.basis_integers, **plan.basis_constants
        )
    grads_u = partials.sum(1).to(dtype)
    return [
        (grad_x, grad_u[:, : u.shape[1]].contiguous())
        for grad_x, grad_u, (_, _, u) in zip(grads_x, grads_u, sides, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Plan:
    """What the two launches take besides the tensors and a, b."""

    copied: tuple[tuple[bool, bool], ...]
    coefficients: tuple[int, int]  # shape of c_x and c_g
    partials: tuple[int, int, int, int]
    rows_grid: tuple[int, int]
    integers: tuple[int, ...]
    constants: dict[str, Any]
    basis_grid: tuple[int, int, int]
    basis_integers: tuple[int, ...]
    basis_constants: dict[str, Any]


Layout = tuple[torch.Size, tuple[int, ...], tuple[int, ...], torch.Size, tuple[int, ...]]


@functools.lru_cache(maxsize=1024)
def _plan(
    layouts: tuple[Layout, ...],
    dtype: torch.dtype,
    device: torch.device,
    has_a: bool,
    has_y: bool,
    precision: str,
    config: ProjectConfig | None,
    basis: BasisConfig | None,
) -> Plan:
    shape = layouts[0][0]
    d = shape[-1]
    n_rows = shape[:-1].numel()
    if n_rows > MAX_ROWS:
        raise ValueError(f"x: expected at most {MAX_ROWS} rows; got {n_rows}")
    rank = max(u_shape[1] for _, _, _, u_shape, _ in layouts)
    architecture = launch.architecture(device)
    config = config or choose_coefficients(rank, dtype.itemsize)
    basis = basis or choose_basis(rank, dtype.itemsize, architecture)
    # Rows of c that start at multiples of 16 elements are loaded 16 bytes at a time.
    stride_c = triton.cdiv(rank, 16) * 16
    tiles_d, tiles_r = triton.cdiv(d, basis.block_d), triton.cdiv(rank, basis.block_r)
    programs = tiles_d * tiles_r * len(layouts)
    split_rows = rows_per_split(max(n_rows, 1), programs, basis, launch.processors(device))
    splits = triton.cdiv(n_rows, split_rows)

    copied: list[tuple[bool, bool]] = []
    strides: list[int] = []
    basis_strides: list[int] = []
    reach = 0
    for x_shape, x_stride, g_stride, (_, r), (stride_ud, stride_ur) in layouts:
        copies: list[bool] = []
        rows: list[int] = []
        for stride in (x_stride, g_stride):
            t = torch.empty_strided(x_shape, stride, device="meta")
            addressed, inner_rows, stride_o, stride_i = launch.flatten_rows(t)
            copies.append(addressed is not t)
            rows += (inner_rows, stride_o, stride_i, addressed.stride(-1))
            reach = max(reach, padded(d) * addressed.stride(-1))
        copied.append((copies[0], copies[1]))
        strides += (*rows, r, stride_ud, stride_ur)
        basis_strides += (*rows, r)
        reach = max(reach, padded(d) * stride_ud + padded(rank) * stride_ur, padded(d) * stride_c)
    shared = {
        "WIDEN": tiles.INTERPRETING and dtype is torch.bfloat16,
        "PRECISION": precision,
        "WIDE": reach >= 2**31,
    }
    repeat = 2 // len(layouts)
    return Plan(
        tuple(copied),
        (n_rows, stride_c),
        (len(layouts), splits, d, stride_c),
        (triton.cdiv(n_rows, config.block_n), len(layouts)),
        (n_rows, d, stride_c, *strides * repeat),
        shared
        | {
            "HAS_A": has_a,
            "HAS_Y": has_y,
            "STREAMED": config.streamed,
            "BLOCK_N": config.block_n,
            "BLOCK_W": config.block_w,
            "BLOCK_K": config.block_k,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
        (tiles_d * tiles_r, splits, len(layouts)),
        (n_rows, d, stride_c, split_rows, tiles_r, *basis_strides * repeat),
        shared
        | {
            "BLOCK_N": basis.block_n,
            "BLOCK_D": basis.block_d,
            "BLOCK_R": basis.block_r,
            "num_warps": basis.num_warps,
            "num_stages": basis.num_stages,
        },
    )
