"""Argument errors of the routed projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spd_kernels.checks import FLOATING


def check_routed(
    x: torch.Tensor, bank: torch.Tensor, index: torch.Tensor, rows: torch.Tensor | None, ranks: torch.Tensor | None
) -> None:
    """bank (S, d, r) for x's rows, index (B,) for its sequences or for `rows`, ranks (S,); values are not looked at."""
    dtype, device = x.dtype, x.device
    if dtype is not bank.dtype or dtype not in FLOATING:
        _raise_dtype(x, bank)
    if x.dim() < 1 or bank.dim() != 3 or x.shape[-1] != bank.shape[1] or not 1 <= bank.shape[2] <= bank.shape[1]:
        _raise_bank_shape(x, bank)
    if bank.shape[0] == 0:
        raise ValueError("bank: expected at least one subspace; got none")
    if bank.device != device:
        raise ValueError(f"bank: expected device {device} as x has; got {bank.device}")
    _check_integers(index, "index", device)
    if index.dim() != 1:
        raise ValueError(f"index: expected shape (B,), one subspace a sequence; got {tuple(index.shape)}")
    if rows is not None:
        _check_integers(rows, "rows", device)
        if rows.shape != x.shape[:-1]:
            raise ValueError(f"rows: expected shape {tuple(x.shape[:-1])}, one a row of x; got {tuple(rows.shape)}")
    elif x.dim() < 2 or x.shape[0] != index.shape[0]:
        raise ValueError(
            f"x: expected shape ({index.shape[0]}, ..., {bank.shape[1]}), since index is {tuple(index.shape)}; "
            f"got {tuple(x.shape)} (packed rows need the argument rows)"
        )
    if ranks is not None:
        _check_integers(ranks, "ranks", device)
        if ranks.shape != bank.shape[:1]:
            raise ValueError(f"ranks: expected shape ({bank.shape[0]},), one a subspace; got {tuple(ranks.shape)}")


def check_routes(
    bank: torch.Tensor, index: torch.Tensor, rows: torch.Tensor | None, ranks: torch.Tensor | None
) -> None:
    """Every index names a subspace or is -1, every row a sequence, every rank lies within the bank's columns."""
    _check_range(index, "index", -1, bank.shape[0] - 1)
    if rows is not None:
        _check_range(rows, "rows", 0, index.shape[0] - 1)
    if ranks is not None:
        _check_range(ranks, "ranks", 0, bank.shape[2])


def check_bases(bases: Sequence[torch.Tensor]) -> None:
    """At least one basis (d, r) with 0 <= r <= d, all of one d, floating dtype and device."""
    if not bases:
        raise ValueError("bases: expected at least one; got none")
    first = bases[0]
    for i, u in enumerate(bases):
        if u.dim() != 2 or u.shape[1] > u.shape[0] or u.shape[0] < 1:
            raise ValueError(f"bases[{i}]: expected shape (d, r) with r <= d; got {tuple(u.shape)}")
        if u.shape[0] != first.shape[0]:
            raise ValueError(f"bases[{i}]: expected d = {first.shape[0]} as bases[0] has; got {u.shape[0]}")
        if u.dtype not in FLOATING:
            raise TypeError(f"bases[{i}]: expected float32, float16, bfloat16 or float64; got {u.dtype}")
        if u.dtype is not first.dtype:
            raise TypeError(f"bases[{i}]: expected dtype {first.dtype} as bases[0] has; got {u.dtype}")
        if u.device != first.device:
            raise ValueError(f"bases[{i}]: expected device {first.device} as bases[0] has; got {u.device}")


def _check_integers(t: torch.Tensor, name: str, device: torch.device) -> None:
    if t.dtype is not torch.int64 and t.dtype is not torch.int32:
        raise TypeError(f"{name}: expected int32 or int64; got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{name}: expected device {device} as x has; got {t.device}")


def _check_range(t: torch.Tensor, name: str, least: int, most: int) -> None:
    outside = ((t < least) | (t > most)).nonzero()
    if outside.shape[0] > 0:
        position = tuple(outside[0].tolist())
        raise ValueError(f"{name}[{', '.join(map(str, position))}]: expected {least} to {most}; got {int(t[position])}")


def _raise_dtype(x: torch.Tensor, bank: torch.Tensor) -> None:
    if x.dtype not in FLOATING:
        raise TypeError(f"x: expected float32, float16, bfloat16 or float64; got {x.dtype}")
    raise TypeError(f"bank: expected dtype {x.dtype} as x has; got {bank.dtype}")


def _raise_bank_shape(x: torch.Tensor, bank: torch.Tensor) -> None:
    if x.dim() < 1:
        raise ValueError("x: expected shape (B, ..., d), or (..., d) with rows; got a scalar")
    d = x.shape[-1]
    if bank.dim() != 3 or bank.shape[1] != d:
        raise ValueError(f"bank: expected shape (S, {d}, r), since x is {tuple(x.shape)}; got {tuple(bank.shape)}")
    raise ValueError(f"bank: expected 1 <= r <= d = {d} columns; got r = {bank.shape[2]}")
