"""The gradient covariance of 16-bit rows, beside the matrix product alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import OURS, Case, Draw, Inputs, Target, Tuning
from spd_kernels import GradientCovariance
from spd_kernels.covariance import config
from spd_kernels.covariance.work import covariance_work
from spd_kernels.launch import Architecture

ALONE = "moments alone"


def gpu() -> Iterator[Case]:
    yield rows(65536, 1024, (Target("faster", 1.0, "GEMM"),))
    yield rows(2**20, 128, (Target("bandwidth", 0.7),))
    yield rows(65536, 512)


def small() -> Iterator[Case]:
    yield rows(40, 24, (Target("faster", 1.0, "GEMM"),))
    yield rows(300, 136)


def gemm(g: Tensor, accumulator: GradientCovariance) -> Tensor:
    """The full product in the rows' own type: no sums, no mean, and a result rounded to 16 bits."""
    return g.mT @ g


def mean_and_upper(state: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Of count, mean and centred sum of squares; of the last, only the upper triangle means anything."""
    _, mean, centred = state
    return [mean, centred.triu()]


def exact(g: Tensor, accumulator: GradientCovariance) -> list[Tensor]:
    mean = g.mean(0)
    return [mean, ((g - mean).mT @ (g - mean)).triu()]


def rows(
    n: int,
    d: int,
    targets: tuple[Target, ...] = (),
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """n gradient rows of width d into an accumulator."""

    def inputs(draw: Draw) -> Inputs:
        accumulator = GradientCovariance(d, draw.device)
        return draw.normal(n, d) + 0.25, accumulator  # rows with a mean, which the sums then find

    def moments(g: Tensor, accumulator: GradientCovariance) -> Any:
        from spd_kernels.covariance.kernel import launch_moments

        return launch_moments(g)

    def tuning(architecture: Architecture) -> Tuning:
        from spd_kernels.covariance.kernel import launch_moments

        shape = (d, architecture)
        return Tuning(
            config.choose(*shape),
            config.candidates(*shape),
            lambda chosen: lambda g, accumulator: launch_moments(g, config=chosen),
        )

    return Case(
        "GradientCovariance.update",
        f"N = {n}, d = {d}",
        dtype,
        covariance_work(n, d, dtype.itemsize),
        inputs,
        {"GEMM": gemm, ALONE: moments, OURS: lambda g, accumulator: accumulator.update(g)},
        targets,
        tuning=tuning,
        checked=ALONE,
        view=mean_and_upper,
        exact=exact,
    )
