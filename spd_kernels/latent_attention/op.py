"""Attention over latents as a PyTorch operator: fake, CPU and GPU implementations; it has no gradient.

The operator is what torch.compile sees. Which implementation runs is settled when it runs, not when it is traced.
"""

from __future__ import annotations

import torch

from spd_kernels.latent_attention.grouped import latent_attention_grouped
from spd_kernels.latent_attention.reference import latent_attention_reference
from spd_kernels.launch import requested, uses_triton


def run(
    q: torch.Tensor,
    c_k: torch.Tensor,
    c_v: torch.Tensor,
    u_k: torch.Tensor | None,
    u_v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_heads: int,
    scale: float | None,
    positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    interleaved: bool,
    implementation: str | None,
) -> torch.Tensor:
    """The kernel, the plain formula if that was asked for, or the few products that give the same."""
    arguments = (q, c_k, c_v, u_k, u_v, cos, sin, kv_heads, scale, positions, lengths, norm_weight, eps, interleaved)
    if uses_triton(implementation, q.device, q.dtype):
        from spd_kernels.latent_attention.kernel import launch_latent_attention

        return launch_latent_attention(*arguments)
    if requested(implementation) == "reference":
        return latent_attention_reference(*arguments)
    return latent_attention_grouped(*arguments)


@torch.library.custom_op("spd_kernels::latent_attention", mutates_args=())
def latent_attention_op(
    q: torch.Tensor,
    c_k: torch.Tensor,
    c_v: torch.Tensor,
    u_k: torch.Tensor | None,
    u_v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_heads: int,
    scale: float | None,
    positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    interleaved: bool,
    implementation: str | None,
) -> torch.Tensor:
    out = run(
        q,
        c_k,
        c_v,
        u_k,
        u_v,
        cos,
        sin,
        kv_heads,
        scale,
        positions,
        lengths,
        norm_weight,
        eps,
        interleaved,
        implementation,
    )
    return out.contiguous()


@latent_attention_op.register_fake
def _(
    q: torch.Tensor,
    c_k: torch.Tensor,
    c_v: torch.Tensor,
    u_k: torch.Tensor | None,
    u_v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_heads: int,
    scale: float | None,
    positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    interleaved: bool,
    implementation: str | None,
) -> torch.Tensor:
    return q.new_empty(q.shape)
