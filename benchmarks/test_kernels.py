"""The same cases under pytest-benchmark: `pytest benchmarks --benchmark-group-by=param:case` and its `--compare`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.projection import CASES, Case, project_contenders, project_kv_contenders
from spd_kernels import GradientCovariance

pytest.importorskip("pytest_benchmark")

CONTENDERS = ["eager", "dense P", "compiled", "spd_kernels"]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rows}x{case.width}, r={case.rank}")
def test_project(benchmark: Any, case: Case, contender: str) -> None:
    benchmark(project_contenders(case)[contender])


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rows}x{case.width}, r={case.rank}")
def test_project_kv(benchmark: Any, case: Case, contender: str) -> None:
    benchmark(project_kv_contenders(case)[contender])


@pytest.mark.parametrize("d", [128, 512, 1024])
def test_covariance_update(benchmark: Any, d: int) -> None:
    rows, _ = Case(4096, d, 1).tensors()
    covariance = GradientCovariance(d)
    benchmark(covariance.update, rows)
