"""`latent_attention`: one decode step over a cache of latents, beside the same step over dense K and V.

Dense attention is there twice: as PyTorch offers it, and as two grouped products with tokens as the rows of the first,
which on a CPU was the fastest of those tried (queries as rows, sdpa of the grouped view, softmax over the other axis).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.case import OURS, Case, Draw, Inputs, Target, Tuning
from spd_kernels import latent_attention
from spd_kernels.latent_attention import config
from spd_kernels.latent_attention.reference import expand_heads, latent_attention_reference, rotated_keys
from spd_kernels.latent_attention.work import latent_attention_work
from spd_kernels.launch import Architecture

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]

DENSE_K = (Target("faster", 1.6, "dense sdpa"),)
LATENT_K = (Target("faster", 2.5, "dense sdpa"),)


def gpu() -> Iterator[Case]:
    """32 query heads and 8 key heads of 128, as in Llama-3.1-8B."""
    for batch in (1, 16):
        yield step(batch, 131072, 32, 8, 128, None, 64, DENSE_K)
        yield step(batch, 131072, 32, 8, 128, 64, 64, LATENT_K)
    yield step(1, 131072, 32, 8, 128, None, 512)
    yield step(1, 131072, 32, 8, 128, 128, 128)


def small() -> Iterator[Case]:
    yield step(2, 37, 4, 2, 16, None, 8, DENSE_K)
    yield step(2, 37, 4, 2, 16, 8, 8, LATENT_K)


def cpu() -> Iterator[Case]:
    yield step(1, 16384, 32, 8, 128, None, 64, dtype=torch.float32)
    yield step(1, 4096, 32, 8, 128, 64, 64, dtype=torch.float32)


def step(
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rank_k: int | None,
    rank_v: int,
    targets: tuple[Target, ...] = (),
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """q (batch, heads, 1, head_dim) over so many tokens; a rank_k of None is K dense and rotated."""
    d = kv_heads * head_dim

    def inputs(draw: Draw) -> Inputs:
        q = draw.normal(batch, heads, 1, head_dim)
        u_k = draw.orthonormal(d, rank_k or rank_v)
        u_v = draw.orthonormal(d, rank_v)
        c_k, c_v = draw.normal(batch, tokens, u_k.shape[1]), draw.normal(batch, tokens, rank_v)
        frequencies = 10000.0 ** -torch.linspace(0, 1, head_dim // 2 + 1, device=draw.device)[:-1]
        angles = torch.arange(tokens, device=draw.device)[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        k = rotated_keys(expand_heads(c_k, u_k, kv_heads), cos, sin, None, None, 1e-6, False).to(dtype)
        v = expand_heads(c_v, u_v, kv_heads).contiguous()
        return q, k.contiguous(), v, c_k, c_v, u_k, u_v, cos, sin

    def dense(q: Tensor, k: Tensor, v: Tensor, *latents: Any) -> Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def grouped(q: Tensor, k: Tensor, v: Tensor, *latents: Any) -> Tensor:
        rows = (q * head_dim**-0.5).view(batch, kv_heads, heads // kv_heads, head_dim)
        return (torch.softmax((k @ rows.mT).mT, dim=-1) @ v).view(q.shape)

    def operands(k: Tensor, c_k: Tensor, c_v: Tensor, u_k: Tensor, u_v: Tensor, cos: Tensor, sin: Tensor) -> Operands:
        if rank_k is None:
            return k, c_v, None, u_v, None, None
        return c_k, c_v, u_k, u_v, cos, sin

    def ours(q: Tensor, k: Tensor, v: Tensor, *latents: Any) -> Tensor:
        return latent_attention(q, *operands(k, *latents), kv_heads=kv_heads)

    def exact(q: Tensor, k: Tensor, v: Tensor, *latents: Any) -> Tensor:
        key, c_v, u, w, cos, sin = operands(k, *latents)
        rows = (slice(row, row + 1) for row in range(batch))  # one at a time: float64 copies of all would not fit
        return torch.cat(
            [latent_attention_reference(q[row], key[row], c_v[row], u, w, cos, sin, kv_heads) for row in rows]
        )

    def tuning(architecture: Architecture) -> Tuning:
        from spd_kernels.latent_attention.kernel import launch_latent_attention

        return Tuning(
            config.choose(rank_k, rank_v, dtype.itemsize, architecture),
            config.candidates(rank_k, dtype.itemsize, architecture),
            lambda chosen: (
                lambda q, k, v, *latents: launch_latent_attention(
                    q, *operands(k, *latents), kv_heads=kv_heads, config=chosen
                )
            ),
        )

    keys = "dense K" if rank_k is None else f"r_k = {rank_k}"
    return Case(
        "latent_attention",
        f"B = {batch}, T = {tokens}, {heads} heads on {kv_heads} of {head_dim}, {keys}, r_v = {rank_v}",
        dtype,
        latent_attention_work(batch, heads, kv_heads, head_dim, tokens, rank_k, rank_v, dtype.itemsize),
        inputs,
        {"dense sdpa": dense, "dense grouped": grouped, OURS: ours},
        targets,
        tuning=tuning,
        exact=exact,
    )
