"""Compiles every shipped configuration of every kernel ahead of time, without a GPU, and reads the binaries.

    python -m spd_kernels.aot --table csrc_notes/aot.md      the table in csrc_notes
    python -m spd_kernels.aot --architectures sm_90          JSON on standard output
    python -m spd_kernels.aot --all                          also the variants that the table leaves out

Must run with TRITON_INTERPRET unset: the interpreter has nothing to compile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DTYPES = ("bf16", "fp16", "fp32", "tf32")  # tf32: fp32 operands whose products TF32 is allowed for
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# Most shared memory (LDS) that one block may ask for.
SHARED_MEMORY_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# What a 16-bit product must compile to. On sm_90 tiles of 16 rows are too short for HGMMA, on sm_100 for UTCHMMA.
_MATRIX_INSTRUCTION = re.compile(r"\b(?:HMMA|HGMMA|UT\w*MMA)\b")
_UNIT_STRIDES = frozenset(f"stride_{axis}" for axis in ("xd", "kd", "vd", "gd", "ur", "u_kr", "u_vr"))
_WARPGROUP_INSTRUCTION = re.compile(r"\b(?:HGMMA|UT\w*MMA)\b")


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration, as a launcher would specialise it for contiguous, aligned operands."""

    kernel: str
    dtype: str  # of DTYPES
    configuration: str
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    tall: bool  # tiles of at least 64 rows, which Hopper's and Blackwell's matrix units take whole


@dataclass(frozen=True)
class Binary:
    """What one case compiled to on one architecture."""

    kernel: str
    dtype: str
    configuration: str
    architecture: str
    tall: bool
    registers: int
    spill_bytes: int  # stack, local memory or scratch
    shared_bytes: int
    matrix_instructions: int
    warpgroup_instructions: int  # HGMMA, UTC*MMA: those of the matrix units that read shared memory
    wide_loads: int  # of 16 bytes, from global memory


def cases(dtypes: Sequence[str], blends: Sequence[bool] = (True,)) -> Iterator[Case]:
    """Every shipped configuration for these element types, with an x term (a != 0) or without one."""
    from spd_kernels.covariance import config as covariance
    from spd_kernels.project import config as project

    for dtype in dtypes:
        common = {"WIDEN": False, "WIDE": False, "PRECISION": "tf32" if dtype == "tf32" else "ieee"}
        sixteen_bit = dtype in ("bf16", "fp16")
        kernels = ("project_kernel", "project_kv_kernel")
        for kernel, p, blend in itertools.product(kernels, project.shipped(2 if sixteen_bit else 4), blends):
            name = f"{p.block_n} x {p.block_w} x {p.block_k}{' streamed' if p.streamed else ''}"
            blocks = {"BLOCK_N": p.block_n, "BLOCK_W": p.block_w, "BLOCK_K": p.block_k, "STREAMED": p.streamed}
            constexprs = common | blocks | {"HAS_A": blend}
            yield Case(kernel, dtype, name, constexprs, p.num_warps, p.num_stages, p.block_n >= 64)
        for m in covariance.shipped() if sixteen_bit else ():
            for masked in (False, True):
                name = f"{m.block_n} x {m.block_d}{' masked' if masked else ''}"
                constexprs = common | {"BLOCK_N": m.block_n, "BLOCK_D": m.block_d, "HAS_MASK": masked}
                yield Case("moments_kernel", dtype, name, constexprs, m.num_warps, m.num_stages, True)


def compile_case(case: Case, architecture: str) -> Binary:
    """Compiles and reads one case."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spd_kernels.covariance.kernel import moments_kernel
    from spd_kernels.project.kernel import project_kernel, project_kv_kernel

    kernels = {k.fn.__name__: k for k in (project_kernel, project_kv_kernel, moments_kernel)}
    kernel = kernels[case.kernel]
    signature, constexprs, attributes = _specialise(kernel, case)
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    read = _read_cuda if target.backend == "cuda" else _read_hip
    return Binary(
        case.kernel,
        case.dtype,
        case.configuration,
        architecture,
        case.tall,
        shared_bytes=compiled.metadata.shared,
        **read(compiled),
    )


def _specialise(kernel: Any, case: Case) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and alignment: unit strides along the last axis, everything else a multiple of 16."""
    element = "fp32" if case.dtype == "tf32" else case.dtype
    pointers = {"mask_ptr": "u8", "sum_ptr": "fp32", "gram_ptr": "fp32"}
    constexprs = dict(case.constexprs)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in _UNIT_STRIDES:
            signature[name], constexprs[name] = "constexpr", 1
        elif name in ("a", "b"):
            signature[name] = "fp32"
        else:
            signature[name] = f"*{pointers.get(name, element)}" if name.endswith("_ptr") else "i32"
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constexprs, attributes


