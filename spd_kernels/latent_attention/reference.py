"""The specification of attention over latents: expand everything, norm, rotate, mask, softmax. float64-capable."""

from __future__ import annotations

import torch


def latent_attention_reference(
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
) -> torch.Tensor:
    """See `latent_attention`; angles here are (positions, D / 2)."""
    batch, heads, queries, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    there, seen = visibility(batch, queries, c_v.shape[1], positions, lengths, q.device)
    k = c_k
    if u_k is not None:
        k = expand_heads(torch.where(there[..., None], c_k, 0), u_k, kv_heads)
        k = rotated_keys(k, cos, sin, positions, norm_weight, eps, interleaved)
    v = expand_heads(torch.where(there[..., None], c_v, 0), u_v, kv_heads)
    k, v = (side.repeat_interleave(heads // kv_heads, dim=1) for side in (k, v))
    visible = (there[:, None] & seen)[:, None]  # (B, 1, Tq, T)
    scores = (q @ k.mT * scale).masked_fill(~visible, -torch.inf)
    p = torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return p.masked_fill(~visible.any(-1, keepdim=True), 0.0) @ v


def visibility(
    batch: int,
    queries: int,
    tokens: int,
    positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are there (B, T), and which ones a query may see by their order (B or 1, Tq, T)."""
    index = torch.arange(tokens, device=device)
    length = torch.full((1,), tokens, device=device) if lengths is None else lengths.clamp(max=tokens)
    there = index < length[:, None]
    if positions is not None:
        there = there & (positions >= 0)
    last = length[:, None] - queries + torch.arange(queries, device=device)
    return there.expand(batch, -1), index <= last[..., None]


def expand_heads(c: torch.Tensor, u: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """c (B, T, r) u^T as (B, kv_heads, T, D)."""
    return (c @ u.mT).unflatten(-1, (kv_heads, -1)).transpose(1, 2)


def rotated_keys(
    k: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    interleaved: bool,
) -> torch.Tensor:
    """k (B, kv_heads, T, D) normed per head, if there is a weight, and rotated by the rows of the tables."""
    dtype = k.dtype
    if norm_weight is not None:
        wide = k.to(torch.promote_types(dtype, torch.float32))
        k = norm_weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(dtype)
    if cos is None or sin is None:
        return k.to(dtype)
    if positions is None:
        cos, sin = cos[None, None, : k.shape[2]], sin[None, None, : k.shape[2]]
    else:
        rows = positions.clamp(min=0)[:, None]  # what a token that is not there is rotated by does not matter
        cos, sin = cos[rows], sin[rows]
    first, second = (k[..., ::2], k[..., 1::2]) if interleaved else k.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    k = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return k.to(dtype)
