"""`project_rope`: projection, per-head RMSNorm and rotary embedding, beside a chain of PyTorch operations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import OURS, Case, Draw, Inputs, Target, Tuning
from spd_kernels import project_rope
from spd_kernels.launch import Architecture
from spd_kernels.rope import config
from spd_kernels.rope.work import rope_work

PREFILL = (Target("faster", 2.0, "eager"),)
DECODE = (Target("faster", 2.0, "eager"), Target("faster", 2.0, "eager", "graph"), Target("launches", 1))
EPS = 1e-6


def gpu() -> Iterator[Case]:
    yield keys(4, 8192, 1024, 128, 128, PREFILL, norm=True, compiled=True)
    yield keys(4, 8192, 1024, 128, 128, PREFILL, norm=False)
    yield keys(64, 1, 1024, 128, 128, DECODE, norm=True, decode=True)
    yield keys(64, 1, 1024, 128, 128, DECODE, norm=False, decode=True)
    yield keys(1, 1, 1024, 128, 128, DECODE, norm=True, decode=True)


def small() -> Iterator[Case]:
    yield keys(2, 3, 32, 16, 8, PREFILL, norm=True, compiled=True)
    yield keys(3, 1, 32, 16, 8, DECODE, norm=False, decode=True)
    yield keys(2, 71, 96, 24, 20, norm=True)


def cpu() -> Iterator[Case]:
    yield keys(8, 1, 1024, 128, 128, norm=True, dtype=torch.float32)
    yield keys(2, 1024, 1024, 128, 128, norm=True, dtype=torch.float32, compiled=True)
    yield keys(2, 1024, 1024, 128, 128, norm=False, dtype=torch.float32)


def keys(
    batch: int,
    steps: int,
    d: int,
    head_dim: int,
    r: int,
    targets: tuple[Target, ...] = (),
    *,
    norm: bool,
    dtype: torch.dtype = torch.bfloat16,
    decode: bool = False,
    compiled: bool = False,
) -> Case:
    """k (batch, steps, d), angles (steps, head_dim) of positions that all sequences share."""

    def inputs(draw: Draw) -> Inputs:
        frequencies = 10000.0 ** -torch.linspace(0, 1, head_dim // 2 + 1, device=draw.device)[:-1]
        angles = torch.arange(steps, device=draw.device)[:, None] * frequencies + draw.seed
        cos, sin = (torch.cat((table, table), -1).to(dtype) for table in (angles.cos(), angles.sin()))
        weight = (1 + draw.normal(head_dim) / 8) if norm else None
        return draw.normal(batch, steps, d), draw.orthonormal(d, r), cos, sin, weight

    def chain(k: Tensor, u: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None) -> Tensor:
        heads = (k @ u @ u.mT).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        if weight is not None:
            wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
            heads = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(heads.dtype)
        first, second = heads.chunk(2, dim=-1)
        rotated = heads * cos + torch.cat((-second, first), dim=-1) * sin
        return rotated.transpose(1, 2).flatten(-2)

    def ours(k: Tensor, u: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None) -> Tensor:
        return project_rope(k, u, cos, sin, head_dim=head_dim, norm_weight=weight, eps=EPS)

    def tuning(architecture: Architecture) -> Tuning:
        from spd_kernels.rope.kernel import launch_rope

        shape = (batch * steps, r, head_dim, dtype.itemsize, architecture)
        return Tuning(
            config.choose(*shape),
            config.candidates(*shape),
            lambda chosen: (
                lambda k, u, cos, sin, weight: launch_rope(k, u, cos, sin, head_dim, weight, EPS, False, config=chosen)
            ),
        )

    return Case(
        "project_rope",
        f"{batch} x {steps} rows, d = {d}, heads of {head_dim}, r = {r}, {'normed' if norm else 'no norm'}",
        dtype,
        rope_work(batch * steps, d, r, head_dim, dtype.itemsize, angle_rows=steps, norm=norm),
        inputs,
        {"eager": chain, OURS: ours},
        targets,
        decode=decode,
        compiled=compiled,
        tuning=tuning,
    )
