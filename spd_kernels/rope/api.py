"""The public projection of keys with norm and rotary embedding."""

from __future__ import annotations

import torch

from spd_kernels.checks import check_in_place, check_projection
from spd_kernels.launch import Implementation, needs_operator, uses_triton
from spd_kernels.project.api import project
from spd_kernels.rope.op import keys, project_rope_op, project_rope_store_op, store_keys
from spd_kernels.rope.reference import project_rope_reference, rotate


def project_rope(
    k: torch.Tensor,
    u: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    head_dim: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    cache: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    implementation: Implementation | None = None,
) -> torch.Tensor:
    """Keys as attention takes them: p = (k @ u) @ u.T, RMSNorm of every head of p, rotary embedding; one launch.

        half-split (Llama, Qwen):           y = p * cos + [-p2, p1] * sin,  p1 and p2 the halves of a head
        interleaved (GPT-J, Cohere, GLM):   the same on the neighbours (2i, 2i + 1)

    Returns a contiguous tensor of k's shape; with a cache, the cache. Gradients to k by a kernel of their own; where u,
    cos, sin or norm_weight need one, to all of them by `project` and PyTorch's operations. Double backward works.

    Args:
        k: (..., T, d), d = heads x head_dim, any strides, fp32, fp16 or bf16; fp64 on the reference path. May be empty.
        u: (d, r) with 1 <= r <= d, of k's dtype.
        cos, sin: (..., T, head_dim) as a model's rotary module returns them, every element taken as it is; or
            (..., T, head_dim // 2), one number a pair, which is read faster: of a table that repeats itself,
            `cos[..., : head_dim // 2]` (half-split), `cos[..., ::2]` (interleaved). The leading axes broadcast against
            k's. Of k's dtype or fp32. All of a head is rotated: partial rotary embeddings are not served.
        norm_weight: (head_dim,), of k's dtype or fp32, for models that norm their keys (Qwen3). None: no norm.
        eps: added to the mean square, which is taken in fp32.
        cache: (B, heads, capacity, head_dim), any strides, of k's dtype, for k (B, T, d). Row t of batch b is stored at
            cache[b, :, positions[b, t], :]; the rest is left alone. Needs positions, and no gradients.
        positions: (B, T) or (T,), int32 or int64. Rows with a negative one (padding) are not stored. One past the
            capacity is a ValueError on the CPU; a GPU would have to be waited for, and does not store the row. Which of
            two rows with one position is stored is undefined.
        implementation: as in `project`. Heads of more than 512 take the reference, and no cache on a GPU.
    """
    check_projection(k, u, "k", "u")
    _check_heads(k, head_dim)
    _check_angles(k, cos, sin, head_dim)
    if norm_weight is not None:
        _check_weight(k, norm_weight, head_dim)
    others = (u, cos, sin) if norm_weight is None else (u, cos, sin, norm_weight)
    if cache is not None and positions is not None:
        _check_cache(k, cache, positions, head_dim)
        check_in_place(cache, (k, *others), "cache")
        run_store = project_rope_store_op if needs_operator(k, cache, positions, *others) else store_keys
        run_store(k, u, cos, sin, norm_weight, cache, positions, head_dim, float(eps), interleaved, implementation)
        return cache
    if cache is not None or positions is not None:
        missing, given = ("positions", "cache") if positions is None else ("cache", "positions")
        raise ValueError(f"{missing}: expected a tensor, since {given} is given; got None")
    if torch.is_grad_enabled() and any(t.requires_grad for t in others):
        p = project(k, u, implementation=implementation)
        return rotate(p, cos, sin, head_dim, norm_weight, eps, interleaved)
    if not torch.compiler.is_compiling() and not uses_triton(implementation, k.device, k.dtype):
        return project_rope_reference(k, u, cos, sin, head_dim, norm_weight, eps, interleaved)
    run = project_rope_op if needs_operator(k, *others) else keys
    return run(k, u, cos, sin, norm_weight, head_dim, float(eps), interleaved, implementation)


def _check_heads(k: torch.Tensor, head_dim: int) -> None:
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: expected a positive even int; got {head_dim!r}")
    if k.shape[-1] % head_dim:
        raise ValueError(f"head_dim: expected a divisor of d = {k.shape[-1]}; got {head_dim}")


def _check_angles(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> None:
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dtype is not k.dtype and t.dtype is not torch.float32:
            raise TypeError(f"{name}: expected dtype {k.dtype} as k has, or torch.float32; got {t.dtype}")
        if t.device != k.device:
            raise ValueError(f"{name}: expected device {k.device} as k has; got {t.device}")
    lead, angles = k.shape[:-1], cos.shape
    fits = (
        1 <= len(angles) <= k.dim()
        and angles[-1] in (head_dim, head_dim // 2)
        and all(a in (1, n) for a, n in zip(reversed(angles[:-1]), reversed(lead), strict=False))
    )
    if not fits:
        raise ValueError(
            f"cos: expected shape (..., {head_dim}) or (..., {head_dim // 2}) whose leading axes broadcast to "
            f"{tuple(lead)}, those of k; got {tuple(angles)}"
        )
    if sin.shape != angles:
        raise ValueError(f"sin: expected shape {tuple(angles)} as cos has; got {tuple(sin.shape)}")
    if sin.dtype is not cos.dtype:
        raise TypeError(f"sin: expected dtype {cos.dtype} as cos has; got {sin.dtype}")


def _check_weight(k: torch.Tensor, norm_weight: torch.Tensor, head_dim: int) -> None:
    if norm_weight.shape != (head_dim,):
        raise ValueError(f"norm_weight: expected shape ({head_dim},); got {tuple(norm_weight.shape)}")
    if norm_weight.dtype is not k.dtype and norm_weight.dtype is not torch.float32:
        raise TypeError(f"norm_weight: expected dtype {k.dtype} as k has, or torch.float32; got {norm_weight.dtype}")
    if norm_weight.device != k.device:
        raise ValueError(f"norm_weight: expected device {k.device} as k has; got {norm_weight.device}")


def _check_cache(k: torch.Tensor, cache: torch.Tensor, positions: torch.Tensor, head_dim: int) -> None:
    if k.dim() != 3:
        raise ValueError(f"k: expected shape (B, T, d), since there is a cache; got {tuple(k.shape)}")
    batch, steps, d = k.shape
    heads = d // head_dim
    if cache.dim() != 4 or (*cache.shape[:2], cache.shape[3]) != (batch, heads, head_dim):
        raise ValueError(f"cache: expected shape ({batch}, {heads}, capacity, {head_dim}); got {tuple(cache.shape)}")
    if cache.dtype is not k.dtype:
        raise TypeError(f"cache: expected dtype {k.dtype} as k has; got {cache.dtype}")
    if cache.device != k.device:
        raise ValueError(f"cache: expected device {k.device} as k has; got {cache.device}")
    if positions.dtype is not torch.int32 and positions.dtype is not torch.int64:
        raise TypeError(f"positions: expected int32 or int64; got {positions.dtype}")
    if tuple(positions.shape) not in ((batch, steps), (steps,)):
        raise ValueError(f"positions: expected shape ({batch}, {steps}) or ({steps},); got {tuple(positions.shape)}")
    if positions.device != k.device:
        raise ValueError(f"positions: expected device {k.device} as k has; got {positions.device}")
