"""Attention over latents.

    k_i = R(p_i) N(U_K c_k,i)        s_hi = q_h . k_i        z_h = sum_i softmax(s_h)_i c_v,i        o_h = U_V,h z_h

U_K and U_V are the rows of a query head's key head, N is an optional RMSNorm, R(p) the rotation by p; or k_i is given.
`latent_attention_kernel` gives (max, sum, z) of the tokens of one split, for as many key heads as fill a block of query
rows: their scores are one sum, since a row is zero in the products of other heads than its own. Tokens are the rows of
every product, so that the few query rows fill no matrix unit's rows in vain. `combine_kernel` merges the splits and
expands. See csrc_notes/latent_attention.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spd_kernels import launch, tiles
from spd_kernels.latent_attention.config import (
    BLOCK_H,
    COMBINE,
    LatentAttentionConfig,
    choose,
    rows_per_program,
    splits_for,
)
from spd_kernels.tiles import dot, span

_LOG2_E = 1.4426950408889634


@triton.jit
def _angles(
    cos_ptr,
    sin_ptr,
    p,
    mask_t,
    table_rows,
    origin,
    offsets_f,
    mask_f,
    stride_cp,
    stride_cf,
    DTYPE: tl.constexpr,
    RELATIVE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Cosines and sines of a tile's positions, (BLOCK_T, BLOCK_F), in the keys' type: half the registers.

    RELATIVE: as R(p) = R(origin) R(0)^-1 R(p - origin).
    """
    rows = p - origin
    inside = (rows < table_rows)[:, None]
    mask = mask_t[:, None] & mask_f[None, :] & inside
    if WIDE:
        rows = rows.to(tl.int64)
    cos_rows = cos_ptr + (rows * stride_cp)[:, None]
    sin_rows = sin_ptr + (rows * stride_cp)[:, None]
    cos = tl.load(cos_rows + (offsets_f * stride_cf)[None, :], mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_rows + (offsets_f * stride_cf)[None, :], mask=mask, other=0.0).to(tl.float32)
    if RELATIVE:
        row = tl.cast(origin, tl.int64)
        cos_0 = tl.load(cos_ptr + offsets_f * stride_cf, mask=mask_f, other=1.0).to(tl.float32)
        sin_0 = tl.load(sin_ptr + offsets_f * stride_cf, mask=mask_f, other=0.0).to(tl.float32)
        cos_o = tl.load(cos_ptr + row * stride_cp + offsets_f * stride_cf, mask=mask_f, other=0.0).to(tl.float32)
        sin_o = tl.load(sin_ptr + row * stride_cp + offsets_f * stride_cf, mask=mask_f, other=0.0).to(tl.float32)
        scale = 1.0 / (cos_0 * cos_0 + sin_0 * sin_0)  # not 1 where the table carries a factor
        cos_r = ((cos_o * cos_0 + sin_o * sin_0) * scale)[None, :]
        sin_r = ((sin_o * cos_0 - cos_o * sin_0) * scale)[None, :]
        turned = cos_r * cos - sin_r * sin
        sin = sin_r * cos + cos_r * sin
        cos = turned
    cos = tl.where(inside, cos, float("nan"))  # no row, no number: rather than a wrong one
    return cos.to(DTYPE), sin.to(DTYPE)


