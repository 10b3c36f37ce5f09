"""The operators under PyTorch's own checks and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spd_kernels import project, project_, project_kv, project_kv_
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


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_opcheck_in_place_and_gradients(implementation: str, device: str) -> None:
    k, v, u_k, u_v = inputs(device)
    rest = (0.5, 2.0, implementation)
    operators = torch.ops.spd_kernels
    torch.library.opcheck(operators.project_.default, (k.clone(), u_k, *rest))
    torch.library.opcheck(operators.project_.default, (k.clone().transpose(0, 1), u_k, *rest))
    torch.library.opcheck(operators.project_kv_.default, (k.clone(), v.clone(), u_k, u_v, *rest))
    for needs_x in (True, False):
        torch.library.opcheck(operators.project_gradient.default, (k, v, u_k, 0.5, 2.0, needs_x, implementation))
    torch.library.opcheck(operators.project_kv_gradient.default, (k, v, v, k, u_k, u_v, *rest))


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_compile_in_place(implementation: Implementation | None, device: str) -> None:
    def function(k: torch.Tensor, v: torch.Tensor, u_k: torch.Tensor, u_v: torch.Tensor) -> torch.Tensor:
        project_kv_(k, v, u_k, u_v, a=1.0, b=-1.0, implementation=implementation)
        return 2.0 * project_(k, u_v, implementation=implementation)

    torch.compiler.reset()
    expected, actual = inputs(device), inputs(device)
    result = torch.compile(function, fullgraph=True, backend="aot_eager")(*actual)
    torch.testing.assert_close(result, function(*expected))
    for t, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(t, e)
    with pytest.raises(ValueError, match="need no gradient"):
        function(*inputs(device, grad=True))


def test_a_launch_goes_through_the_operator_where_something_watches(device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from spd_kernels.launch import needs_operator

    k, _, u, _ = inputs(device)
    assert not needs_operator(k, u, torch.nn.Parameter(u, requires_grad=False))
    assert needs_operator(k, u.clone().requires_grad_())
    with torch.no_grad():
        assert not needs_operator(k.clone().requires_grad_(), u)
    with FlopCounterMode(display=False):
        assert needs_operator(k, u)
    with torch.autograd.forward_ad.dual_level():
        assert needs_operator(k, u)
    seen: list[bool] = []
    torch.vmap(lambda x: x * len(seen.append(needs_operator(x)) or ""))(k)
    assert seen == [True]


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
