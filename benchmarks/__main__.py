"""`python -m benchmarks`: every CPU benchmark, one table each, and all figures as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from spd.files import write_json


def main(
    out: Annotated[Path, typer.Option(help="JSON file for the figures.")] = Path("benchmarks/results/cpu.json"),
    only: Annotated[str, typer.Option(help="projection, covariance, generation, or all.")] = "all",
    quick: Annotated[bool, typer.Option(help="Few rounds: to see that it runs, not to quote.")] = False,
) -> None:
    """Time the kernels' CPU paths and the pipeline's generation beside what a user would otherwise write."""
    from benchmarks import covariance, generation, projection
    from benchmarks.timing import machine

    benchmarks = {
        "projection": lambda: projection.run(rounds=3 if quick else 30),
        "generation": lambda: generation.run(rounds=2 if quick else 15),
        "covariance": lambda: covariance.run(repeats=1 if quick else 3),
    }
    if only != "all" and only not in benchmarks:
        raise typer.BadParameter(f"expected all or one of {', '.join(benchmarks)}, got {only!r}")
    console = Console()
    console.width = max(console.width, 116)  # rather than cut figures
    console.print(machine())
    figures: dict[str, object] = {"machine": machine(), "quick": quick}
    for name, benchmark in benchmarks.items():
        if only in ("all", name):
            table, figures[name] = benchmark()
            console.print(table)
            write_json(out, figures)
    console.print(f"figures: {out}")


if __name__ == "__main__":
    typer.run(main)
