"""The fused keys: projection, RMSNorm of every head, rotary embedding.

    y = R(N((k U) U^T))                k, y (N, d), U (d, r), d = heads x head_dim
    N(p) = w p / sqrt(mean(p^2) + eps)                            over a head, if there is a weight w
    R(p) = (p1 cos1 - p2 sin1, p2 cos2 + p1 sin2)                 on the pairs (p1, p2) of a head

Pass 1 accumulates c = k U for a tile of rows. Pass 2 takes the heads one by one, each as two products c U1^T and
c U2^T with the rows of U that give the first and the second elements of its pairs, so that a pair meets in the
registers of one thread: norm and rotation cost no traffic. The store goes to a contiguous y or into a cache.

`pull_back_kernel` carries a gradient g of y back to the projection p = (k U) U^T, h = N'(R^T g), element by element;
then dk = (h U) U^T is a projection. See csrc_notes/rope.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spd_kernels import launch, tiles
from spd_kernels.project.kernel import MAX_ROWS, padded
from spd_kernels.rope.config import (
    PULL_BACK_WARPS,
    RopeConfig,
    choose,
    heads_per_program,
    holds_angles,
    padded_half,
    pull_back_rows,
)
from spd_kernels.tiles import contract, dot, row_offsets, span


@triton.jit
def _pairs(
    rows,
    stride,
    mask_n,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """First and second elements of a head's pairs, each (BLOCK_N, HALF) in fp32, read as they lie in memory."""
    if INTERLEAVED:
        offsets = span(0, 2 * HALF, WIDE)
        mask = mask_n[:, None] & (offsets < HEAD_DIM)[None, :]
        both = tl.load(rows + (offsets * stride)[None, :], mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(both, (BLOCK_N, HALF, 2)))
    else:
        offsets = span(0, HALF, WIDE)
        mask = mask_n[:, None] & (offsets < HEAD_DIM // 2)[None, :]
        first = tl.load(rows + (offsets * stride)[None, :], mask=mask, other=0.0)
        second = tl.load(rows + ((HEAD_DIM // 2 + offsets) * stride)[None, :], mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _angles(
    rows,
    stride,
    mask_n,
    FULL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Cosines or sines of the first and of the second elements; FULL if memory holds one an element, not one a pair."""
    if FULL:
        first, second = _pairs(rows, stride, mask_n, INTERLEAVED, WIDE, HEAD_DIM, HALF, BLOCK_N)
    else:
        offsets = span(0, HALF, WIDE)
        mask = mask_n[:, None] & (offsets < HEAD_DIM // 2)[None, :]
        first = tl.load(rows + (offsets * stride)[None, :], mask=mask, other=0.0).to(tl.float32)
        second = first
    return first, second


@triton.jit
def _weights(w_ptr, stride, INTERLEAVED: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """The norm's weights of the first and of the second elements, each (1, HALF)."""
    return _pairs(w_ptr, stride, tl.full((1,), True, tl.int1), INTERLEAVED, False, HEAD_DIM, HALF, 1)


@triton.jit
def _scale(p1, p2, eps, HEAD_DIM: tl.constexpr):
    """1 / sqrt(mean(p^2) + eps) of every row, (BLOCK_N, 1); padding columns are 0."""
    return tl.rsqrt(tl.sum(p1 * p1 + p2 * p2, axis=1) / HEAD_DIM + eps)[:, None]


@triton.jit
def _store_pairs(
    y1,
    y2,
    rows,
    stride,
    mask_n,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
):
    """The inverse of `_pairs`."""
    y1 = y1.to(rows.dtype.element_ty)
    y2 = y2.to(rows.dtype.element_ty)
    if INTERLEAVED:
        offsets = span(0, 2 * HALF, WIDE)
        mask = mask_n[:, None] & (offsets < HEAD_DIM)[None, :]
        tl.store(rows + (offsets * stride)[None, :], tl.interleave(y1, y2), mask=mask)
    else:
        offsets = span(0, HALF, WIDE)
        mask = mask_n[:, None] & (offsets < HEAD_DIM // 2)[None, :]
        tl.store(rows + (offsets * stride)[None, :], y1, mask=mask)
        tl.store(rows + ((HEAD_DIM // 2 + offsets) * stride)[None, :], y2, mask=mask)


@triton.jit
def _tile(
    k_ptr,
    u_ptr,
    cos_ptr,
    sin_ptr,
    w_ptr,
    y_ptr,
    positions_ptr,
    c_ptr,
    tile,
    n_rows,
    d,
    r,
    first_head,
    last_head,
    eps,
    inner_rows_k,
    stride_ko,
    stride_ki,
    stride_kd,
    stride_ud,
    stride_ur,
    inner_rows_a,
    stride_ao,
    stride_ai,
    stride_ad,
    stride_w,
    steps,
    capacity,
    stride_pb,
    stride_pt,
    stride_yb,
    stride_yt,
    stride_yh,
    stride_yd,
    stride_c,
    HAS_NORM: tl.constexpr,
    FULL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CACHE: tl.constexpr,
    HOLD: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    STREAMED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of rows, some of its heads. BLOCK_W >= r, or STREAMED c passes through the slab in blocks of BLOCK_W."""
    local_rows = tl.arange(0, BLOCK_N)
    rows = tile * BLOCK_N + local_rows
    mask_n = rows < n_rows
    offsets_angle = row_offsets(rows, inner_rows_a, stride_ao, stride_ai)[:, None]
    cos_rows = cos_ptr + offsets_angle
    sin_rows = sin_ptr + offsets_angle
    if CACHE:
        position = tl.load(positions_ptr + row_offsets(rows, steps, stride_pb, stride_pt), mask=mask_n, other=-1).to(
            tl.int64
        )
        mask_y = (position >= 0) & (position < capacity)
        y_rows = y_ptr + ((rows // steps).to(tl.int64) * stride_yb + position * stride_yt)[:, None]
    else:
        mask_y = mask_n
        y_rows = y_ptr + (rows.to(tl.int64) * stride_yt)[:, None]

    offsets_h = span(0, HALF, WIDE)
    mask_h = offsets_h < HEAD_DIM // 2
    k_rows = k_ptr + row_offsets(rows, inner_rows_k, stride_ko, stride_ki)[:, None]
    if INTERLEAVED:
        u1_rows = u_ptr + (2 * offsets_h * stride_ud)[:, None]
        u2_rows = u_ptr + ((2 * offsets_h + 1) * stride_ud)[:, None]
    else:
        u1_rows = u_ptr + (offsets_h * stride_ud)[:, None]
        u2_rows = u_ptr + ((HEAD_DIM // 2 + offsets_h) * stride_ud)[:, None]
    if STREAMED:
        c_rows = c_ptr + (local_rows * stride_c)[:, None]
        for start_r in range(0, r, BLOCK_W):
            offsets_r = span(start_r, BLOCK_W, WIDE)
            mask_r = offsets_r < r
            c = contract(
                k_rows,
                u_ptr + (offsets_r * stride_ur)[None, :],
                mask_n,
                mask_r,
                d,
                stride_kd,
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
    else:
        offsets_r = span(0, BLOCK_W, WIDE)
        mask_r = offsets_r < r
        mask_u = mask_h[:, None] & mask_r[None, :]
        columns = (offsets_r * stride_ur)[None, :]
        c = contract(
            k_rows,
            u_ptr + columns,
            mask_n,
            mask_r,
            d,
            stride_kd,
            stride_ud,
            WIDEN,
            PRECISION,
            WIDE,
            BLOCK_N,
            BLOCK_W,
            BLOCK_K,
        ).to(u_ptr.dtype.element_ty)

    if HOLD:
        cos1, cos2 = _angles(cos_rows, stride_ad, mask_n, FULL, INTERLEAVED, WIDE, HEAD_DIM, HALF, BLOCK_N)
        sin1, sin2 = _angles(sin_rows, stride_ad, mask_n, FULL, INTERLEAVED, WIDE, HEAD_DIM, HALF, BLOCK_N)
    for head in range(first_head, last_head):
        p1 = tl.zeros((BLOCK_N, HALF), dtype=tl.float32)
        p2 = tl.zeros((BLOCK_N, HALF), dtype=tl.float32)
        start_u = head * HEAD_DIM * stride_ud
        if WIDE:
            start_u = tl.cast(head * HEAD_DIM, tl.int64) * stride_ud
        if STREAMED:
            for start_r in range(0, r, BLOCK_K):
                offsets_r = span(start_r, BLOCK_K, WIDE)
                mask_r = offsets_r < r
                mask_u = mask_h[:, None] & mask_r[None, :]
                columns = start_u + (offsets_r * stride_ur)[None, :]
                c = tl.load(c_rows + offsets_r[None, :], mask=mask_r[None, :], other=0.0)
                u1 = tl.load(u1_rows + columns, mask=mask_u, other=0.0)
                u2 = tl.load(u2_rows + columns, mask=mask_u, other=0.0)
                p1 = dot(c, tl.trans(u1), p1, WIDEN, PRECISION)
                p2 = dot(c, tl.trans(u2), p2, WIDEN, PRECISION)
        else:
            u1 = tl.load(u1_rows + start_u + columns, mask=mask_u, other=0.0)
            p1 = dot(c, tl.trans(u1), p1, WIDEN, PRECISION)
            u2 = tl.load(u2_rows + start_u + columns, mask=mask_u, other=0.0)
            p2 = dot(c, tl.trans(u2), p2, WIDEN, PRECISION)
        # Norm, cosines, sines, in this order: fewer tiles are alive at once.
        if HAS_NORM:
            scale = _scale(p1, p2, eps, HEAD_DIM)
            w1, w2 = _weights(w_ptr, stride_w, INTERLEAVED, HEAD_DIM, HALF)
            p1 *= scale * w1
            p2 *= scale * w2
        if not HOLD:
            cos1, cos2 = _angles(cos_rows, stride_ad, mask_n, FULL, INTERLEAVED, WIDE, HEAD_DIM, HALF, BLOCK_N)
        y1 = p1 * cos1
        y2 = p2 * cos2
        if not HOLD:
            sin1, sin2 = _angles(sin_rows, stride_ad, mask_n, FULL, INTERLEAVED, WIDE, HEAD_DIM, HALF, BLOCK_N)
        _store_pairs(
            y1 - p2 * sin1,
            y2 + p1 * sin2,
            y_rows + tl.cast(head, tl.int64) * stride_yh,
            stride_yd,
            mask_y,
            INTERLEAVED,
            WIDE,
            HEAD_DIM,
            HALF,
        )
    if STREAMED:
        tl.debug_barrier()  # c is read before the next tile of this program overwrites it


@triton.jit
def rope_kernel(
    k_ptr,
    u_ptr,
    cos_ptr,
    sin_ptr,
    w_ptr,
    y_ptr,
    positions_ptr,
    c_ptr,
    n_rows,
    d,
    r,
    n_heads,
    heads_each,
    eps,
    inner_rows_k,
    stride_ko,
    stride_ki,
    stride_kd,
    stride_ud,
    stride_ur,
    inner_rows_a,
    stride_ao,
    stride_ai,
    stride_ad,
    stride_w,
    steps,
    capacity,
    stride_pb,
    stride_pt,
    stride_yb,
    stride_yt,
    stride_yh,
    stride_yd,
    stride_c,
    HAS_NORM: tl.constexpr,
    FULL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CACHE: tl.constexpr,
    HOLD: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    STREAMED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Heads of this program's share, of one tile of rows, or STREAMED of every so many tiles."""
    first_head = tl.program_id(1) * heads_each
    last_head = tl.minimum(first_head + heads_each, n_heads)
    if STREAMED:
        slab = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_N), tl.num_programs(0)):
            _tile(
                k_ptr,
                u_ptr,
                cos_ptr,
                sin_ptr,
                w_ptr,
                y_ptr,
                positions_ptr,
                c_ptr + slab * BLOCK_N * stride_c,
                tile,
                n_rows,
                d,
                r,
                first_head,
                last_head,
                eps,
                inner_rows_k,
                stride_ko,
                stride_ki,
                stride_kd,
                stride_ud,
                stride_ur,
                inner_rows_a,
                stride_ao,
                stride_ai,
                stride_ad,
                stride_w,
                steps,
                capacity,
                stride_pb,
                stride_pt,
                stride_yb,
                stride_yt,
                stride_yh,
                stride_yd,
                stride_c,
                HAS_NORM,
                FULL,
                INTERLEAVED,
                CACHE,
                HOLD,
                WIDEN,
                PRECISION,
                WIDE,
                STREAMED,
                HEAD_DIM,
                HALF,
                BLOCK_N,
                BLOCK_W,
                BLOCK_K,
            )
    else:
        _tile(
            k_ptr,
            u_ptr,
            cos_ptr,
            sin_ptr,
            w_ptr,
            y_ptr,
            positions_ptr,
            c_ptr,
            tl.program_id(0),
            n_rows,
            d,
            r,
            first_head,
            last_head,
            eps,
            inner_rows_k,
            stride_ko,
            stride_ki,
            stride_kd,
            stride_ud,
            stride_ur,
            inner_rows_a,
            stride_ao,
            stride_ai,
            stride_ad,
            stride_w,
            steps,
            capacity,
            stride_pb,
            stride_pt,
            stride_yb,
            stride_yt,
            stride_yh,
            stride_yd,
            stride_c,
            HAS_NORM,
            FULL,
            INTERLEAVED,
            CACHE,
            HOLD,
            WIDEN,
            PRECISION,
            WIDE,
            STREAMED,
            HEAD_DIM,
            HALF,
            BLOCK_N,
            BLOCK_W,
            BLOCK_K,
        )


@triton.jit
def pull_back_kernel(
    g_ptr,
    p_ptr,
    cos_ptr,
    sin_ptr,
    w_ptr,
    h_ptr,
    n_rows,
    d,
    n_heads,
    heads_each,
    eps,
    inner_rows_g,
    stride_go,
    stride_gi,
    stride_gd,
    inner_rows_a,
    stride_ao,
    stride_ai,
    stride_ad,
    stride_w,
    HAS_NORM: tl.constexpr,
    FULL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """h = N'(R^T g) for some heads of one tile of rows; p and h are contiguous and may be one."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = rows < n_rows
    offsets_angle = row_offsets(rows, inner_rows_a, stride_ao, stride_ai)[:, None]
    cos1, cos2 = _angles(cos_ptr + offsets_angle, stride_ad, mask_n, FULL, INTERLEAVED, WIDE, HEAD_DIM, HALF, BLOCK_N)
    sin1, sin2 = _angles(sin_ptr + offsets_angle, stride_ad, mask_n, FULL, INTERLEAVED, WIDE, HEAD_DIM, HALF, BLOCK_N)
    offsets_g = row_offsets(rows, inner_rows_g, stride_go, stride_gi)[:, None]
    offsets_h = (rows.to(tl.int64) * d)[:, None]
    first_head = tl.program_id(1) * heads_each
    for head in range(first_head, tl.minimum(first_head + heads_each, n_heads)):
        column = head * HEAD_DIM
        start_g = column * stride_gd
        if WIDE:
            start_g = tl.cast(column, tl.int64) * stride_gd
        g1, g2 = _pairs(g_ptr + start_g + offsets_g, stride_gd, mask_n, INTERLEAVED, WIDE, HEAD_DIM, HALF, BLOCK_N)
        h1 = g1 * cos1 + g2 * sin2
        h2 = g2 * cos2 - g1 * sin1
        if HAS_NORM:
            p1, p2 = _pairs(p_ptr + column + offsets_h, 1, mask_n, INTERLEAVED, False, HEAD_DIM, HALF, BLOCK_N)
            scale = _scale(p1, p2, eps, HEAD_DIM)
            w1, w2 = _weights(w_ptr, stride_w, INTERLEAVED, HEAD_DIM, HALF)
            p1 *= scale
            p2 *= scale
            h1 *= w1
            h2 *= w2
            along = (tl.sum(h1 * p1 + h2 * p2, axis=1) / HEAD_DIM)[:, None]
            h1 = scale * (h1 - p1 * along)
            h2 = scale * (h2 - p2 * along)
        _store_pairs(h1, h2, h_ptr + column + offsets_h, 1, mask_n, INTERLEAVED, False, HEAD_DIM, HALF)


def launch_rope(
    k: torch.Tensor,
    u: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_dim: int,
    norm_weight: torch.Tensor | None,
    eps: float,
    interleaved: bool,
    *,
    cache: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: RopeConfig | None = None,
) -> torch.Tensor:
    """One launch. The result goes to the cache, else to a contiguous `out` of k's shape, else to a new tensor."""
    d, rank = u.shape
    n_rows = _rows(k)
    y = out if cache is None else cache
    if y is None:
        y = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if n_rows == 0:
        return y

    n_heads, half = d // head_dim, padded_half(head_dim)
    if config is None:
        config = choose(n_rows, rank, head_dim, k.element_size(), launch.architecture(k.device), interleaved)
    processors = launch.processors(k.device)
    programs = triton.cdiv(n_rows, config.block_n)
    heads_each = heads_per_program(programs, n_heads, processors)
    shares = triton.cdiv(n_heads, heads_each)
    slab, stride_c = y, 0
    if config.streamed:
        programs = min(programs, max(1, 2 * processors // shares))
        stride_c = triton.cdiv(rank, config.block_w) * config.block_w
        slab = torch.empty((shares * programs * config.block_n, stride_c), dtype=k.dtype, device=k.device)

    rows_k, *layout_k = launch.flatten_rows(k)
    cos, sin, layout_a = _flatten_angles(cos, sin, k.shape[:-1])
    if cache is None or positions is None:
        steps, capacity, layout_p, layout_y = 1, 0, (0, 0), (0, d, head_dim, 1)
    else:
        steps, capacity = k.shape[1], cache.shape[2]
        layout_p = (positions.stride(0) if positions.dim() == 2 else 0, positions.stride(-1))
        layout_y = (cache.stride(0), cache.stride(2), cache.stride(1), cache.stride(3))
    full = cos.shape[-1] == head_dim
    reach = max(
        padded(d) * rows_k.stride(-1),
        padded(d) * u.stride(0) + padded(rank) * u.stride(1),
        padded(head_dim) * max(layout_a[-1], layout_y[-1]),
    )
    with launch.guard(k.device):
        rope_kernel[(programs, shares)](
            rows_k,
            u,
            cos,
            sin,
            y if norm_weight is None else norm_weight,
            y,
            y if positions is None else positions,
            slab,
            n_rows,
            d,
            rank,
            n_heads,
            heads_each,
            eps,
            *layout_k,
            rows_k.stride(-1),
            u.stride(0),
            u.stride(1),
            *layout_a,
            0 if norm_weight is None else norm_weight.stride(0),
            steps,
            capacity,
            *layout_p,
            *layout_y,
            stride_c,
            HAS_NORM=norm_weight is not None,
            FULL=full,
            INTERLEAVED=interleaved,
            CACHE=cache is not None,
            HOLD=holds_angles(config, head_dim, full),
            WIDEN=tiles.INTERPRETING and k.dtype is torch.bfloat16,
            PRECISION=launch.precision(k.dtype),
            WIDE=reach >= 2**31,
            STREAMED=config.streamed,
            HEAD_DIM=head_dim,
            HALF=half,
            BLOCK_N=config.block_n,
            BLOCK_W=config.block_w,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y


def launch_pull_back(
    g: torch.Tensor,
    p: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_dim: int,
    norm_weight: torch.Tensor | None,
    eps: float,
    interleaved: bool,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One launch. p is contiguous, needed only where there is a norm, and may be `out`."""
    assert (p is None) == (norm_weight is None) and (p is None or p.is_contiguous())
    d = g.shape[-1]
    n_rows, n_heads = _rows(g), d // head_dim
    h = torch.empty(g.shape, dtype=g.dtype, device=g.device) if out is None else out
    if n_rows == 0:
        return h
    block_n = pull_back_rows(head_dim)
    programs = triton.cdiv(n_rows, block_n)
    heads_each = heads_per_program(programs, n_heads, launch.processors(g.device))
    rows_g, *layout_g = launch.flatten_rows(g)
    cos, sin, layout_a = _flatten_angles(cos, sin, g.shape[:-1])
    reach = max(padded(d) * rows_g.stride(-1), padded(head_dim) * layout_a[-1])
    with launch.guard(g.device):
        pull_back_kernel[(programs, triton.cdiv(n_heads, heads_each))](
            rows_g,
            h if p is None else p,
            cos,
            sin,
            h if norm_weight is None else norm_weight,
            h,
            n_rows,
            d,
            n_heads,
            heads_each,
            eps,
            *layout_g,
            rows_g.stride(-1),
            *layout_a,
            0 if norm_weight is None else norm_weight.stride(0),
            HAS_NORM=norm_weight is not None,
            FULL=cos.shape[-1] == head_dim,
            INTERLEAVED=interleaved,
            WIDE=reach >= 2**31,
            HEAD_DIM=head_dim,
            HALF=padded_half(head_dim),
            BLOCK_N=block_n,
            num_warps=PULL_BACK_WARPS,
        )
    return h


def _rows(x: torch.Tensor) -> int:
    n_rows = x.numel() // x.shape[-1]
    if n_rows > MAX_ROWS:
        raise ValueError(f"k: expected at most {MAX_ROWS} rows; got {n_rows}")
    return n_rows


def _flatten_angles(
    cos: torch.Tensor, sin: torch.Tensor, lead: torch.Size
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int, int, int]]:
    """Both tables as rows over the leading shape of k, in one layout: inner rows, outer, inner and column strides."""
    if cos.stride() != sin.stride():
        cos, sin = (t.clone(memory_format=torch.contiguous_format) for t in (cos, sin))
    cos, *layout = launch.flatten_rows(cos.expand(*lead, cos.shape[-1]))
    sin, *_ = launch.flatten_rows(sin.expand(*lead, sin.shape[-1]))
    return cos, sin, (layout[0], layout[1], layout[2], cos.stride(-1))
