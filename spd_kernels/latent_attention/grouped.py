"""The same attention as a few batched products, for CPUs and for whatever has no kernel.

The query heads that share a key head are the rows of one product, and V is never expanded. Latent keys are expanded
some tokens at a time, so that a stretch of them is normed, rotated and multiplied while it is in the cache.
"""

from __future__ import annotations

import torch

from spd_kernels.latent_attention.config import CHUNK_BYTES
from spd_kernels.latent_attention.reference import expand_heads, rotated_keys, visibility


def latent_attention_grouped(
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
    tokens = c_v.shape[1]
    rows = heads // kv_heads * queries
    grouped = (q * (head_dim**-0.5 if scale is None else scale)).reshape(batch, kv_heads, rows, head_dim).mT
    # Tokens are the rows of the products: the other way round MKL takes twice as long for a few query rows.
    if u_k is None:
        scores = c_k @ grouped  # (B, kv_heads, T, G Tq)
    else:
        step = max(1, CHUNK_BYTES // max(1, batch * kv_heads * head_dim * q.element_size()))
        parts = []
        for start in range(0, tokens, step):
            chunk = slice(start, start + step)
            k = expand_heads(c_k[:, chunk], u_k, kv_heads)
            if positions is None:
                where, c, s = None, None if cos is None else cos[chunk], None if sin is None else sin[chunk]
            else:
                where, c, s = positions[:, chunk], cos, sin
            parts.append(rotated_keys(k, c, s, where, norm_weight, eps, interleaved) @ grouped)
        scores = torch.cat(parts, dim=2) if parts else q.new_empty((batch, kv_heads, 0, rows))
    scores = scores.mT.reshape(batch, heads, queries, tokens)
    whole = positions is None and lengths is None
    empty = None
    if not whole or queries > 1:
        there, seen = visibility(batch, queries, tokens, positions, lengths, q.device)
        whole = whole or (q.device.type == "cpu" and bool(there.all()))  # elsewhere the look would have to wait
        if not whole or queries > 1:
            visible = (there[:, None] & seen)[:, None]  # (B, 1, Tq, T)
            scores = scores.masked_fill(~visible, -torch.inf)
            empty = ~visible.any(-1, keepdim=True)
        if not whole:
            # What lies where no token is may be anything, NaN too, which a weight of 0 would let through.
            c_v = torch.where(there[..., None], c_v, 0)
    p = torch.softmax(scores.view(batch, heads * queries, tokens), dim=-1)
    z = (p @ c_v).view(batch, kv_heads, rows, c_v.shape[2])
    out = (z @ u_v.unflatten(0, (kv_heads, head_dim)).mT).view(q.shape)
    return out if empty is None else out.masked_fill(empty, 0.0)
