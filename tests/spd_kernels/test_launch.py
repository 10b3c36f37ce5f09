"""Which implementation runs, and what importing costs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from spd_kernels import GradientCovariance, project, project_kv
from spd_kernels.launch import flatten_rows, requested, uses_triton

CPU = torch.device("cpu")


def in_a_fresh_process(code: str, **environment: str) -> str:
    """Standard output of `python -c code` without the interpreter's variable."""
    variables = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SPD_KERNELS_IMPLEMENTATION")}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables | environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requested(None) == "auto"
    monkeypatch.setenv("SPD_KERNELS_IMPLEMENTATION", "reference")
    assert requested(None) == "reference"
    assert requested("triton") == "triton"


def test_a_bad_value_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x, u = torch.zeros(2, 4), torch.zeros(4, 2)
    message = r"implementation: expected one of auto, triton, reference; got 'cuda'"
    with pytest.raises(ValueError, match=message):
        project(x, u, implementation="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        project_kv(x, x, u, u, implementation="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        GradientCovariance(4, implementation="cuda")  # type: ignore[arg-type]
    monkeypatch.setenv("SPD_KERNELS_IMPLEMENTATION", "fast")
    with pytest.raises(ValueError, match=r"environment variable SPD_KERNELS_IMPLEMENTATION: .*got 'fast'"):
        project(x, u)


def test_auto() -> None:
    cuda = torch.device("cuda", 0)
    assert uses_triton("auto", cuda, torch.bfloat16)
    assert not uses_triton("auto", cuda, torch.float64)
    assert not uses_triton("auto", CPU, torch.float32)
    assert not uses_triton("reference", cuda, torch.float32)


def test_the_kernels_take_no_float64() -> None:
    with pytest.raises(TypeError, match=r"takes float32, float16 or bfloat16; got torch.float64"):
        project(torch.zeros(2, 4).double(), torch.zeros(4, 2).double(), implementation="triton")


def test_triton_on_the_cpu_without_the_interpreter() -> None:
    code = """
import torch
from spd_kernels import project
try:
    project(torch.zeros(2, 4), torch.zeros(4, 2), implementation="triton")
except ValueError as error:
    print(error)
"""
    assert "needs a GPU tensor; got one on cpu" in in_a_fresh_process(code)


def test_importing_reaches_torch_alone() -> None:
    """Neither Triton nor what sits above this package is imported, nor needed on the CPU."""
    code = """
import sys
for name in ("triton", "transformers", "peft", "spd"):
    sys.modules[name] = None
import torch
from spd_kernels import GradientCovariance, project, project_kv, tap
x, u = torch.ones(2, 4, requires_grad=True), torch.eye(4)[:, :2]
accumulator = GradientCovariance(4)
tap(project(x, u), accumulator).sum().backward()
print(accumulator.count, x.grad.tolist()[0])
"""
    assert in_a_fresh_process(code).split("\n")[0] == "2 [1.0, 1.0, 0.0, 0.0]"


def test_importing_is_quick() -> None:
    code = """
import sys, time
import torch
start = time.process_time()
import spd_kernels
print(time.process_time() - start, "triton" in sys.modules, "torch._dynamo" in sys.modules)
"""
    seconds, triton, dynamo = in_a_fresh_process(code).split()
    assert (triton, dynamo) == ("False", "False")
    assert float(seconds) < 0.2


@pytest.mark.parametrize("base", [(2, 3, 4, 5), (1, 3, 1, 5), (1, 1, 1, 1)], ids=str)
def test_rows_are_addressed_in_place(base: tuple[int, ...]) -> None:
    """Element n of the flattened rows sits where two strides say it does."""
    t = torch.arange(torch.Size(base).numel()).reshape(base)
    for x in (t, t.transpose(0, 1), t.transpose(1, 2), t.permute(2, 1, 0, 3), t[:, :1].expand(base), t[::2, ::2, ::2]):
        rows, inner, stride_outer, stride_inner = flatten_rows(x)
        flat = rows.as_strided((rows.untyped_storage().size() // 8,), (1,), 0)
        n = torch.arange(x.numel() // x.shape[-1])
        offsets = rows.storage_offset() + n // inner * stride_outer + n % inner * stride_inner
        assert torch.equal(flat[offsets], x.reshape(-1, x.shape[-1])[:, 0])
