"""How an attention makes its cached keys from what k_proj returns: which norm, which rotation.

Families differ, and mode "latent" has to repeat it for keys that it keeps as latents. The recipe is found by trying:
what reproduces the keys that the attention itself has cached is how it makes them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

# Where k_proj's output is normed: not, each head, all heads as one vector, each head after the rotation.
Norm = Literal["none", "head", "flat", "rotated"]
# Which coordinates form a pair: (i, i + D/2), (2i, 2i + 1), or none are rotated.
Rotation = Literal["half", "interleaved", "none"]
# Which entries of the rotary module's cosines name each angle once.
Angles = Literal["front", "even"]

_NORMS = ("k_norm", "k_layernorm", "key_layernorm", "key_norm")


@dataclass(frozen=True)
class KeyRecipe:
    norm: Norm
    rotation: Rotation
    angles: Angles

    def once(self, table: Tensor) -> Tensor:
        """(..., D) cosines or sines as the rotary module gives them -> (..., D / 2), each angle once."""
        return table[..., : table.shape[-1] // 2] if self.angles == "front" else table[..., ::2]

    def keys(self, projected: Tensor, cos: Tensor, sin: Tensor, head_dim: int, norm: nn.Module | None) -> Tensor:
        """k_proj's output (B, T, d), and the tokens' cosines and sines (B, T, D / 2) -> keys (B, kv_heads, T, D)."""
        if self.norm == "flat":
            assert norm is not None
            projected = norm(projected)
        heads = projected.unflatten(-1, (-1, head_dim))
        if self.norm == "head":
            assert norm is not None
            heads = norm(heads)
        keys = heads.transpose(1, 2)
        if self.rotation != "none":
            keys = _rotate(keys, cos[:, None], sin[:, None], self.rotation == "interleaved")
        if self.norm == "rotated":
            assert norm is not None
            keys = norm(keys)
        return keys


def key_norm(attention: nn.Module) -> nn.Module | None:
    """The norm of the keys, if the attention has one."""
    return next((norm for name in _NORMS if isinstance(norm := getattr(attention, name, None), nn.Module)), None)


def find_recipe(
    attention: nn.Module, projected: Tensor, cos: Tensor | None, sin: Tensor | None, keys: Tensor, tolerance: float
) -> KeyRecipe | None:
    """The recipe that makes `keys` (B, kv_heads, T, D) of `projected` (B, T, d), to a relative tolerance; None if none.

    cos and sin are (B, T, D) as the attention was given them, None if it was given none.
    """
    norm, head_dim = key_norm(attention), keys.shape[-1]
    norms: tuple[Norm, ...] = ("none",) if norm is None else ("head", "flat", "rotated", "none")
    rotations: tuple[Rotation, ...] = ("none",)
    if cos is not None and sin is not None and cos.shape[-1] == head_dim:
        rotations = ("half", "interleaved", "none")
    for recipe in itertools.starmap(KeyRecipe, itertools.product(norms, rotations, ("front", "even"))):
        if recipe.rotation == "half" and recipe.angles == "even":
            continue
        empty = projected.new_zeros((*projected.shape[:-1], head_dim // 2))
        angles = (empty, empty) if cos is None or sin is None else (recipe.once(cos), recipe.once(sin))
        try:
            made = recipe.keys(projected, *angles, head_dim, norm)
        except RuntimeError:  # a norm of another width
            continue
        if made.shape == keys.shape and (made - keys).norm() <= tolerance * keys.norm():
            return recipe
    return None


def rms_eps(norm: nn.Module, head_dim: int, like: Tensor) -> float | None:
    """eps if `norm` is a root-mean-square norm over a head, in whatever form it keeps its weight; None if not."""
    eps = next((float(e) for n in ("variance_epsilon", "eps") if (e := getattr(norm, n, None)) is not None), None)
    if eps is None or getattr(norm, "bias", None) is not None:
        return None
    weight = rms_weight(norm, eps, head_dim, like)
    trial = torch.linspace(-1.0, 2.0, head_dim, dtype=torch.float32, device=like.device)[None]
    expected = trial * torch.rsqrt(trial.square().mean(-1, keepdim=True) + eps) * weight
    found = norm(trial.to(like.dtype)).float()
    close = (found - expected).norm() <= 8 * torch.finfo(like.dtype).eps ** 0.5 * expected.norm()
    return eps if weight.shape == (head_dim,) and bool(close) else None


def rms_weight(norm: nn.Module, eps: float, head_dim: int, like: Tensor) -> Tensor:
    """(head_dim,) what such a norm multiplies by, as it is now."""
    return norm(torch.ones(1, head_dim, dtype=like.dtype, device=like.device))[0] * (1.0 + eps) ** 0.5


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, h, T, D), angles (B, 1, T, D / 2)."""
    half = x.shape[-1] // 2
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)
    return torch.cat(turned, dim=-1).to(x.dtype)
