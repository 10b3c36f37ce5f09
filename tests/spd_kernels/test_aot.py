"""What every shipped configuration of every kernel compiles to, on four architectures, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from spd_kernels.aot import ARCHITECTURES, DTYPES, SHARED_MEMORY_LIMIT, Binary, Case, cases, faults


def compile_in_a_fresh_process(*options: str) -> list[dict[str, object]]:
    """Kernels of this process may be decorated for the interpreter, which has nothing to compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "spd_kernels.aot", "--jobs", "2", *options]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def check(binaries: list[dict[str, object]], expected: list[Case]) -> None:
    assert {b["kernel"] for b in binaries} == {"project_kernel", "project_kv_kernel", "moments_kernel"}
    assert len(binaries) == len(expected)
    assert [b for b in binaries if b["faults"]] == []
    for b in binaries:
        assert b["spill_bytes"] == 0 and b["shared_bytes"] <= SHARED_MEMORY_LIMIT[str(b["architecture"])]
        assert b["dtype"] == "fp32" or b["matrix_instructions"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shipped_configurations(architecture: str) -> None:
    binaries = compile_in_a_fresh_process("--architectures", architecture, "--dtypes", "bf16", "fp32")
    check(binaries, list(cases(("bf16", "fp32"))))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant(architecture: str) -> None:
    binaries = compile_in_a_fresh_process("--architectures", architecture, "--all")
    check(binaries, list(cases(DTYPES, (True, False))))


def test_faults_are_found() -> None:
    """The control: binaries that must not ship are recognised."""
    sound = Binary("k", "bf16", "", "sm_90", True, 128, 0, 1000, 4, 4, 8)
    assert faults(sound) == []
    for change in (
        {"spill_bytes": 8},
        {"shared_bytes": 228 * 1024},
        {"matrix_instructions": 0},
        {"warpgroup_instructions": 0},
        {"wide_loads": 0},
    ):
        assert len(faults(Binary(**(vars(sound) | change)))) == 1
