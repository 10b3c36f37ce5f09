"""The projection kernels against the float64 reference: values, gradients, layouts, and the theorems."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from spd_kernels import project, project_, project_kv, project_kv_
from spd_kernels.launch import Architecture
from spd_kernels.project import config
from spd_kernels.project.config import ProjectConfig
from spd_kernels.project.reference import project_reference
from spd_kernels.project.work import project_backward_work, project_work
from spd_kernels.testing import assert_within_budget, normal, orthonormal
from tests.spd_kernels.layouts import DTYPES, EXAMPLES, dtypes, sizes, strided

ARCHITECTURES = get_args(Architecture)

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


def every_configuration(itemsize: int) -> list[ProjectConfig]:
    """The shipped ones of all architectures that differ in what the interpreter sees of them."""
    found = (c for architecture in ARCHITECTURES for c in config.shipped(itemsize, architecture))
    return list({(c.block_n, c.block_w, c.block_k, c.streamed): c for c in found}.values())


@pytest.mark.parametrize(
    ("configuration", "dtype"),
    [(c, torch.bfloat16) for c in every_configuration(2)] + [(c, torch.float32) for c in every_configuration(4)],
    ids=str,
)
def test_every_configuration_writes_every_output(configuration: ProjectConfig, dtype: torch.dtype, device: str) -> None:
    """Poisoned outputs; ragged ends of rows, columns and directions."""
    from spd_kernels.project.kernel import launch_project, launch_project_kv

    rank = configuration.block_w + 5 if configuration.streamed else configuration.block_w - 3
    n, d = configuration.block_n + 1, max(rank, configuration.block_k + 8)
    x, u = normal(n, d, seed=3, dtype=dtype, device=device), orthonormal(d, rank, seed=4, dtype=dtype, device=device)
    poisoned = [torch.full_like(x, torch.nan) for _ in range(3)]
    exact = project_reference(x.double(), u.double(), 0.5, 0.5)
    assert launch_project(x, u, 0.5, 0.5, out=poisoned[0], config=configuration) is poisoned[0]
    launch_project_kv(x, x, u, u[:, :1], 0.5, 0.5, out=(poisoned[1], poisoned[2]), config=configuration)
    for actual in poisoned[:2]:
        assert_within_budget(actual, project_reference(x, u, 0.5, 0.5), exact)
    exact = project_reference(x.double(), u[:, :1].double(), 0.5, 0.5)
    assert_within_budget(poisoned[2], project_reference(x, u[:, :1], 0.5, 0.5), exact)
    launch_project(x, u, 0.5, 0.5, out=x, config=configuration)
    assert torch.equal(x, poisoned[0])


class TestConfigurations:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("itemsize", [2, 4])
    def test_they_follow_rows_and_rank(self, itemsize: int, architecture: Architecture) -> None:
        shipped = config.shipped(itemsize, architecture)
        for n in (1, config.FEW_ROWS, config.FEW_ROWS + 1, config.SOME_ROWS, config.SOME_ROWS + 1, 10**6):
            chosen = [config.choose(n, 1024, rank, itemsize, architecture) for rank in range(1, 600)]
            assert all(c.block_w >= rank for rank, c in enumerate(chosen, start=1) if not c.streamed)
            assert all((c.block_n > 16) == (n > config.FEW_ROWS) for c in chosen)
            assert chosen[-1].streamed and not chosen[0].streamed
            assert set(chosen) <= set(shipped)
            assert [c.streamed for c in chosen] == sorted(c.streamed for c in chosen)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("itemsize", [2, 4])
    @pytest.mark.parametrize("rank", [1, 64, 65, 512])
    @pytest.mark.parametrize("n", [1, 64, 65536])
    def test_a_tuner_has_candidates(self, n: int, rank: int, itemsize: int, architecture: Architecture) -> None:
        found = config.candidates(n, 1024, rank, itemsize, architecture)
        assert config.choose(n, 1024, rank, itemsize, architecture) in found
        assert len(set(found)) == len(found) <= 40
        for c in found:
            assert c.streamed or c.block_w >= rank
            assert c.num_warps in (4, 8) and c.num_stages >= 2

    def test_slices_cover_the_columns(self) -> None:
        few = config.choose(1, 1024, 64, 2, "sm_90")
        for tiles, d in ((1, 1), (1, 1024), (2, 1000), (66, 1024), (1000, 1024)):
            columns = config.columns_per_program(tiles, d, few, 132)
            assert columns % few.block_k == 0 and columns * -(-d // columns) >= d
            assert tiles * -(-d // columns) <= max(tiles, 132)
        assert config.columns_per_program(2, 1024, few, 132) == few.block_k
        assert config.columns_per_program(132, 1024, few, 132) == 1024


def test_work() -> None:
    work = project_work(65536, 1024, 128, 2, sides=2)
    assert work.bytes == 2 * 2 * (2 * 65536 * 1024 + 1024 * 128)
    assert work.flops == 2 * 4 * 65536 * 1024 * 128
    assert project_work(65536, 1024, 128, 2, blend=True, sides=2) == work
    assert project_backward_work(7, 5, 3, 4, needs_u=False) == project_work(7, 5, 3, 4)
    both = project_backward_work(7, 5, 3, 4)
    assert both.bytes == 4 * (3 * 7 * 5 + 2 * 5 * 3) and both.flops == 10 * 7 * 5 * 3


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


class TestInPlace:
    """The values of the other form, in the memory of x and nowhere else."""

    @pytest.mark.parametrize("rank", [6, 140], ids=["in registers", "streamed"])
    @pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("expanded")])
    def test_layouts(self, layout: str, rank: int, device: str) -> None:
        memory = normal(3, 4, 5, 48 if rank < 48 else 320, seed=40, device=device)
        view = LAYOUTS[layout]
        x = view(memory)
        d = x.shape[-1]
        u = orthonormal(d, min(rank, d), seed=41, device=device)
        for implementation in ("triton", "reference"):
            memory = normal(*memory.shape, seed=40, device=device)
            expected = memory.clone()
            view(expected).copy_(project(view(memory), u, a=0.25, b=2.0, implementation=implementation))
            x = view(memory)
            wanted = project(x, u, a=0.25, b=2.0, implementation=implementation)
            assert project_(x, u, a=0.25, b=2.0, implementation=implementation) is x
            assert torch.equal(x, wanted)
            if layout != "columns first":  # which is no view
                assert torch.equal(memory, expected)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("n", [1, 70])
    def test_keys_and_values_of_a_fused_projection(self, n: int, dtype: torch.dtype, device: str) -> None:
        d = 40
        fused = normal(2, n, 3 * d, seed=42, dtype=dtype, device=device)
        q, k, v = fused.clone().split(d, dim=-1)
        u_k, u_v = (orthonormal(d, r, seed=43, dtype=dtype, device=device) for r in (4, 20))
        wanted = project_kv(k, v, u_k, u_v, a=1.0, b=-1.0, implementation="triton")
        _, in_k, in_v = fused.split(d, dim=-1)
        out = project_kv_(in_k, in_v, u_k, u_v, a=1.0, b=-1.0, implementation="triton")
        assert out[0] is in_k and out[1] is in_v
        assert torch.equal(fused, torch.cat((q, *wanted), dim=-1))

    @pytest.mark.parametrize("implementation", ["triton", "reference"])
    def test_a_basis_in_the_same_memory(self, implementation: str, device: str) -> None:
        """A step towards an orthonormal basis writes over what it reads."""
        u = normal(20, 6, seed=44, device=device) / 5
        wanted = project(u.T, u, a=1.5, b=-0.5, implementation=implementation)
        assert torch.equal(project_(u.T, u, a=1.5, b=-0.5, implementation=implementation), wanted)
        k, v = normal(2, 20, 20, seed=45, device=device)
        wanted = project_kv(k, v, v[:, :3].clone(), k[:, 2:4].clone(), implementation=implementation)[1].clone()
        assert torch.equal(project_kv_(k, v, v[:, :3], k[:, 2:4], implementation=implementation)[1], wanted)

    @pytest.mark.parametrize("implementation", ["triton", "reference"])
    def test_autograd_sees_the_change(self, implementation: str, device: str) -> None:
        leaf = normal(3, 8, seed=46, device=device).requires_grad_()
        u = orthonormal(8, 2, seed=47, device=device)
        kept = 2 * leaf
        loss = kept.square().sum()
        project_(kept.detach(), u, implementation=implementation)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_what_is_refused(self, device: str) -> None:
        u = orthonormal(8, 2, seed=48, device=device)
        rows = normal(6, 8, seed=49, device=device)
        for x in (rows[:1].expand(6, 8), rows[:, :1].expand(6, 8), rows.flatten().as_strided((5, 8), (4, 1))):
            with pytest.raises(ValueError, match=r"x: expected elements that do not share memory.*strides"):
                project_(x, u)
            with pytest.raises(ValueError, match=r"v: expected elements that do not share memory"):
                project_kv_(torch.zeros_like(x), x, u, u)
        for x, basis in ((rows.clone().requires_grad_(), u), (rows, u.clone().requires_grad_())):
            with pytest.raises(ValueError, match=r"x: expected tensors that need no gradient"):
                project_(x, basis)
            with torch.no_grad():
                project_(x, basis)
            with pytest.raises(ValueError, match=r"k: expected tensors that need no gradient"):
                project_kv_(x, torch.zeros_like(rows), basis, basis)
        assert project_(rows[:, :1].expand(6, 1), normal(1, 1, seed=50, device=device)).shape == (6, 1)
        with pytest.raises(TypeError, match=r"u: expected dtype"):
            project_(rows, u.double())

    def test_keys_that_are_values(self, device: str) -> None:
        u = orthonormal(4, 2, seed=51, device=device)
        memory = normal(6, 16, seed=52, device=device)
        for k, v in (
            (memory[:, :4], memory[:, :4]),
            (memory[:, :4], memory[:, 3:7]),
            (memory[:4, :4], memory[2:, :4]),
            (memory[:4, :4], memory[:4].T[:4].T[:, :4]),
            (memory[:4, :4], memory[:4, :4].T),
        ):
            for implementation in ("triton", "reference"):
                with pytest.raises(ValueError, match=r"v: expected no memory in common with k"):
                    project_kv_(k, v, u, u, implementation=implementation)
        for k, v in (
            (memory[:, :4], memory[:, 4:8]),
            (memory[::2, :4], memory[1::2, :4]),
            (memory[:, ::4], memory[:, 1::4]),
        ):
            wanted = project_kv(k, v, u, u, implementation="triton")
            assert all(map(torch.equal, project_kv_(k, v, u, u, implementation="triton"), wanted))


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
    assert launches == [(1, 2, 1)]


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


class TestProperties:
    """Random shapes, layouts and types."""

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(data=st.data(), dtype=dtypes, lead=st.lists(st.integers(0, 9), max_size=3), d=sizes(70))
    def test_values(self, data: st.DataObject, dtype: torch.dtype, lead: list[int], d: int, device: str) -> None:
        r = data.draw(st.one_of(st.just(1), st.just(d), st.integers(1, d)), label="r")
        a, b = data.draw(st.sampled_from([(0.0, 1.0), (1.0, -1.0), (0.25, 0.75)]), label="a, b")
        x = data.draw(strided((*lead, d), dtype, device), label="x")
        u = data.draw(strided((d, r), dtype, device), label="u") / d
        exact, eager = project_reference(x.double(), u.double(), a, b), project_reference(x, u, a, b)
        actual = project(x, u, a=a, b=b, implementation="triton")
        assert_within_budget(actual, eager, exact)
        k, v = project_kv(x, x.flip(-1), u, u[:, :1], a=a, b=b, implementation="triton")
        assert torch.equal(k, actual)
        v_exact = project_reference(x.flip(-1).double(), u[:, :1].double(), a, b)
        assert_within_budget(v, project_reference(x.flip(-1), u[:, :1], a, b), v_exact)

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(data=st.data(), dtype=dtypes, lead=st.lists(st.integers(0, 9), max_size=3), d=sizes(70))
    def test_in_place(self, data: st.DataObject, dtype: torch.dtype, lead: list[int], d: int, device: str) -> None:
        x = data.draw(strided((*lead, d), dtype, device, expanded=False), label="x")
        u = orthonormal(d, data.draw(st.integers(1, d), label="r"), seed=53, dtype=dtype, device=device)
        wanted = project(x, u, a=0.5, b=0.5, implementation="triton")
        assert torch.equal(project_(x, u, a=0.5, b=0.5, implementation="triton"), wanted)

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(n=sizes(40), d=sizes(80), share=st.floats(0, 1), seed=st.integers(0, 2**16))
    def test_projections(self, n: int, d: int, share: float, seed: int, device: str) -> None:
        """Idempotent, symmetric, complete with its complement; within a larger subspace it is the smaller one."""
        r = max(1, round(share * d))
        x, z = normal(2, n, d, seed=seed, device=device)
        u = orthonormal(d, r, seed=seed, device=device)
        smaller = u[:, : (r + 1) // 2]

        def onto(x: torch.Tensor, u: torch.Tensor, a: float = 0.0, b: float = 1.0) -> torch.Tensor:
            return project(x, u, a=a, b=b, implementation="triton")

        kept = onto(x, u)
        near = {"rtol": 0.0, "atol": 2e-5}
        torch.testing.assert_close(onto(kept, u), kept, **near)
        torch.testing.assert_close(onto(kept, smaller), onto(x, smaller), **near)
        torch.testing.assert_close(onto(onto(x, smaller), u), onto(x, smaller), **near)
        torch.testing.assert_close(kept + onto(x, u, 1.0, -1.0), x, **near)
        torch.testing.assert_close((kept * z).sum(-1), (x * onto(z, u)).sum(-1), rtol=0.0, atol=2e-4)
        if r < d:  # the control: a basis that is not orthonormal does not project
            assert not torch.allclose(onto(onto(x, 1.5 * u), 1.5 * u), onto(x, 1.5 * u), **near)

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(data=st.data(), dtype=dtypes, n=sizes(70), d=sizes(70), streamed=st.booleans())
    def test_the_order_of_rows_does_not_matter(
        self, data: st.DataObject, dtype: torch.dtype, n: int, d: int, streamed: bool, device: str
    ) -> None:
        from spd_kernels.project.kernel import launch_project

        x = normal(n, d, seed=n, dtype=dtype, device=device)
        u = orthonormal(d, data.draw(st.integers(1, d), label="r"), seed=d, dtype=dtype, device=device)
        order = torch.tensor(data.draw(st.permutations(range(n)), label="order"), device=device)
        few = config.choose(1, d, 10**6 if streamed else 1, x.element_size(), "sm_90")
        few = few if streamed or u.shape[1] <= few.block_w else None
        assert torch.equal(
            launch_project(x[order], u, 1.0, -1.0, config=few), launch_project(x, u, 1.0, -1.0, config=few)[order]
        )

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(
        data=st.data(),
        dtype=dtypes,
        n=sizes(40),
        d=sizes(70),
        value=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    )
    def test_what_is_not_finite_goes_where_the_reference_sends_it(
        self, data: st.DataObject, dtype: torch.dtype, n: int, d: int, value: float, device: str
    ) -> None:
        r = data.draw(st.one_of(st.just(1), st.integers(1, d)), label="r")
        row, column = data.draw(st.integers(0, n - 1), label="row"), data.draw(st.integers(0, d - 1), label="column")
        a = data.draw(st.sampled_from([0.0, 1.0]), label="a")
        x, u = (normal(*s, seed=54, dtype=dtype, device=device) / 4 for s in ((n, d), (d, r)))
        x[row, column] = value
        if data.draw(st.booleans(), label="a zero meets it"):
            u[column, 0] = 0.0
        expected = project_reference(x, u, a, 1.0)
        actual = project(x, u, a=a, implementation="triton")
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.isposinf(), expected.isposinf())
        assert torch.equal(actual.isneginf(), expected.isneginf())
        assert actual.isfinite().sum() == (n - 1) * d or a == 0.0 or actual[row].isfinite().sum() < d
