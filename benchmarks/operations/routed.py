"""`project_routed`: every sequence with a subspace of its own, beside one subspace for all."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import OURS, Case, Draw, Inputs, Target, Tuning
from spd_kernels import project, project_routed
from spd_kernels.launch import Architecture
from spd_kernels.routed import config
from spd_kernels.routed.work import routed_work

PREFILL = (Target("time", 1.1, "unrouted"),)
DECODE = (Target("time", 1.1, "unrouted"), Target("time", 1.1, "unrouted", "graph"), Target("launches", 1))


def gpu() -> Iterator[Case]:
    yield batch(32, 512, 1024, 128, 8, PREFILL, compiled=True)
    yield batch(64, 1, 1024, 128, 8, DECODE, decode=True)
    yield batch(64, 1, 1024, 128, 8, DECODE, decode=True, packed=True)
    yield batch(8, 1, 1024, 64, 8, DECODE, decode=True)


def small() -> Iterator[Case]:
    yield batch(2, 5, 24, 8, 2, PREFILL, compiled=True)
    yield batch(3, 1, 40, 20, 2, DECODE, decode=True)
    yield batch(3, 70, 72, 9, 2)
    yield batch(3, 70, 72, 9, 2, packed=True)


def cpu() -> Iterator[Case]:
    for sequences, steps in ((8, 1), (64, 1), (8, 512)):
        yield batch(sequences, steps, 1024, 128, 4, dtype=torch.float32)


def grouped(x: Tensor, bank: Tensor, index: Tensor, rows: Tensor | None, order: list[int]) -> Tensor:
    """One basis gathered for each sequence, then two batched products."""
    u = bank[index]
    return torch.bmm(torch.bmm(x, u), u.mT)


def loop(x: Tensor, bank: Tensor, index: Tensor, rows: Tensor | None, order: list[int]) -> Tensor:
    """Sequence by sequence; the order is given on the host, so that the loop need not wait for the device."""
    return torch.stack([x[number] @ bank[s] @ bank[s].mT for number, s in enumerate(order)])


def batch(
    sequences: int,
    steps: int,
    d: int,
    r: int,
    subspaces: int,
    targets: tuple[Target, ...] = (),
    *,
    dtype: torch.dtype = torch.bfloat16,
    decode: bool = False,
    compiled: bool = False,
    packed: bool = False,
) -> Case:
    """x (sequences, steps, d), a bank of (d, r) bases, a random one for each sequence.

    Packed: ours is told the sequence of every row, as it must be where their numbers of steps differ.
    """

    def inputs(draw: Draw) -> Inputs:
        bank = torch.stack([draw.orthonormal(d, r) for _ in range(subspaces)])
        # In random order; every subspace occurs where there are sequences enough.
        index = torch.randperm(sequences, generator=draw.generator, device=draw.device) % subspaces
        rows = torch.arange(sequences, device=draw.device)[:, None].expand(-1, steps).contiguous() if packed else None
        return draw.normal(sequences, steps, d), bank, index, rows, index.tolist()

    def ours(x: Tensor, bank: Tensor, index: Tensor, rows: Tensor | None, order: list[int]) -> Tensor:
        return project_routed(x, bank, index, rows=rows)

    def unrouted(x: Tensor, bank: Tensor, index: Tensor, rows: Tensor | None, order: list[int]) -> Tensor:
        return project(x, bank[0])

    def tuning(architecture: Architecture) -> Tuning:
        from spd_kernels.routed.kernel import launch_routed

        return Tuning(
            (
                config.choose_packed(sequences, sequences * steps, r, dtype.itemsize, architecture)
                if packed
                else config.choose(sequences, steps, d, r, dtype.itemsize, architecture)
            ),
            config.candidates(r, dtype.itemsize, architecture, packed=packed),
            lambda chosen: (
                lambda x, bank, index, rows, order: launch_routed(x, bank, index, 0.0, 1.0, rows=rows, config=chosen)
            ),
        )

    return Case(
        "project_routed",
        f"B = {sequences}, T = {steps}, d = {d}, r = {r}, S = {subspaces}" + ", packed" * packed,
        dtype,
        routed_work([steps] * sequences, [n % subspaces for n in range(sequences)], [r] * subspaces, d, dtype.itemsize),
        inputs,
        {"grouped bmm": grouped, "loop": loop, "unrouted": unrouted, OURS: ours},
        targets,
        decode=decode,
        compiled=compiled,
        tuning=tuning,
    )
