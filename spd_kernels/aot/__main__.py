"""`python -m spd_kernels.aot`: compile the shipped configurations without a GPU, and fail if any binary is unfit.

    python -m spd_kernels.aot --table csrc_notes/aot.md      the table in csrc_notes
    python -m spd_kernels.aot --architectures sm_90          JSON on standard output
    python -m spd_kernels.aot --all                          also the variants that the table leaves out

Must run with TRITON_INTERPRET unset: the interpreter has nothing to compile.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from spd_kernels.aot.case import DTYPES, OPERATIONS, cases
from spd_kernels.aot.compile import ARCHITECTURES, Binary, compile_case, faults


def table(binaries: list[Binary]) -> str:
    """Markdown: one row a configuration, one column an architecture."""
    lines = [
        "# What the kernels compile to",
        "",
        "Written by `python -m spd_kernels.aot --table csrc_notes/aot.md`. Facts about binaries, compiled without a",
        "GPU; none of them is a timing. Each cell: registers a thread / bytes spilled / KiB of shared memory /",
        "tensor-core instructions; — where that architecture's tables hold no such configuration. Blocks are",
        "rows x rank block x step over d for the projections (here with the term a x), rows x tile side for the",
        "moments. fp32 has tensor-core instructions only where the user allows TF32, and on gfx942, whose matrix unit",
        "takes fp32.",
        "",
        f"| kernel | type | blocks | {' | '.join(ARCHITECTURES)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in ARCHITECTURES)} |",
    ]
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for b in binaries:
        cell = f"{b.registers} / {b.spill_bytes} / {b.shared_bytes / 1024:.0f} / {b.matrix_instructions}"
        rows.setdefault((b.kernel, b.dtype, b.configuration), {})[b.architecture] = cell
    for key, cells in rows.items():
        lines.append(f"| {' | '.join(key)} | {' | '.join(cells.get(name, '—') for name in ARCHITECTURES)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m spd_kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32", "tf32"])
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--all", action="store_true", help="every dtype and variant")
    parser.add_argument("--table", type=Path, help="write a Markdown table here instead of JSON to standard output")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    options = parser.parse_args(arguments)

    from spd_kernels import tiles

    if tiles.INTERPRETING:
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    dtypes = DTYPES if options.all else options.dtypes
    work = [
        (case, architecture)
        for architecture in options.architectures
        for case in cases(architecture, dtypes, operations=options.operations, every=options.all)
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        binaries = list(pool.map(lambda item: compile_case(*item), work))
    if options.table is not None:
        options.table.write_text(table(binaries), encoding="utf-8")
    else:
        json.dump([asdict(b) | {"faults": faults(b)} for b in binaries], sys.stdout, indent=1)
    unfit = [(b, found) for b in binaries if (found := faults(b))]
    for b, found in unfit:
        print(f"{b.kernel} {b.dtype} {b.configuration} {b.architecture}: {', '.join(found)}", file=sys.stderr)
    return 1 if unfit else 0


if __name__ == "__main__":
    raise SystemExit(main())
