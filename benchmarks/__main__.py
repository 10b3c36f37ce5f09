"""`python -m benchmarks`: every CPU benchmark, tables for people, and all figures as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from spd.files import write_json


def main(
    out: Annotated[Path, typer.Option(help="JSON file for the figures.")] = Path("benchmarks/results/cpu.json"),
    only: Annotated[
        str, typer.Option(help="kernels, one of their operations, covariance, generation, or all.")
    ] = "all",
    quick: Annotated[bool, typer.Option(help="Few cases, few rounds: to see that it runs, not to quote.")] = False,
) -> None:
    """Time the kernels' CPU paths and the pipeline's generation beside what a user would otherwise write.

    The machine's copy bandwidth and the rate of its matrix products are measured first; `of the bound` is the part of
    what they allow that a time reaches. Some eight minutes, with --quick one. For a GPU: python -m benchmarks.gpu
    """
    from benchmarks import covariance, generation, kernels
    from benchmarks.operations import cpu_cases
    from benchmarks.timing import machine, measure_cpu

    subjects = ("kernels", "generation", "covariance")
    operations = tuple(dict.fromkeys(case.operation for case in cpu_cases()))
    if only not in ("all", *subjects, *operations):
        raise typer.BadParameter(f"expected all or one of {', '.join((*subjects, *operations))}, got {only!r}")
    operation, only = (only, "kernels") if only in operations else ("", only)
    console = Console()
    console.width = max(console.width, 160)  # rather than cut figures
    facts = machine()
    rates = measure_cpu()
    product = next(iter(rates.flops_per_second.values()))
    console.print(f"{facts['device']}, {facts['processor']}: {facts['versions']}")
    console.print(f"measured: copy {rates.bytes_per_second / 1e9:.1f} GB/s, fp32 products {product / 1e9:.0f} GFLOP/s")
    measured = {"copy_bytes_per_second": rates.bytes_per_second, "float32_flops_per_second": product}
    figures: dict[str, object] = {"machine": facts | measured, "quick": quick}

    def subject(name: str) -> tuple[list[Table], list[dict[str, Any]]]:
        match name:
            case "kernels":
                return kernels.run(rates, 3 if quick else 30, quick=quick, operation=operation)
            case "generation":
                return generation.run(rounds=2 if quick else 15, quick=quick)
            case _:
                return covariance.run(rates, repeats=1 if quick else 3, quick=quick)

    for name in subjects:
        if only in ("all", name):
            tables, figures[name] = subject(name)
            for table in tables:
                console.print(table)
            write_json(out, figures)
    console.print(f"figures: {out}")


if __name__ == "__main__":
    typer.run(main)
