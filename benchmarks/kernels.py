"""The kernels' CPU paths beside the eager formula, what a plain script would write, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich.table import Table

from benchmarks.case import COMPILED, OURS, Case, Draw
from benchmarks.operations import cpu_cases
from benchmarks.timing import Comparison, compare
from spd_kernels.roofline import Machine

# Wall-clock seconds of one case's rounds, at most.
CASE_SECONDS = 6.0


def contenders(case: Case, *, compiled: bool) -> dict[str, Callable[[], object]]:
    """Calls without arguments, all on the same inputs; torch.compile of the first where the case asks for it."""
    inputs = case.inputs(Draw(torch.device("cpu"), case.dtype, seed=0))
    found = dict(case.contenders)
    if compiled and case.compiled:
        torch.compiler.reset()
        found[COMPILED] = torch.compile(found[case.baseline], dynamic=False)
    return {name: partial(contender, *inputs) for name, contender in found.items()}


def run(machine: Machine, rounds: int, *, quick: bool, operation: str = "") -> tuple[list[Table], list[dict[str, Any]]]:
    """Time every case, of one operation if it is named, or every third; a table an operation and rows for JSON."""
    cases = cpu_cases(only=operation)[:: 3 if quick else 1]
    tables: dict[str, Table] = {}
    results = []
    for case in cases:
        found = compare(contenders(case, compiled=not quick), rounds=rounds, at_most=CASE_SECONDS)
        bound = machine.seconds(case.work, case.dtype)
        fastest = min((name for name in found.timings if name != OURS), key=lambda name: found.timings[name].median)
        beside_fastest = found.relative(OURS, fastest)
        names = _columns(case, compiled=not quick and any(c.compiled for c in cases if c.operation == case.operation))
        if case.operation not in tables:
            tables[case.operation] = _table(case, names)
        tables[case.operation].add_row(
            case.label,
            f"{1e6 * bound:.1f}",
            *(_cell(found, name) for name in names),
            f"{beside_fastest.median:.2f}",
            f"{100 * bound / found.timings[OURS].median:.0f} %",
        )
        results.append(
            {"operation": case.operation, "case": case.label, "dtype": str(case.dtype)}
            | {"bytes": case.work.bytes, "flops": case.work.flops, "bound_seconds": bound}
            | {"limit": machine.limit(case.work, case.dtype)}
            | {"seconds": {name: asdict(timing) for name, timing in found.timings.items()}}
            | {f"relative_to_{case.baseline}": {name: asdict(ratio) for name, ratio in found.ratios.items()}}
            | {"fastest_other": fastest, "relative_to_fastest_other": asdict(beside_fastest)}
        )
    return list(tables.values()), results


def _columns(case: Case, *, compiled: bool) -> list[str]:
    """Contenders from left to right: the plain formula first, ours last."""
    return [*(name for name in case.contenders if name != OURS), *([COMPILED] if compiled else []), OURS]


def _table(case: Case, names: list[str]) -> Table:
    table = Table(
        title=f"{case.operation}, forward: median µs a call (time relative to {case.baseline}), fp32",
        title_justify="left",
        caption=f"To the fastest other: time of {OURS} over that of the fastest other contender in the same round. "
        "What fits the caches is not read from memory, and can pass 100 % of the bound.",
        caption_justify="left",
    )
    table.add_column("case", no_wrap=True)
    for name in ("bound", *names, "to the fastest other", "of the bound"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cell(found: Comparison, name: str) -> str:
    if name not in found.timings:
        return "—"
    return f"{1e6 * found.timings[name].median:.1f} ({found.ratios[name].median:.2f})"
