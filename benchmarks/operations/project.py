"""`project_kv` on many rows and on few, `project` alone and with both gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import OURS, Case, Draw, Inputs, Target, Tuning
from spd_kernels import project, project_kv
from spd_kernels.launch import Architecture
from spd_kernels.project import config
from spd_kernels.project.work import project_backward_work, project_work

MANY = (Target("bandwidth", 0.85), Target("faster", 1.5, "eager"), Target("faster", 1.2, "compiled"))
FEW = (Target("launches", 1), Target("time", 0.5, "eager"), Target("time", 0.5, "eager", "graph"))


def gpu() -> Iterator[Case]:
    for rank in (128, 64):
        yield pair(65536, 1024, rank, MANY, compiled=True)
    for rows in (1, 8, 64):
        for rank in (64, 128, 512):
            yield pair(rows, 1024, rank, FEW, decode=True, compiled=(rows, rank) == (8, 128))
    yield pair(65536, 1024, 512)
    yield pair(65536, 512, 128)
    yield pair(65536, 128, 64)
    yield pair(65536, 1024, 128, dtype=torch.float16, note=", fp16")
    yield pair(65536, 1024, 128, dtype=torch.float32, note=", fp32")
    yield gradients(65536, 1024, 128)


def small() -> Iterator[Case]:
    yield pair(17, 48, 9, MANY, compiled=True)
    yield pair(2, 40, 16, FEW, decode=True)
    yield gradients(9, 24, 8)
    yield pair(137, 96, 24)
    yield pair(21, 300, 270)


def cpu() -> Iterator[Case]:
    sizes = [(rows, d, r) for rows in (1, 64, 4096) for d, r in ((128, 64), (512, 64), (1024, 128), (1024, 512))]
    for rows, d, r in sizes:
        yield single(rows, d, r, dtype=torch.float32, compiled=d == 512)
    for rows, d, r in sizes:
        if r != 512:
            yield pair(rows, d, r, dtype=torch.float32, compiled=d == 512)


def pair(
    n: int,
    d: int,
    r: int,
    targets: tuple[Target, ...] = (),
    *,
    dtype: torch.dtype = torch.bfloat16,
    decode: bool = False,
    compiled: bool = False,
    note: str = "",
) -> Case:
    """k and v (n, d), each projected on r directions of its own."""

    def inputs(draw: Draw) -> Inputs:
        u_k, u_v = draw.orthonormal(d, r), draw.orthonormal(d, r)
        return draw.normal(n, d), draw.normal(n, d), u_k, u_v, u_k @ u_k.mT, u_v @ u_v.mT

    def eager(k: Tensor, v: Tensor, u_k: Tensor, u_v: Tensor, p_k: Tensor, p_v: Tensor) -> tuple[Tensor, Tensor]:
        return k @ u_k @ u_k.mT, v @ u_v @ u_v.mT

    def dense(k: Tensor, v: Tensor, u_k: Tensor, u_v: Tensor, p_k: Tensor, p_v: Tensor) -> tuple[Tensor, Tensor]:
        return k @ p_k, v @ p_v

    def ours(k: Tensor, v: Tensor, u_k: Tensor, u_v: Tensor, p_k: Tensor, p_v: Tensor) -> tuple[Tensor, Tensor]:
        return project_kv(k, v, u_k, u_v)

    def tuning(architecture: Architecture) -> Tuning:
        from spd_kernels.project.kernel import launch_project_kv

        shape = (n, d, r, dtype.itemsize, architecture)
        return Tuning(
            config.choose(*shape),
            config.candidates(*shape),
            lambda chosen: lambda k, v, u_k, u_v, *_: launch_project_kv(k, v, u_k, u_v, 0.0, 1.0, config=chosen),
        )

    return Case(
        "project_kv",
        f"N = {n}, d = {d}, r = {r}{note}",
        dtype,
        project_work(n, d, r, dtype.itemsize, sides=2),
        inputs,
        {"eager": eager, "dense P": dense, OURS: ours},
        targets,
        decode=decode,
        compiled=compiled,
        tuning=tuning,
    )


def single(n: int, d: int, r: int, *, dtype: torch.dtype = torch.bfloat16, compiled: bool = False) -> Case:
    """x (n, d) on r directions."""

    def inputs(draw: Draw) -> Inputs:
        u = draw.orthonormal(d, r)
        return draw.normal(n, d), u, u @ u.mT

    return Case(
        "project",
        f"N = {n}, d = {d}, r = {r}",
        dtype,
        project_work(n, d, r, dtype.itemsize),
        inputs,
        {"eager": lambda x, u, p: x @ u @ u.mT, "dense P": lambda x, u, p: x @ p, OURS: lambda x, u, p: project(x, u)},
        compiled=compiled,
    )


def gradients(n: int, d: int, r: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """y and the gradients to x (n, d) and to U, from a gradient to y."""

    def inputs(draw: Draw) -> Inputs:
        return draw.normal(n, d), draw.orthonormal(d, r), draw.normal(n, d)

    def all_three(x: Tensor, u: Tensor, g: Tensor, *, plain: bool) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x, u = x.detach().requires_grad_(), u.detach().requires_grad_()
            y = x @ u @ u.mT if plain else project(x, u)
            return (y.detach(), *torch.autograd.grad(y, (x, u), g))

    return Case(
        "project, forward and backward",
        f"N = {n}, d = {d}, r = {r}, gradients to x and U",
        dtype,
        project_work(n, d, r, dtype.itemsize) + project_backward_work(n, d, r, dtype.itemsize),
        inputs,
        {
            "eager": lambda x, u, g: all_three(x, u, g, plain=True),
            OURS: lambda x, u, g: all_three(x, u, g, plain=False),
        },
    )
