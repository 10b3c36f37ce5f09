"""The public attention over latents."""

from __future__ import annotations

import torch

from spd_kernels.checks import FLOATING
from spd_kernels.latent_attention.op import latent_attention_op, run
from spd_kernels.launch import Implementation

_INTEGERS = (torch.int32, torch.int64)


def latent_attention(
    q: torch.Tensor,
    c_k: torch.Tensor,
    c_v: torch.Tensor,
    u_k: torch.Tensor | None,
    u_v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *,
    kv_heads: int,
    scale: float | None = None,
    positions: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    implementation: Implementation | None = None,
) -> torch.Tensor:
    """Attention of the last Tq tokens of every sequence to all of them, keys and values kept as latents.

    K = R(N(c_k @ u_k.T)), V = c_v @ u_v.T, and softmax(scale * q @ K.T) @ V, of which neither K nor V is ever whole: K
    is expanded some tokens at a time, and of V only the weighted sum of its latents is. Query head h attends by key
    head h // (H / kv_heads). A query sees the tokens up to its own; one that sees nothing gives zeros. The softmax is
    summed in fp32. For decoding: there is no gradient. Nothing here waits for the GPU or depends on what `lengths` and
    `positions` hold, so it may be captured in a CUDA graph.

    Args:
        q: (B, H, Tq, D), already rotated. Any strides here and below.
        c_k: (B, T, r_k), latents before norm and rotation; or, with u_k None, the keys themselves, normed and rotated:
            (B, kv_heads, T, D), and cos, sin and norm_weight are not used.
        c_v: (B, T, r_v).
        u_k: (kv_heads * D, r_k), or None. Of q's dtype, as are c_k, c_v and u_v.
        u_v: (kv_heads * D, r_v).
        cos, sin: tables (positions, D / 2), or (positions, D) as rotary modules give them with every angle twice: row p
            rotates what is at position p, by an angle proportional to p (times whatever factor the table carries). Of
            q's dtype or fp32; both None: no rotation. With 16-bit latents on a GPU, angles of tokens that follow one
            another come from one row and their distance, and not from memory for every token.
        scale: D ** -0.5 if None.
        positions: (B, T) int32 or int64, the row of the tables for every cached token; negative: there is no token
            (left padding). None: 0, 1, 2, ... A position past the tables raises on the CPU and gives NaN on a GPU.
        lengths: (B,) int32 or int64: tokens from there on are not there, and the queries are the last before it.
        norm_weight: (D,): K's heads are RMS-normed before the rotation, with this weight and `eps`.
        interleaved: pairs (2i, 2i + 1) are rotated instead of (i, i + D / 2).
        implementation: "triton"; "reference", the plain formula; "auto": Triton on a GPU, a few batched products
            elsewhere. None takes the environment variable SPD_KERNELS_IMPLEMENTATION, else "auto".

    Returns:
        (B, H, Tq, D) of q's dtype.

    Raises:
        ValueError, TypeError: an argument does not fit; or needs a gradient while gradients are on.
    """
    cos, sin = _check(q, c_k, c_v, u_k, u_v, cos, sin, kv_heads, positions, lengths, norm_weight, interleaved)
    function = latent_attention_op if torch.compiler.is_compiling() or not _plain(q, c_k, c_v) else run
    return function(
        q,
        c_k,
        c_v,
        u_k,
        u_v,
        cos,
        sin,
        kv_heads,
        None if scale is None else float(scale),
        positions,
        lengths,
        norm_weight,
        float(eps),
        interleaved,
        implementation,
    )


def _plain(*tensors: torch.Tensor) -> bool:
    return all(type(t) is torch.Tensor for t in tensors)


