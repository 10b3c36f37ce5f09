"""Compiles cases for an architecture and reads the binaries."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from spd_kernels.aot.case import SIXTEEN_BIT, Case
from spd_kernels.launch import Architecture

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
# Most shared memory (LDS) that one block may ask for.
SHARED_MEMORY_LIMIT: dict[Architecture, int] = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
# What a 16-bit product must compile to. On sm_90 tiles of 16 rows are too short for HGMMA, on sm_100 for UTCHMMA.
_MATRIX_INSTRUCTION = re.compile(r"\b(?:HMMA|HGMMA|UT\w*MMA)\b")
_WARPGROUP_INSTRUCTION = re.compile(r"\b(?:HGMMA|UT\w*MMA)\b")


@dataclass(frozen=True)
class Binary:
    """What one case compiled to on one architecture."""

    kernel: str
    dtype: str
    configuration: str
    architecture: Architecture
    tall: bool
    matrix: bool
    registers: int
    spill_bytes: int  # stack, local memory or scratch
    shared_bytes: int
    matrix_instructions: int
    warpgroup_instructions: int  # HGMMA, UTC*MMA: those of the matrix units that read shared memory
    wide_loads: int  # of 16 bytes, from global memory


def compile_case(case: Case, architecture: Architecture) -> Binary:
    """Compiles and reads one case. Triton must not be set to interpret."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = case.function()
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", architecture, 64)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(ASTSource(kernel, *_specialise(kernel, case)), target=target, options=options)
    read = _read_cuda if target.backend == "cuda" else _read_hip
    return Binary(
        case.name,
        case.dtype,
        case.configuration,
        architecture,
        case.tall,
        case.matrix,
        shared_bytes=compiled.metadata.shared,
        **read(compiled),
    )


def _specialise(kernel: Any, case: Case) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and alignment of the arguments, in the order in which ASTSource takes them."""
    unknown = (set(case.constexprs) | set(case.types) | case.unaligned) - set(kernel.arg_names)
    assert not unknown, f"{case.kernel} has no argument {sorted(unknown)}"
    constexprs = dict(case.constexprs)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
            continue
        if name in case.ones:
            signature[name], constexprs[name] = "constexpr", 1
            continue
        signature[name] = case.types.get(name, f"*{case.element}" if name.endswith("_ptr") else "i32")
        if not signature[name].startswith("fp") and name not in case.unaligned:
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
    if binary.matrix and binary.dtype != "fp32" and not binary.matrix_instructions:
        found.append("no tensor-core instruction")
    recent = binary.architecture in ("sm_90", "sm_100")
    if binary.matrix and recent and binary.dtype in SIXTEEN_BIT and binary.tall and not binary.warpgroup_instructions:
        found.append("no HGMMA or UTC*MMA")
    if not binary.wide_loads:
        found.append("no 16-byte load")
    return found
