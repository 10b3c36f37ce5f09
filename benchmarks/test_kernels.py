"""Small cases under pytest-benchmark: `pytest benchmarks --benchmark-group-by=param:case` and its `--compare`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.case import Case, Draw
from benchmarks.kernels import contenders
from benchmarks.operations import cpu_cases
from spd_kernels import GradientCovariance

pytest.importorskip("pytest_benchmark")

SMALL = [case for case in cpu_cases() if case.work.flops < 1e9]


@pytest.mark.parametrize(
    ("case", "contender"),
    [pytest.param(case, name, id=f"{case.name}-{name}") for case in SMALL for name in case.contenders],
)
def test_kernel(benchmark: Any, case: Case, contender: str) -> None:
    benchmark(contenders(case, compiled=False)[contender])


@pytest.mark.parametrize("d", [128, 512, 1024])
def test_covariance_update(benchmark: Any, d: int) -> None:
    rows = Draw(torch.device("cpu"), torch.float32, seed=0).normal(4096, d)
    covariance = GradientCovariance(d)
    benchmark(covariance.update, rows)
