"""The projection kernels against the float64 reference: values, gradients, layouts, and the theorems."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spd_kernels import project, project_kv
from spd_kernels.project import config
from spd_kernels.project.reference import project_reference
from spd_kernels.testing import assert_within_budget, normal, orthonormal

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# (rows, d, r) by regime. d and r beyond a few blocks repeat the loops that these walk already.
SHAPES = {
    "one row, one column, one direction": (1, 1, 1),
    "one row": (1, 64, 16),
    "r = 1": (5, 96, 1),
    "r = d, not a power of two": (17, 96, 96),
    "aligned": (32, 128, 64),
    "one past the row, d and r blocks": (33, 129, 65),
    "one short of them": (15, 127, 63),
    "odd": (7, 33, 13),
    "largest rank in registers": (18, 300, 256),
    "streamed rank": (35, 300, 270),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    n, d, r = shape
    x = normal(n, d, seed=1, dtype=dtype, device=device)
    u = orthonormal(d, r, seed=2, dtype=dtype, device=device)
    for a, b in ((0.0, 1.0), (0.75, -1.25)):
        exact = project_reference(x.double(), u.double(), a, b)
        actual = project(x, u, a=a, b=b, implementation="triton")
        assert_within_budget(actual, project_reference(x, u, a, b), exact)


@pytest.fixture(params=["few rows", "many rows"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs through the configurations of small and of large ones."""
    if request.param == "many rows":
        monkeypatch.setattr(config, "FEW_ROWS", 0)


@pytest.mark.usefixtures("regime")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [9, 65, 129, 260])
def test_every_configuration_writes_every_output(rank: int, dtype: torch.dtype, device: str) -> None:
    from spd_kernels.project.kernel import launch_project, launch_project_kv

    n, d = 65, max(rank, 40)
    x, u = normal(n, d, seed=3, dtype=dtype, device=device), orthonormal(d, rank, seed=4, dtype=dtype, device=device)
    poisoned = [torch.full_like(x, torch.nan) for _ in range(3)]
    exact = project_reference(x.double(), u.double(), 0.5, 0.5)
    assert launch_project(x, u, 0.5, 0.5, out=poisoned[0]) is poisoned[0]
    launch_project_kv(x, x, u, u, 0.5, 0.5, out=(poisoned[1], poisoned[2]))
    for actual in poisoned:
        assert_within_budget(actual, project_reference(x, u, 0.5, 0.5), exact)