@triton.jit
def _expanded_pair(
    c,
    c_rows,
    mask_t,
    u_first,
    u_second,
    mask_f,
    rank,
    stride_cr,
    stride_ur,
    RESIDENT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The two coordinates of every pair that is rotated, (BLOCK_T, BLOCK_F) each: latents times rows of U.

    u_first and u_second (BLOCK_F, 1) point at column 0 of those rows. c is the tile of latents if RESIDENT.
    """
    first = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
    second = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
    if RESIDENT:
        offsets_r = span(0, BLOCK_R, WIDE)
        mask = mask_f[:, None] & (offsets_r < rank)[None, :]
        u_1 = tl.load(u_first + (offsets_r * stride_ur)[None, :], mask=mask, other=0.0)
        u_2 = tl.load(u_second + (offsets_r * stride_ur)[None, :], mask=mask, other=0.0)
        first = dot(c, tl.trans(u_1), first, WIDEN, PRECISION)
        second = dot(c, tl.trans(u_2), second, WIDEN, PRECISION)
    else:
        for start in range(0, rank, BLOCK_R):
            offsets_r = span(start, BLOCK_R, WIDE)
            mask_r = offsets_r < rank
            mask = mask_f[:, None] & mask_r[None, :]
            part = tl.load(c_rows + (offsets_r * stride_cr)[None, :], mask=mask_t[:, None] & mask_r[None, :], other=0.0)
            u_1 = tl.load(u_first + (offsets_r * stride_ur)[None, :], mask=mask, other=0.0)
            u_2 = tl.load(u_second + (offsets_r * stride_ur)[None, :], mask=mask, other=0.0)
            first = dot(part, tl.trans(u_1), first, WIDEN, PRECISION)
            second = dot(part, tl.trans(u_2), second, WIDEN, PRECISION)
    return first, second


@triton.jit
def latent_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    u_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    lengths_ptr,
    norm_ptr,
    max_ptr,
    sum_ptr,
    z_ptr,
    tokens,
    table_rows,
    n_rows,
    queries,
    group_rows,
    program_rows,
    slices,
    rank_k,
    rank_v,
    scale,
    eps,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kr,
    stride_vb,
    stride_vt,
    stride_vr,
    stride_ud,
    stride_ur,
    stride_cp,
    stride_cf,
    stride_pb,
    HEAD_DIM: tl.constexpr,
    LATENT: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    RELATIVE: tl.constexpr,
    RESIDENT: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One split of the tokens, one block of query rows (h, t) and one slice of the latents of V, of one sequence.

    A head has group_rows = G Tq rows. BLOCK_F is the step over the pairs of a head, or without LATENT over D.
    """
    split = tl.program_id(0)
    block = tl.program_id(1) // slices
    slice_v = tl.program_id(1) % slices
    batch = tl.program_id(2).to(tl.int64)

    first_row = block * program_rows
    end_row = tl.minimum(first_row + program_rows, n_rows)
    rows = first_row + tl.arange(0, BLOCK_H)
    mask_h = rows < end_row
    first_head = first_row // group_rows
    last_head = (end_row - 1) // group_rows
    heads = rows // group_rows
    q_rows = q_ptr + ((batch * n_rows + rows) * HEAD_DIM)[:, None]

    length = tokens
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths_ptr + batch), tokens).to(tl.int32)
    # A row sees the tokens before its own and its own; the queries are the last tokens.
    seen = length - queries + 1 + rows % queries
    share = tl.cdiv(tl.cdiv(length, BLOCK_T), tl.num_programs(0)) * BLOCK_T
    start_split = split * share
    end_split = tl.minimum(start_split + share, length)

    offsets_v = slice_v * BLOCK_V + span(0, BLOCK_V, WIDE)
    mask_v = offsets_v < rank_v
    top = tl.full((BLOCK_H,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    z = tl.zeros((BLOCK_V, BLOCK_H), dtype=tl.float32)

    for start in range(start_split, end_split, BLOCK_T):
        offsets_t = start + tl.arange(0, BLOCK_T)
        mask_t = offsets_t < end_split
        p = offsets_t
        if HAS_POSITIONS:
            p = tl.load(positions_ptr + batch * stride_pb + offsets_t, mask=mask_t, other=-1)
            p = p.to(tl.int32)
            mask_t = mask_t & (p >= 0)
        token_rows = offsets_t.to(tl.int64)
        k_rows = k_ptr + batch * stride_kb + (token_rows * stride_kt)[:, None]
        v_rows = v_ptr + batch * stride_vb + (token_rows * stride_vt)[:, None]

        s = tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32)
        if LATENT:
            half: tl.constexpr = HEAD_DIM // 2
            step_d: tl.constexpr = 2 if INTERLEAVED else 1
            apart: tl.constexpr = 1 if INTERLEAVED else half
            # Where a tile's positions follow one another, only the first one's row is read beside the first BLOCK_T
            # rows of the table, which stay in the first-level cache.
            origin = 0
            if RELATIVE:
                first_p = start
                if HAS_POSITIONS:
                    first_p = tl.load(positions_ptr + batch * stride_pb + start)
                    first_p = first_p.to(tl.int32)
                astray = tl.sum((mask_t & (p - first_p != offsets_t - start)).to(tl.int32))
                follows = (astray == 0) & (first_p >= 0) & (first_p <= table_rows - BLOCK_T)
                origin = tl.where(follows, first_p, 0)
            squares = tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32)
            offsets_r = span(0, BLOCK_R, WIDE)
            c = k_rows
            if RESIDENT:
                mask_c = mask_t[:, None] & (offsets_r < rank_k)[None, :]
                c = tl.load(k_rows + (offsets_r * stride_kr)[None, :], mask=mask_c, other=0.0)
            for start_f in range(0, half, BLOCK_F):
                offsets_f = span(start_f, BLOCK_F, WIDE)
                mask_f = (offsets_f < half) | (half % BLOCK_F == 0)
                if ROTATED:
                    cos, sin = _angles(
                        cos_ptr,
                        sin_ptr,
                        p,
                        mask_t,
                        table_rows,
                        origin,
                        offsets_f,
                        mask_f,
                        stride_cp,
                        stride_cf,
                        q_ptr.dtype.element_ty,
                        RELATIVE,
                        WIDE,
                    )
                for head in range(first_head, last_head + 1):
                    offsets_d = offsets_f * step_d
                    own = mask_h & (heads == head)
                    rows_u = tl.cast(head * HEAD_DIM + offsets_d, tl.int64)
                    first, second = _expanded_pair(
                        c,
                        k_rows,
                        mask_t,
                        u_ptr + (rows_u * stride_ud)[:, None],
                        u_ptr + ((rows_u + apart) * stride_ud)[:, None],
                        mask_f,
                        rank_k,
                        stride_kr,
                        stride_ur,
                        RESIDENT,
                        WIDEN,
                        PRECISION,
                        WIDE,
                        BLOCK_T,
                        BLOCK_F,
                        BLOCK_R,
                    )
                    if HAS_NORM:
                        squares += tl.where(own[None, :], tl.sum(first * first + second * second, axis=1)[:, None], 0.0)
                        weight_1 = tl.load(norm_ptr + offsets_d, mask=mask_f, other=0.0)
                        weight_2 = tl.load(norm_ptr + offsets_d + apart, mask=mask_f, other=0.0)
                        first = first * weight_1.to(tl.float32)[None, :]
                        second = second * weight_2.to(tl.float32)[None, :]
                    if ROTATED:
                        turned = first * cos - second * sin
                        second = second * cos + first * sin
                        first = turned
                    mask_q = own[:, None] & mask_f[None, :]
                    q_1 = tl.load(q_rows + offsets_d[None, :], mask=mask_q, other=0.0)
                    q_2 = tl.load(q_rows + (offsets_d + apart)[None, :], mask=mask_q, other=0.0)
                    s = dot(first.to(q_1.dtype), tl.trans(q_1), s, WIDEN, PRECISION)
                    s = dot(second.to(q_2.dtype), tl.trans(q_2), s, WIDEN, PRECISION)
            if HAS_NORM:
                s = s * tl.rsqrt(squares * (1.0 / HEAD_DIM) + eps)  # one factor for a token and a head
        else:
            for head in range(first_head, last_head + 1):
                own = mask_h & (heads == head)
                head_rows = k_rows + tl.cast(head, tl.int64) * stride_kh
                for start_d in tl.static_range(0, HEAD_DIM, BLOCK_F):
                    offsets_d = span(start_d, BLOCK_F, WIDE)
                    mask_d = offsets_d < HEAD_DIM
                    mask_k = mask_t[:, None] & mask_d[None, :]
                    k = tl.load(head_rows + (offsets_d * stride_kr)[None, :], mask=mask_k, other=0.0)
                    mask_q = own[:, None] & mask_d[None, :]
                    q = tl.load(q_rows + offsets_d[None, :], mask=mask_q, other=0.0)
                    s = dot(k, tl.trans(q), s, WIDEN, PRECISION)

        visible = mask_t[:, None] & (offsets_t[:, None] < seen[None, :])
        s = tl.where(visible, s * scale, -float("inf"))  # in powers of two
        new_top = tl.maximum(top, tl.max(s, axis=0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(s - shift[None, :])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, axis=0)
        mask_c = mask_t[:, None] & mask_v[None, :]
        c_v = tl.load(v_rows + (offsets_v * stride_vr)[None, :], mask=mask_c, other=0.0)
        z = dot(tl.trans(c_v), weights.to(c_v.dtype), z * fade[None, :], WIDEN, PRECISION)
        top = new_top

    out_rows = (batch * tl.num_programs(0) + split) * n_rows + rows
    if slice_v == 0:
        tl.store(max_ptr + out_rows, top, mask=mask_h)
        tl.store(sum_ptr + out_rows, total, mask=mask_h)
    z_rows = z_ptr + (out_rows * rank_v)[None, :]
    tl.store(z_rows + offsets_v[:, None], z, mask=mask_v[:, None] & mask_h[None, :])


@triton.jit
def combine_kernel(
    max_ptr,
    sum_ptr,
    z_ptr,
    u_ptr,
    out_ptr,
    splits,
    n_rows,
    group_rows,
    head_dim,
    rank,
    stride_ud,
    stride_ur,
    WIDE: tl.constexpr,
    ALL_SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One query row: its splits' sums made one, BLOCK_R latents at a time, and expanded to BLOCK_D coordinates."""
    row = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    offsets_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offsets_d < head_dim
    u_rows = u_ptr + (((row // group_rows) * head_dim + offsets_d).to(tl.int64) * stride_ud)[:, None]
    part_rows = batch * splits * n_rows + row  # of split 0

    every = tl.arange(0, ALL_SPLITS)
    mask_every = every < splits
    tops = tl.load(max_ptr + part_rows + every * n_rows, mask=mask_every, other=-float("inf"))
    totals = tl.load(sum_ptr + part_rows + every * n_rows, mask=mask_every, other=0.0)
    top = tl.max(tops, axis=0)
    shift = tl.where(top == -float("inf"), 0.0, top)  # of a row that sees nothing
    total = tl.sum(tl.exp2(tops - shift) * totals, axis=0)
    total = tl.where(total == 0.0, 1.0, total)

    y = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start_r in range(0, rank, BLOCK_R):
        offsets_r = span(start_r, BLOCK_R, WIDE)
        mask_r = offsets_r < rank
        z = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for start_s in range(0, splits, BLOCK_S):
            offsets_s = start_s + tl.arange(0, BLOCK_S)
            mask_s = offsets_s < splits
            parts = part_rows + offsets_s.to(tl.int64) * n_rows
            weights = tl.exp2(tl.load(max_ptr + parts, mask=mask_s, other=-float("inf")) - shift)
            part = tl.load(
                z_ptr + (parts * rank)[:, None] + offsets_r[None, :], mask=mask_s[:, None] & mask_r[None, :], other=0.0
            )
            z += tl.sum(weights[:, None] * part, axis=0)
        u = tl.load(u_rows + (offsets_r * stride_ur)[None, :], mask=mask_d[:, None] & mask_r[None, :], other=0.0)
        y += tl.sum(u.to(tl.float32) * z[None, :], axis=1)
    y_row = out_ptr + (batch * n_rows + row) * head_dim
    tl.store(y_row + offsets_d, (y / total).to(out_ptr.dtype.element_ty), mask=mask_d)


# The second and third axes of a CUDA grid are 16-bit, and so is what remains of the second beside slices.
_MAX_GRID = 65535
_MAX_TOKENS = 2**31 - 2**20


def launch_latent_attention(
    q: torch.Tensor,
    c_k: torch.Tensor,
    c_v: torch.Tensor,
    u_k: torch.Tensor | None,
    u_v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_heads: int,
    scale: float | None = None,
    positions: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    out: torch.Tensor | None = None,
    config: LatentAttentionConfig | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Two launches. `out` is contiguous and of q's shape; `config` and `splits` replace the frozen choices.

    The grid follows from shapes and the device alone, never from lengths: it can be captured in a CUDA graph.
    """
    batch, heads, queries, head_dim = q.shape
    tokens, rank_v = c_v.shape[1:]
    rank_k = None if u_k is None else u_k.shape[1]
    if tokens > _MAX_TOKENS:
        raise ValueError(f"c_v: expected at most {_MAX_TOKENS} tokens; got {tokens}")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if tokens == 0:
        return out.zero_()

    n_rows, group_rows = heads * queries, heads // kv_heads * queries
    if config is None:
        config = choose(rank_k, rank_v, q.element_size(), launch.architecture(q.device))
    program_rows = rows_per_program(group_rows)
    slices = triton.cdiv(rank_v, config.block_v)
    blocks = triton.cdiv(n_rows, program_rows)
    if max(batch, blocks * slices) > _MAX_GRID:
        raise ValueError(f"q: expected at most {_MAX_GRID} sequences and blocks of rows; got {tuple(q.shape)}")
    if splits is None:
        splits = splits_for(tokens, batch * blocks * slices, config, launch.processors(q.device))
    tops = torch.empty((batch, splits, n_rows), dtype=torch.float32, device=q.device)
    totals = torch.empty_like(tops)
    z = torch.empty((batch, splits, n_rows, rank_v), dtype=torch.float32, device=q.device)

    latent, rotated = u_k is not None, u_k is not None and cos is not None
    q = q.contiguous()  # a copy for several queries alone
    u = u_v if u_k is None else u_k
    if cos is None or sin is None:
        cos = sin = u
    elif cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    where = q if positions is None else positions if positions.stride(1) == 1 else positions.contiguous()
    reach = max(_reach(c_k, -1), _reach(c_v, -1), _reach(u, 0) + _reach(u, 1), _reach(cos, 0) + _reach(cos, 1))
    wide = max(reach, _reach(u_v, 1)) >= 2**31
    with launch.guard(q.device):
        latent_attention_kernel[(splits, blocks * slices, batch)](
            q,
            c_k,
            c_v,
            u,
            cos,
            sin,
            where,
            q if lengths is None else lengths.contiguous(),
            q if norm_weight is None else norm_weight.contiguous(),
            tops,
            totals,
            z,
            tokens,
            cos.shape[0],
            n_rows,
            queries,
            group_rows,
            program_rows,
            slices,
            0 if rank_k is None else rank_k,
            rank_v,
            (head_dim**-0.5 if scale is None else scale) * _LOG2_E,
            eps,
            c_k.stride(0),
            0 if latent else c_k.stride(1),
            c_k.stride(-2),
            c_k.stride(-1),
            *c_v.stride(),
            *u.stride(),
            *cos.stride(),
            where.stride(0),
            HEAD_DIM=head_dim,
            LATENT=latent,
            ROTATED=rotated,
            INTERLEAVED=interleaved,
            HAS_POSITIONS=positions is not None,
            HAS_LENGTHS=lengths is not None,
            HAS_NORM=norm_weight is not None,
            # 32-bit results keep to the very numbers of the table, 16-bit ones err more than it does.
            RELATIVE=rotated and q.element_size() == 2,
            RESIDENT=not config.streamed,
            WIDEN=tiles.INTERPRETING and q.dtype is torch.bfloat16,
            PRECISION=launch.float32_precision(),
            WIDE=wide,
            BLOCK_T=config.block_t,
            BLOCK_H=BLOCK_H,
            BLOCK_V=config.block_v,
            BLOCK_F=min(config.block_f, max(16, triton.next_power_of_2(head_dim // 2 if latent else head_dim))),
            BLOCK_R=config.block_r,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        combine_kernel[(n_rows, triton.cdiv(head_dim, COMBINE.block_d), batch)](
            tops,
            totals,
            z,
            u_v,
            out,
            splits,
            n_rows,
            group_rows,
            head_dim,
            rank_v,
            *u_v.stride(),
            WIDE=wide,
            ALL_SPLITS=triton.next_power_of_2(splits),
            BLOCK_S=COMBINE.block_s,
            BLOCK_D=COMBINE.block_d,
            BLOCK_R=COMBINE.block_r,
            num_warps=COMBINE.num_warps,
            num_stages=COMBINE.num_stages,
        )
    return out


def _reach(tensor: torch.Tensor, axis: int) -> int:
    """Largest offset along an axis that a block over it can address, plus one."""
    return (tensor.shape[axis] + 256) * tensor.stride(axis)
