"""Argument errors: each names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

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


def check_in_place(x: torch.Tensor, others: Sequence[torch.Tensor], x_name: str = "x") -> None:
    """x may be overwritten: its elements do not share memory, and no gradient is wanted through x or the others."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others)):
        raise ValueError(
            f"{x_name}: expected tensors that need no gradient, since {x_name} is overwritten; "
            "use the form that returns a new tensor, or torch.no_grad()"
        )
    if not x.is_contiguous() and _overlaps_itself(x):
        raise ValueError(
            f"{x_name}: expected elements that do not share memory, since {x_name} is overwritten; "
            f"got shape {tuple(x.shape)} with strides {x.stride()}"
        )


def check_apart(k: torch.Tensor, v: torch.Tensor) -> None:
    """k and v, alike in shape and each without overlaps, may be overwritten at once: they share no element."""
    if not share_memory(k, v):
        return
    # Elements i of k and j of v coincide where the strides times i - j make up the distance between the tensors.
    axes = sorted(((stride, size) for stride, size in zip(k.stride(), k.shape, strict=True) if size > 1), reverse=True)
    if k.stride() != v.stride() or _is_difference(int(v.storage_offset() - k.storage_offset()), axes):
        raise ValueError(
            "v: expected no memory in common with k, since both are overwritten; got views of one storage "
            f"at {k.storage_offset()} with strides {k.stride()} and at {v.storage_offset()} with strides {v.stride()}"
        )


def share_memory(p: torch.Tensor, q: torch.Tensor) -> bool:
    """Whether the stretches of memory from first to last element overlap; their elements may still be apart."""
    if p.numel() == 0 or q.numel() == 0 or p.untyped_storage().data_ptr() != q.untyped_storage().data_ptr():
        return False
    return all(first.storage_offset() <= second.storage_offset() + _reach(second) for first, second in ((p, q), (q, p)))


def _reach(x: torch.Tensor) -> int:
    """From the first to the last element."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _overlaps_itself(x: torch.Tensor) -> bool:
    """Whether an axis, by increasing stride, fails to step over the axes before; tiles that interlock count too."""
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += (size - 1) * stride
    return False


def _is_difference(distance: int, axes: Sequence[tuple[int, int]]) -> bool:
    """Whether distance = sum of stride * q over the axes with some |q| < size.

    By decreasing stride, every stride above the reach of those after it: only two multiples of it come near enough.
    """
    if not axes:
        return distance == 0
    (stride, size), rest = axes[0], axes[1:]
    near = distance // stride
    return any(abs(q) < size and _is_difference(distance - q * stride, rest) for q in (near, near + 1))


def check_rows(
    g: torch.Tensor,
    mask: torch.Tensor | None,
    d: int,
    device: torch.device,
    g_name: str = "g",
    mask_name: str = "mask",
) -> None:
    """g (..., d) floating on the accumulator's device; mask boolean of g's leading shape."""
    if g.dtype not in FLOATING:
        raise TypeError(f"{g_name}: expected float32, float16, bfloat16 or float64; got {g.dtype}")
    if g.dim() < 1 or g.shape[-1] != d:
        raise ValueError(f"{g_name}: expected shape (..., {d}); got {tuple(g.shape)}")
    if g.device != device:
        raise ValueError(f"{g_name}: expected device {device} as the accumulator has; got {g.device}")
    if mask is None:
        return
    if mask.dtype is not torch.bool:
        raise TypeError(f"{mask_name}: expected dtype torch.bool; got {mask.dtype}")
    if mask.shape != g.shape[:-1]:
        raise ValueError(
            f"{mask_name}: expected shape {tuple(g.shape[:-1])}, the leading shape of {g_name}; got {tuple(mask.shape)}"
        )
    if mask.device != device:
        raise ValueError(f"{mask_name}: expected device {device} as {g_name} has; got {mask.device}")


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
