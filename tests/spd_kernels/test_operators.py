"""The operators under PyTorch's own checks and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spd_kernels import project, project_kv
from spd_kernels.launch import Implementation
from spd_kernels.testing import normal, orthonormal


def inputs(device: str, grad: bool = False) -> tuple[torch.Tensor, ...]:
    k, v = (normal(2, 3, 16, seed=s, device=device).requires_grad_(grad) for s in (1, 2))
    u_k, u_v = (orthonormal(16, r, seed=3, device=device).requires_grad_(grad) for r in (4, 7))
    return k, v, u_k, u_v


@pytest.mark.parametrize("implementation", ["reference", "triton", None])
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_opcheck(implementation: str | None, grad: bool, device: str) -> None:
    k, v, u_k, u_v = inputs(device, grad)
    torch.library.opcheck(torch.ops.spd_kernels.project.default, (k, u_k, 0.5, 2.0, implementation))
    torch.library.opcheck(torch.ops.spd_kernels.project.default, (k.transpose(0, 1), u_k, 0.0, 1.0, implementation))
    torch.library.opcheck(torch.ops.spd_kernels.project_kv.default, (k, v, u_k, u_v, 0.5, 2.0, implementation))


def both(*tensors: torch.Tensor, implementation: Implementation | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair, and one of its results projected again."""
    k, v, u_k, u_v = tensors
    y_k, y_v = project_kv(k, v, u_k, u_v, a=1.0, b=-1.0, implementation=implementation)
    return project(y_k, u_v, implementation=implementation), y_v


def both_among_others(*tensors: torch.Tensor, implementation: Implementation | None = None) -> tuple[torch.Tensor, ...]:
    y, z = both(*(0.5 * t for t in tensors), implementation=implementation)
    return y * z, z - 0.5 * y


@pytest.mark.parametrize("implementation", [None, "triton"])
@pytest.mark.parametrize(
    ("function", "backend"),
    [
        (both_among_others, "aot_eager"),
        (both, "inductor"),
        pytest.param(both_among_others, "inductor", marks=pytest.mark.slow),  # compiles C++
    ],
)
def test_compile(
    function: Callable[..., tuple[torch.Tensor, ...]], backend: str, implementation: Implementation | None, device: str
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected, actual = inputs(device, grad=True), inputs(device, grad=True)
    results = function(*expected, implementation=implementation), compiled(*actual, implementation=implementation)
    torch.testing.assert_close(*results)
    for result in results:
        sum(y.square().sum() for y in result).backward()
    for e, t in zip(expected, actual, strict=True):
        torch.testing.assert_close(t.grad, e.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*actual, implementation=implementation), results[0])


def test_compile_with_sizes_that_change(device: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(project, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 8, 5):
        x, u = normal(n, 16, seed=4, device=device), orthonormal(16, 5, seed=5, device=device)
        torch.testing.assert_close(compiled(x, u), project(x, u))
