"""`project` and `project_kv` beside the eager formula, the dense projector of a plain script, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.timing import compare
from spd_kernels import project, project_kv


@dataclass(frozen=True)
class Case:
    """x of (rows, width), U of (width, rank)."""

    rows: int
    width: int
    rank: int
    dtype: torch.dtype = torch.float32

    def tensors(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.rows, self.width, generator=generator)
        u = torch.linalg.qr(torch.randn(self.width, self.rank, generator=generator)).Q
        return x.to(self.dtype), u.contiguous().to(self.dtype)


CASES = [Case(rows, d, r) for rows in (1, 64, 4096) for d, r in ((128, 64), (512, 64), (1024, 128), (1024, 512))]


def eager(x: Tensor, u: Tensor) -> Tensor:
    return x @ u @ u.T


def project_contenders(case: Case) -> dict[str, Callable[[], object]]:
    x, u = case.tensors()
    dense = u @ u.T
    compiled = torch.compile(eager)
    return {
        "eager": lambda: eager(x, u),
        "dense P": lambda: x @ dense,
        "compiled": lambda: compiled(x, u),
        "spd_kernels": lambda: project(x, u),
    }


def project_kv_contenders(case: Case) -> dict[str, Callable[[], object]]:
    k, u = case.tensors()
    v = k.flip(0)

    def pair(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return eager(k, u), eager(v, u)

    dense = u @ u.T
    compiled = torch.compile(pair)
    return {
        "eager": lambda: pair(k, v),
        "dense P": lambda: (k @ dense, v @ dense),
        "compiled": lambda: compiled(k, v),
        "spd_kernels": lambda: project_kv(k, v, u, u),
    }


def run(rounds: int) -> tuple[Table, list[dict[str, Any]]]:
    """Time every case; a table for people and rows for JSON."""
    table = Table(title="Projection, forward: median µs a call (time relative to eager)", title_justify="left")
    for name in ("operation", "rows", "d", "r", "eager", "dense P", "compiled", "spd_kernels"):
        table.add_column(name, justify="left" if name == "operation" else "right", no_wrap=True)
    rows = []
    for operation, contenders in (("project", project_contenders), ("project_kv", project_kv_contenders)):
        for case in CASES:
            torch.compiler.reset()
            found = compare(contenders(case), rounds=rounds)
            cells = [
                f"{1e6 * found.timings[name].median:.1f} ({found.ratios[name].median:.2f})" for name in found.timings
            ]
            table.add_row(operation, str(case.rows), str(case.width), str(case.rank), *cells)
            rows.append(
                {"operation": operation, "rows": case.rows, "d": case.width, "r": case.rank, "dtype": str(case.dtype)}
                | {"seconds": {name: asdict(timing) for name, timing in found.timings.items()}}
                | {"relative_to_eager": {name: asdict(ratio) for name, ratio in found.ratios.items()}}
            )
        table.add_section()
    return table, rows
