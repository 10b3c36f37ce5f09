"""What every shipped configuration of every kernel compiles to, on four architectures, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import triton

from spd_kernels.aot.case import OPERATIONS, Case, cases
from spd_kernels.aot.compile import ARCHITECTURES, SHARED_MEMORY_LIMIT, Binary, faults
from spd_kernels.launch import Architecture


def compile_in_a_fresh_process(*options: str) -> list[dict[str, object]]:
    """Kernels of this process may be decorated for the interpreter, which has nothing to compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "spd_kernels.aot", *options]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def check(binaries: list[dict[str, object]], expected: list[Case]) -> None:
    assert {case.kernel.partition(".")[0] for case in expected} == set(OPERATIONS)
    assert [(b["kernel"], b["dtype"], b["configuration"]) for b in binaries] == [
        (case.name, case.dtype, case.configuration) for case in expected
    ]
    assert [b for b in binaries if b["faults"]] == []
    for b in binaries:
        assert b["spill_bytes"] == 0 and b["shared_bytes"] <= SHARED_MEMORY_LIMIT[str(b["architecture"])]
        assert b["dtype"] == "fp32" or b["matrix_instructions"] or not b["matrix"]


pinned = pytest.mark.skipif(
    not triton.__version__.startswith("3.7."),
    reason="chosen with Triton 3.7; csrc_notes/README.md says what others spill",
)


@pinned
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shipped_configurations(architecture: Architecture) -> None:
    binaries = compile_in_a_fresh_process("--architectures", architecture, "--dtypes", "bf16", "fp32")
    check(binaries, list(cases(architecture, ("bf16", "fp32"))))


@pinned
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant(architecture: Architecture) -> None:
    binaries = compile_in_a_fresh_process("--architectures", architecture, "--all")
    check(binaries, list(cases(architecture, every=True)))


def test_faults_are_found() -> None:
    """The control: binaries that must not ship are recognised."""
    sound = Binary("k", "bf16", "", "sm_90", True, True, 128, 0, 1000, 4, 4, 8)
    assert faults(sound) == []
    for change in (
        {"spill_bytes": 8},
        {"shared_bytes": 228 * 1024},
        {"matrix_instructions": 0},
        {"warpgroup_instructions": 0},
        {"wide_loads": 0},
    ):
        assert len(faults(Binary(**(vars(sound) | change)))) == 1
