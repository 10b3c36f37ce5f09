"""Argument errors: each names the argument, what was expected and what came."""

from __future__ import annotations

import torch

FLOATING = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))


def check_projection(x: torch.Tensor, u: torch.Tensor, x_name: str = "x", u_name: str = "u") -> None:
    """x (..., d) and u (d, r) with 1 <= r <= d, of one floating dtype, on one device."""
    dtype = x.dtype
    if dtype is not u.dtype or dtype not in FLOATING:
        _raise_dtype(x, u, x_name, u_name)
    if x.device != u.device:
        raise ValueError(f"{u_name}: expected device {x.device} as {x_name} has; got {u.device}")
    shape = u.shape
    if len(shape) != 2 or x.dim() < 1 or x.shape[-1] != shape[0] or not 1 <= shape[1] <= shape[0]:
        _raise_shape(x, u, x_name, u_name)


def check_pair(k: torch.Tensor, v: torch.Tensor) -> None:
    """k and v alike in shape, dtype and device."""
    if k.shape != v.shape:
        raise ValueError(f"v: expected shape {tuple(k.shape)} as k has; got {tuple(v.shape)}")
    if k.dtype is not v.dtype:
        raise TypeError(f"v: expected dtype {k.dtype} as k has; got {v.dtype}")
    if k.device != v.device:
        raise ValueError(f"v: expected device {k.device} as k has; got {v.device}")


def check_rows(g: torch.Tensor, mask: torch.Tensor | None, d: int, device: torch.device) -> None:
    """g (..., d) floating on the accumulator's device; mask boolean of g's leading shape."""
    if g.dtype not in FLOATING:
        raise TypeError(f"g: expected float32, float16, bfloat16 or float64; got {g.dtype}")
    if g.dim() < 1 or g.shape[-1] != d:
        raise ValueError(f"g: expected shape (..., {d}); got {tuple(g.shape)}")
    if g.device != device:
        raise ValueError(f"g: expected device {device} as the accumulator has; got {g.device}")
    if mask is None:
        return
    if mask.dtype is not torch.bool:
        raise TypeError(f"mask: expected dtype torch.bool; got {mask.dtype}")
    if mask.shape != g.shape[:-1]:
        raise ValueError(f"mask: expected shape {tuple(g.shape[:-1])}, the leading shape of g; got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"mask: expected device {device} as g has; got {mask.device}")


def _raise_dtype(x: torch.Tensor, u: torch.Tensor, x_name: str, u_name: str) -> None:
    if x.dtype not in FLOATING:
        raise TypeError(f"{x_name}: expected float32, float16, bfloat16 or float64; got {x.dtype}")
    raise TypeError(f"{u_name}: expected dtype {x.dtype} as {x_name} has; got {u.dtype}")


def _raise_shape(x: torch.Tensor, u: torch.Tensor, x_name: str, u_name: str) -> None:
    if x.dim() < 1:
        raise ValueError(f"{x_name}: expected shape (..., d); got a scalar")
    d = x.shape[-1]
    if u.dim() != 2 or u.shape[0] != d:
        raise ValueError(f"{u_name}: expected shape ({d}, r), since {x_name} is {tuple(x.shape)}; got {tuple(u.shape)}")
    raise ValueError(f"{u_name}: expected 1 <= r <= d = {d} columns; got r = {u.shape[1]}")