def _check(
    q: torch.Tensor,
    c_k: torch.Tensor,
    c_v: torch.Tensor,
    u_k: torch.Tensor | None,
    u_v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_heads: int,
    positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    interleaved: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The tables with every angle once."""
    if q.dtype not in FLOATING:
        raise TypeError(f"q: expected float32, float16, bfloat16 or float64; got {q.dtype}")
    if q.dim() != 4:
        raise ValueError(f"q: expected shape (B, H, Tq, D); got {tuple(q.shape)}")
    batch, heads, _, head_dim = q.shape
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads: expected a divisor of the {heads} heads of q; got {kv_heads}")
    if c_v.dim() != 3 or c_v.shape[0] != batch or c_v.shape[2] < 1:
        raise ValueError(f"c_v: expected shape ({batch}, T, r), since q is {tuple(q.shape)}; got {tuple(c_v.shape)}")
    tokens = c_v.shape[1]
    _check_shape("u_v", u_v, (kv_heads * head_dim, c_v.shape[2]))
    if u_k is None:
        _check_shape("c_k", c_k, (batch, kv_heads, tokens, head_dim))
        cos = sin = None
    else:
        if head_dim % 2:
            raise ValueError(f"q: expected an even D beside u_k; got {head_dim}")
        if c_k.dim() != 3 or c_k.shape[:2] != c_v.shape[:2] or c_k.shape[2] < 1:
            raise ValueError(f"c_k: expected shape ({batch}, {tokens}, r) beside u_k; got {tuple(c_k.shape)}")
        _check_shape("u_k", u_k, (kv_heads * head_dim, c_k.shape[2]))
    operands = {"c_k": c_k, "c_v": c_v, "u_k": u_k, "u_v": u_v}
    for name, tensor in operands.items():
        if tensor is not None and tensor.dtype is not q.dtype:
            raise TypeError(f"{name}: expected dtype {q.dtype} as q has; got {tensor.dtype}")

    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected both or neither; got one")
    if cos is not None and sin is not None:
        cos, sin = (_table(name, t, q, interleaved) for name, t in (("cos", cos), ("sin", sin)))
        if cos.shape != sin.shape:
            raise ValueError(f"sin: expected shape {tuple(cos.shape)} as cos has; got {tuple(sin.shape)}")
        if positions is None and cos.shape[0] < tokens:
            raise ValueError(f"cos: expected at least {tokens} rows, one for each token; got {cos.shape[0]}")
    if positions is not None:
        _check_integers("positions", positions, (batch, tokens))
    if lengths is not None:
        _check_integers("lengths", lengths, (batch,))
    if norm_weight is not None:
        if u_k is None:
            norm_weight = None
        else:
            _check_shape("norm_weight", norm_weight, (head_dim,))
            if norm_weight.dtype not in FLOATING:
                raise TypeError(f"norm_weight: expected a floating dtype; got {norm_weight.dtype}")

    everything = {"q": q} | operands | {"cos": cos, "sin": sin, "positions": positions, "lengths": lengths}
    for name, tensor in (everything | {"norm_weight": norm_weight}).items():
        if tensor is None:
            continue
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q has; got {tensor.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected no need for a gradient, which latent_attention lacks; got one "
                             "(call it under torch.no_grad())")  # fmt: skip
    if cos is not None and positions is not None and not torch.compiler.is_compiling() and _plain(positions):
        _check_positions(positions, cos)
    return cos, sin


def _check_positions(positions: torch.Tensor, cos: torch.Tensor) -> None:
    """On the CPU, where looking is free."""
    if positions.device.type == "cpu" and positions.numel() and int(positions.max()) >= cos.shape[0]:
        raise ValueError(f"positions: expected less than {cos.shape[0]}, the rows of cos; got {int(positions.max())}")


def _table(name: str, table: torch.Tensor, q: torch.Tensor, interleaved: bool) -> torch.Tensor:
    head_dim = q.shape[-1]
    half = head_dim // 2
    if table.dim() != 2 or head_dim % 2 or table.shape[1] not in (half, head_dim):
        raise ValueError(
            f"{name}: expected shape (positions, {half}) or (positions, {head_dim}), D being even; "
            f"got {tuple(table.shape)}"
        )
    if table.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"{name}: expected dtype {q.dtype} as q has, or torch.float32; got {table.dtype}")
    if table.shape[1] == half:
        return table
    return table[:, ::2] if interleaved else table[:, :half]


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}; got {tuple(tensor.shape)}")


def _check_integers(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected int32 or int64; got {tensor.dtype}")
    _check_shape(name, tensor, shape)
