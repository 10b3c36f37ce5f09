"""The specification of the projected, normed and rotated keys: plain PyTorch, any device, float64-capable."""

from __future__ import annotations

import torch

from spd_kernels.project.reference import project_reference


def project_rope_reference(
    k: torch.Tensor,
    u: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_dim: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> torch.Tensor:
    """R(N((k u) u^T)), contiguous and of k's dtype: k (..., T, d), angles (..., T, head_dim or head_dim // 2)."""
    return rotate(project_reference(k, u), cos, sin, head_dim, norm_weight, eps, interleaved)


def rotate(
    p: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_dim: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> torch.Tensor:
    """RMSNorm of every head of p (..., T, d), if there is a weight, then the rotary embedding."""
    heads = p.unflatten(-1, (-1, head_dim))  # (..., T, heads, head_dim)
    if norm_weight is not None:
        heads = norm_weight * _normed(heads, eps)[0].to(p.dtype)
    cos, sin = _every_element(cos, head_dim, interleaved), _every_element(sin, head_dim, interleaved)
    y = heads * cos + _turned(heads, interleaved) * sin
    return y.to(p.dtype).flatten(-2).contiguous()


def pull_back(
    g: torch.Tensor,
    p: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_dim: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> torch.Tensor:
    """The gradient g of `rotate`'s result, carried back to p; p is read only where there is a norm."""
    wide = torch.promote_types(g.dtype, torch.float32)
    heads = g.to(wide).unflatten(-1, (-1, head_dim))
    cos, sin = _every_element(cos, head_dim, interleaved), _every_element(sin, head_dim, interleaved)
    h = heads * cos - _turned(heads * sin, interleaved)  # the transposed quarter turn is its negative
    if norm_weight is not None:
        assert p is not None
        normed, scale = _normed(p.unflatten(-1, (-1, head_dim)), eps)
        h = norm_weight * h
        h = scale * (h - normed * (normed * h).mean(-1, keepdim=True))
    return h.to(g.dtype).flatten(-2).contiguous()


def store(y: torch.Tensor, cache: torch.Tensor, positions: torch.Tensor) -> None:
    """Row t of batch b of y (B, T, d) to cache[b, :, positions[b, t], :]; rows with negative positions nowhere.

    A position past the cache raises on the CPU and is skipped elsewhere.
    """
    batch, heads, capacity, head_dim = cache.shape
    positions = positions.expand(batch, y.shape[1])
    inside = positions < capacity
    if positions.device.type == "cpu" and not inside.all():
        raise ValueError(
            f"positions: expected at most {capacity - 1}, since cache has {capacity}; got {int(positions.max())}"
        )
    b, t = ((positions >= 0) & inside).nonzero(as_tuple=True)
    cache[b, :, positions[b, t].long()] = y.unflatten(-1, (heads, head_dim))[b, t]


def _normed(heads: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """heads over their root mean square, in at least fp32, and the factor."""
    heads = heads.to(torch.promote_types(heads.dtype, torch.float32))
    scale = torch.rsqrt(heads.square().mean(-1, keepdim=True) + eps)
    return heads * scale, scale


def _every_element(angles: torch.Tensor, head_dim: int, interleaved: bool) -> torch.Tensor:
    """(..., T, 1, head_dim), from one number an element or one a pair."""
    if angles.shape[-1] != head_dim:
        angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
    return angles.unsqueeze(-2)


def _turned(heads: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Every pair (first, second) turned by a right angle: (-second, first)."""
    if interleaved:
        return torch.stack((-heads[..., 1::2], heads[..., ::2]), dim=-1).flatten(-2)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