def test_configurations_follow_rows_and_rank() -> None:
    for itemsize in (2, 4):
        for n, tall in ((1, False), (config.FEW_ROWS, False), (config.FEW_ROWS + 1, True)):
            chosen = [config.choose(n, 1024, rank, itemsize, "sm_90") for rank in range(1, 600)]
            assert all(c.block_w >= rank for rank, c in enumerate(chosen, start=1) if not c.streamed)
            assert all((c.block_n > 16) == tall for c in chosen)
            assert chosen[-1].streamed and not chosen[0].streamed
            assert set(chosen) <= set(config.shipped(itemsize, "sm_90"))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "a vector": lambda t: t[0, 0, 0],
    "sliced rows": lambda t: t[:, ::2, 1:],
    "sliced columns": lambda t: t[..., 3:35],
    "every other column": lambda t: t[..., ::2],
    "columns first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "heads and time swapped": lambda t: t.transpose(1, 2),
    "all leading axes swapped": lambda t: t.permute(2, 1, 0, 3),
    "three unmergeable axes": lambda t: t[::2, ::2, ::2],
    "expanded rows": lambda t: t[:1, :1].expand(3, 4, 5, 48),
    "expanded columns": lambda t: t[..., :1].expand(3, 4, 5, 48),
    "no rows": lambda t: t[:, :0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_of_x(layout: Callable[[torch.Tensor], torch.Tensor], device: str) -> None:
    x = layout(normal(3, 4, 5, 48, seed=7, device=device))
    d = x.shape[-1]
    u = orthonormal(d, 7, seed=8, device=device)
    actual = project(x, u, a=0.25, b=2.0, implementation="triton")
    exact = project_reference(x.double(), u.double(), 0.25, 2.0)
    assert_within_budget(actual, project_reference(x, u, 0.25, 2.0), exact)
    assert actual.is_contiguous() and actual.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("rank", [6, 140], ids=["in registers", "streamed"])
def test_layouts_of_u(rank: int, device: str) -> None:
    d = 150
    x, wide = normal(9, d, seed=9, device=device), orthonormal(d, d, seed=10, device=device)
    for u in (wide[:, :rank], wide.T[:, :rank], wide[:, ::2][:, : min(rank, 75)], wide[:, :1].expand(d, rank) / rank):
        exact = project_reference(x.double(), u.double())
        assert_within_budget(project(x, u, implementation="triton"), project_reference(x, u), exact)


def test_offsets_past_32_bits(device: str) -> None:
    """Rows, and columns, whose offsets in elements exceed 2^31: the memory between them is reserved, never touched."""
    n, d, gap = 3, 3, 2**30 + 8
    storage = torch.empty(2 * gap + 16, dtype=torch.float16, device=device)
    u = orthonormal(d, 2, seed=11, dtype=torch.float16, device=device)
    for strides in ((gap, 1), (1, gap)):
        x = storage.as_strided((n, d), strides)
        x.copy_(normal(n, d, seed=12, dtype=torch.float16))
        exact = project_reference(x.double(), u.double())
        assert_within_budget(project(x, u, implementation="triton"), project_reference(x.clone(), u), exact)


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


@pytest.mark.parametrize("needed", ["k", "v", "u_k", "u_v", "k v", "k v u_k u_v"])
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


def test_a_fixed_basis_keeps_no_activation_alive(device: str) -> None:
    x, u = normal(4, 8, seed=23, device=device).requires_grad_(), orthonormal(8, 2, seed=24, device=device)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        project(x, u, implementation="triton")
    assert [t.shape for t in saved] == [u.shape]


@pytest.mark.parametrize("ranks", [(1, 20), (9, 9), (64, 65), (20, 270)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pair(ranks: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    d = max(40, *ranks)
    k, v = normal(2, 9, d, seed=25, dtype=dtype, device=device), normal(9, 2, d, seed=26, dtype=dtype, device=device)
    v = v.transpose(0, 1)  # the two sides may be laid out differently
    u_k, u_v = (orthonormal(d, r, seed=27, dtype=dtype, device=device) for r in ranks)
    pair = project_kv(k, v, u_k, u_v, a=0.5, b=1.5, implementation="triton")
    for actual, x, u in zip(pair, (k, v), (u_k, u_v), strict=True):
        exact = project_reference(x.double(), u.double(), 0.5, 1.5)
        assert_within_budget(actual, project_reference(x, u, 0.5, 1.5), exact)


def test_pair_is_one_launch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from spd_kernels.project import kernel

    launches: list[tuple[int, ...]] = []

    class Counting:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            launches.append(grid)
            return original[grid]

    original = kernel.project_kv_kernel
    monkeypatch.setattr(kernel, "project_kv_kernel", Counting())
    x, u = normal(40, 16, seed=28, device=device), orthonormal(16, 4, seed=29, device=device)
    project_kv(x, x, u, u[:, :2], implementation="triton")
    assert launches == [(3, 2, 1)]


class TestTheorems:
    """What makes U U^T a projection, with a control that is not one."""

    d, r = 48, 13

    def _inputs(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        return normal(21, self.d, seed=30, device=device), orthonormal(self.d, self.r, seed=31, device=device)

    def test_idempotent(self, device: str) -> None:
        x, u = self._inputs(device)
        once = project(x, u, implementation="triton")
        torch.testing.assert_close(project(once, u, implementation="triton"), once, rtol=0, atol=1e-5)
        control = u * 1.1
        once = project(x, control, implementation="triton")
        assert (project(once, control, implementation="triton") - once).abs().max() > 0.1

    def test_symmetric(self, device: str) -> None:
        x, u = self._inputs(device)
        z = normal(21, self.d, seed=32, device=device)
        left = (project(x, u, implementation="triton") * z).sum(-1)
        right = (x * project(z, u, implementation="triton")).sum(-1)
        torch.testing.assert_close(left, right, rtol=0, atol=1e-4)

    def test_erased_directions_are_gone_and_the_parts_sum_to_the_whole(self, device: str) -> None:
        x, u = self._inputs(device)
        erased = project(x, u, a=1.0, b=-1.0, implementation="triton")
        assert (erased @ u).abs().max() < 1e-5 < 1e-1 < (x @ u).abs().max()
        kept = project(x, u, implementation="triton")
        torch.testing.assert_close(kept + erased, x, rtol=0, atol=1e-5)
        control = project(x, u * 1.1, a=1.0, b=-1.0, implementation="triton")
        assert (control @ u).abs().max() > 0.1

    def test_rows_are_independent(self, device: str) -> None:
        x, u = self._inputs(device)
        order = torch.randperm(21, generator=torch.Generator().manual_seed(33)).to(device)
        assert torch.equal(project(x[order], u, implementation="triton"), project(x, u, implementation="triton")[order])

    def test_not_a_number_stays_in_its_row(self, device: str) -> None:
        x, u = self._inputs(device)
        x[4, 7] = torch.nan
        bad = project(x, u, implementation="triton").isnan()
        assert bad[4].all() and bad.sum() == self.d
