"""The projection's gradients: both in two launches, or as differentiable operations for a second backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from spd_kernels import project, project_kv
from spd_kernels.project import config
from spd_kernels.project.config import BasisConfig, ProjectConfig
from spd_kernels.project.op import gradient_of_basis
from spd_kernels.project.reference import project_reference
from spd_kernels.testing import assert_within_budget, normal, orthonormal
from tests.spd_kernels.layouts import DTYPES, EXAMPLES, dtypes, sizes, strided
from tests.spd_kernels.test_project import ARCHITECTURES, LAYOUTS


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def every_configuration(itemsize: int) -> list[tuple[ProjectConfig, BasisConfig]]:
    """The shipped ones of all architectures that differ in what the interpreter sees of them."""
    rows = config.shipped_coefficients(itemsize)
    bases = [c for architecture in ARCHITECTURES for c in config.shipped_basis(itemsize, architecture)]
    rows = list({(c.block_n, c.block_w, c.block_k, c.streamed): c for c in rows}.values())
    bases = list({(c.block_n, c.block_d, c.block_r): c for c in bases}.values())
    return [(c, bases[i % len(bases)]) for i, c in enumerate(rows)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("configuration", "dtype"),
    [(c, torch.bfloat16) for c in every_configuration(2)] + [(c, torch.float32) for c in every_configuration(4)],
    ids=str,
)
def test_every_configuration_writes_every_output(
    configuration: tuple[ProjectConfig, BasisConfig],
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "MIN_ROWS_PER_SPLIT", 64)  # several splits of few rows
    from spd_kernels.project.gradient import launch_gradient

    rows, basis = configuration
    rank = rows.block_w + 5 if rows.streamed else rows.block_w - 3
    n, d = rows.block_n + 1, max(rank, basis.block_d + 3)
    x, g = (normal(n, d, seed=s, dtype=dtype, device=device) for s in (1, 2))
    u = normal(d, rank, seed=3, dtype=dtype, device=device) / d**0.5
    sides = ((x, g, u), (g, x, u[:, :2]))
    for needs_x in (True, False):
        gradients = launch_gradient(sides, 0.5, -1.5, needs_x, rows, basis)
        for (x, g, u), (grad_x, grad_u) in zip(sides, gradients, strict=True):
            exact = gradient_of_basis(x.double(), g.double(), u.double(), -1.5)
            assert_within_budget(grad_u, gradient_of_basis(x, g, u, -1.5), exact, "gradient to u")
            if grad_x is not None:
                exact = project_reference(g.double(), u.double(), 0.5, -1.5)
                assert_within_budget(grad_x, project_reference(g, u, 0.5, -1.5), exact, "gradient to x")
            assert (grad_x is not None) == needs_x


def test_two_launches_for_both_gradients(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from spd_kernels.project import gradient, kernel

    launches: list[str] = []

    class Counting:
        def __init__(self, module: object, name: str) -> None:
            self.name, self.kernel = name, getattr(module, name)
            monkeypatch.setattr(module, name, self)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            launches.append(self.name)
            return self.kernel[grid]

    for module, name in (
        (kernel, "project_kernel"),
        (kernel, "project_kv_kernel"),
        (gradient, "coefficients_kernel"),
        (gradient, "basis_kernel"),
    ):
        Counting(module, name)
    k, v = (normal(3, 8, seed=s, device=device).requires_grad_() for s in (4, 5))
    u_k, u_v = (orthonormal(8, r, seed=6, device=device).requires_grad_() for r in (2, 3))
    project(k, u_k, implementation="triton").sum().backward()
    assert launches == ["project_kernel", "coefficients_kernel", "basis_kernel"]
    launches.clear()
    sum(y.sum() for y in project_kv(k, v, u_k, u_v, implementation="triton")).backward()
    assert launches == ["project_kv_kernel", "coefficients_kernel", "basis_kernel"]
    launches.clear()
    sum(y.sum() for y in project_kv(k, v, u_k.detach(), u_v.detach(), implementation="triton")).backward()
    assert launches == ["project_kv_kernel", "project_kv_kernel"]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(layout: Callable[[torch.Tensor], torch.Tensor], device: str) -> None:
    from spd_kernels.project.gradient import launch_gradient

    x, g = layout(normal(3, 4, 5, 48, seed=7, device=device)), layout(normal(3, 4, 5, 48, seed=8, device=device))
    u = orthonormal(x.shape[-1], 7, seed=9, device=device)
    for p, q in ((x, g), (x, g.contiguous()), (x.contiguous(), g)):
        ((grad_x, grad_u),) = launch_gradient(((p, q, u),), 0.25, 2.0, True)
        exact = project_reference(g.double(), u.double(), 0.25, 2.0)
        assert grad_x is not None
        assert_within_budget(grad_x, project_reference(g, u, 0.25, 2.0), exact)
        exact = gradient_of_basis(x.double(), g.double(), u.double(), 2.0)
        assert_within_budget(grad_u, gradient_of_basis(x, g, u, 2.0), exact)


def test_offsets_past_32_bits(device: str) -> None:
    """Rows, and columns, whose offsets in elements exceed 2^31: the memory between them is reserved, never touched."""
    from spd_kernels.project.gradient import launch_gradient

    n, d, gap = 3, 3, 2**30 + 8
    storage = torch.empty(2 * gap + 16, dtype=torch.float16, device=device)
    u = orthonormal(d, 2, seed=11, dtype=torch.float16, device=device)
    g = normal(n, d, seed=12, dtype=torch.float16, device=device)
    for strides in ((gap, 1), (1, gap)):
        x = storage.as_strided((n, d), strides)
        x.copy_(normal(n, d, seed=12, dtype=torch.float16))
        for p, q in ((x, g), (g, x)):
            ((_, grad_u),) = launch_gradient(((p, q, u),), 0.0, 1.0, True)
            exact = gradient_of_basis(p.double(), q.double(), u.double(), 1.0)
            assert_within_budget(grad_u, gradient_of_basis(p.clone(), q.clone(), u, 1.0), exact)


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data(), dtype=dtypes, lead=st.lists(st.integers(0, 9), max_size=3), d=sizes(70))
def test_random_inputs(data: st.DataObject, dtype: torch.dtype, lead: list[int], d: int, device: str) -> None:
    from spd_kernels.project.gradient import launch_gradient

    r = data.draw(st.one_of(st.just(1), st.just(d), st.integers(1, d)), label="r")
    x, g = (data.draw(strided((*lead, d), dtype, device), label=name) for name in "xg")
    u = data.draw(strided((d, r), dtype, device), label="u") / d
    ((grad_x, grad_u),) = launch_gradient(((x, g, u),), 0.5, 0.5, True)
    assert grad_x is not None
    exact = project_reference(g.double(), u.double(), 0.5, 0.5)
    assert_within_budget(grad_x, project_reference(g, u, 0.5, 0.5), exact)
    exact = gradient_of_basis(x.double(), g.double(), u.double(), 0.5)
    assert_within_budget(grad_u, gradient_of_basis(x, g, u, 0.5), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 33, 13), (1, 1, 16, 16), (2, 0, 8, 3)], ids=["odd", "r = d", "no rows"])
def test_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    *lead, d, r = shape
    x, g = (normal(*lead, d, seed=s, dtype=dtype, device=device) for s in (13, 14))
    u = normal(d, r, seed=15, dtype=dtype, device=device) / d**0.5

    def gradients(dtype: torch.dtype, implementation: str) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, u)]
        y = project(*leaves, a=0.5, b=-1.5, implementation=implementation)
        return torch.autograd.grad(y, leaves, g.to(dtype))

    exact = gradients(torch.float64, "reference")
    eager = gradients(dtype, "reference")
    for name, actual, e, ex in zip("xu", gradients(dtype, "triton"), eager, exact, strict=True):
        assert_within_budget(actual, e, ex, f"gradient to {name}")


@pytest.mark.parametrize("needed", ["k", "v", "u_k", "u_v", "k v", "u_k u_v", "k u_v", "k v u_k u_v"])
def test_gradients_of_the_pair(needed: str, device: str) -> None:
    tensors = {
        "k": normal(2, 5, 20, seed=16, device=device),
        "v": normal(2, 5, 20, seed=17, device=device),
        "u_k": orthonormal(20, 3, seed=18, device=device),
        "u_v": orthonormal(20, 11, seed=19, device=device),
    }
    g_k, g_v = (normal(2, 5, 20, seed=s, device=device) for s in (20, 21))

    def gradients(dtype: torch.dtype, implementation: str) -> tuple[torch.Tensor, ...]:
        leaves = {k: t.to(dtype).clone().requires_grad_(k in needed.split()) for k, t in tensors.items()}
        y_k, y_v = project_kv(**leaves, a=1.0, b=-1.0, implementation=implementation)
        return torch.autograd.grad(
            [y for y in (y_k, y_v) if y.requires_grad],
            [t for t in leaves.values() if t.requires_grad],
            [g.to(dtype) for g, y in ((g_k, y_k), (g_v, y_v)) if y.requires_grad],
        )

    exact = gradients(torch.float64, "reference")
    eager = gradients(torch.float32, "reference")
    # The operator's two results both require a gradient as soon as one input does; the extra one adds nothing.
    leaves = {k: t.clone().requires_grad_(k in needed.split()) for k, t in tensors.items()}
    y_k, y_v = project_kv(**leaves, a=1.0, b=-1.0, implementation="triton")
    loss = (y_k * g_k).sum() + (y_v * g_v).sum()
    actual = torch.autograd.grad(loss, [t for t in leaves.values() if t.requires_grad])
    for name, t, e, ex in zip(needed.split(), actual, eager, exact, strict=True):
        assert_within_budget(t, e, ex, f"gradient to {name}")


def test_double_backward() -> None:
    x, u = (normal(*s, seed=22, dtype=torch.float64).requires_grad_() for s in ((3, 5), (5, 2)))

    def operator(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.ops.spd_kernels.project(x, u, 0.5, 2.0, "reference")

    assert torch.autograd.gradcheck(operator, (x, u))
    assert torch.autograd.gradgradcheck(operator, (x, u))


def test_double_backward_of_the_kernels(device: str) -> None:
    x, g = (normal(4, 12, seed=s, device=device) for s in (25, 26))
    u = normal(12, 3, seed=27, device=device) / 4

    def second(dtype: torch.dtype, implementation: str) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, u)]
        y = project(*leaves, a=0.5, b=-1.5, implementation=implementation)
        first = torch.autograd.grad((y.square() * g.to(dtype)).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), leaves)

    exact, eager = second(torch.float64, "reference"), second(torch.float32, "reference")
    for actual, e, ex in zip(second(torch.float32, "triton"), eager, exact, strict=True):
        assert_within_budget(actual, e, ex)


def test_a_fixed_basis_keeps_no_activation_alive(device: str) -> None:
    x, u = normal(4, 8, seed=23, device=device).requires_grad_(), orthonormal(8, 2, seed=24, device=device)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        project(x, u, implementation="triton")
    assert [t.shape for t in saved] == [u.shape]