def _read_cuda(compiled: Any) -> dict[str, int]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        sass = _run(tools / "nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "spill_bytes": numbers["STACK"] + numbers["LOCAL"],
        "matrix_instructions": len(_MATRIX_INSTRUCTION.findall(sass)),
        "warpgroup_instructions": len(_WARPGROUP_INSTRUCTION.findall(sass)),
        "wide_loads": len(re.findall(r"\b(?:LDGSTS|LDG)\.\S*\b128\b", sass)),
    }


def _read_hip(compiled: Any) -> dict[str, int]:
    assembly = compiled.asm["amdgcn"]

    def fact(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, f"no .{name} in the assembly"
        return int(found[1])

    spilled = 4 * (fact("vgpr_spill_count") + fact("sgpr_spill_count"))
    return {
        "registers": fact("vgpr_count"),
        "spill_bytes": spilled + fact("private_segment_fixed_size"),
        "matrix_instructions": len(re.findall(r"\bv_mfma", assembly)),
        "warpgroup_instructions": 0,
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4", assembly)),
    }


def _run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def faults(binary: Binary) -> list[str]:
    """What would make this binary unfit to ship."""
    found = []
    limit = SHARED_MEMORY_LIMIT[binary.architecture]
    if binary.spill_bytes:
        found.append(f"{binary.spill_bytes} bytes spilled")
    if binary.shared_bytes > limit:
        found.append(f"{binary.shared_bytes} bytes of shared memory, over {limit}")
    if binary.dtype != "fp32" and not binary.matrix_instructions:
        found.append("no tensor-core instruction")
    recent = binary.architecture in ("sm_90", "sm_100")
    if recent and binary.dtype in ("bf16", "fp16") and binary.tall and not binary.warpgroup_instructions:
        found.append("no HGMMA or UTC*MMA")
    if not binary.wide_loads:
        found.append("no 16-byte load")
    return found


def table(binaries: list[Binary]) -> str:
    """Markdown: one row a configuration, one column an architecture."""
    lines = [
        "# What the kernels compile to",
        "",
        "Written by `python -m spd_kernels.aot --table csrc_notes/aot.md`. Facts about binaries, compiled without a",
        "GPU; none of them is a timing. Each cell: registers a thread / bytes spilled / KiB of shared memory /",
        "tensor-core instructions. Blocks are rows x rank block x step over d for the projections (here with the term",
        "a x), rows x tile side for the moments. fp32 has tensor-core instructions only where the user allows TF32,",
        "and on gfx942, whose matrix unit takes fp32.",
        "",
        f"| kernel | type | blocks | {' | '.join(ARCHITECTURES)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in ARCHITECTURES)} |",
    ]
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for b in binaries:
        cell = f"{b.registers} / {b.spill_bytes} / {b.shared_bytes / 1024:.0f} / {b.matrix_instructions}"
        rows.setdefault((b.kernel, b.dtype, b.configuration), {})[b.architecture] = cell
    for key, cells in rows.items():
        lines.append(f"| {' | '.join(key)} | {' | '.join(cells.get(name, '') for name in ARCHITECTURES)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spd_kernels.aot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32", "tf32"])
    parser.add_argument("--all", action="store_true", help="every dtype, with and without the x term")
    parser.add_argument("--table", type=Path, help="write a Markdown table here instead of JSON to standard output")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    options = parser.parse_args(arguments)

    from spd_kernels import tiles

    if tiles.INTERPRETING:
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    chosen = cases(DTYPES, (True, False)) if options.all else cases(options.dtypes)
    work = list(itertools.product(chosen, options.architectures))
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
