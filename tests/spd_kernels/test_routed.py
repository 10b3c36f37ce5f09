"""The routed projection against the float64 reference: values, routes, gradients, layouts, and what it must not do."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, get_args

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from spd_kernels import project_routed, stack_subspaces
from spd_kernels.launch import Architecture, Implementation
from spd_kernels.project.reference import project_reference
from spd_kernels.roofline import Work
from spd_kernels.routed import config
from spd_kernels.routed.reference import project_routed_reference
from spd_kernels.routed.work import routed_work
from spd_kernels.testing import assert_within_budget, normal, orthonormal
from tests.spd_kernels.layouts import DTYPES, EXAMPLES, dtypes, sizes, strided

Tensors = dict[str, torch.Tensor]


def bank_of(subspaces: int, d: int, r: int, *, seed: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.stack([orthonormal(d, r, seed=seed + s, dtype=dtype, device=device) for s in range(subspaces)])


def integers(values: list[int], device: str, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def routes(sequences: int, subspaces: int, device: str, seed: int = 0) -> torch.Tensor:
    """An index of every kind of value: each subspace in turn, and -1."""
    return (torch.arange(sequences) * 7 + seed).remainder(subspaces + 1).sub(1).to(device)


def pack(x: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of all sequences, shuffled, and the sequence of each."""
    sequences, length, d = x.shape
    rows = torch.arange(sequences, device=x.device).repeat_interleave(length)
    order = torch.randperm(rows.numel(), generator=torch.Generator().manual_seed(seed)).to(x.device)
    return x.reshape(-1, d)[order], rows[order]


def assert_matches(actual: torch.Tensor, x: torch.Tensor, bank: torch.Tensor, *others: Any, **more: Any) -> None:
    exact = project_routed_reference(x.double(), bank.double(), *others, **more)
    assert_within_budget(actual, project_routed_reference(x, bank, *others, **more), exact)


# (B, T, S, d, r) by regime. d and r beyond a few blocks repeat the loops that these walk already.
SHAPES = {
    "one of everything": (1, 1, 1, 1, 1),
    "decode": (5, 1, 3, 64, 16),
    "one subspace": (3, 4, 1, 96, 8),
    "r = d, not a power of two": (2, 17, 2, 48, 48),
    "aligned": (4, 16, 3, 128, 64),
    "one past the rows, d and r blocks": (3, 17, 2, 129, 65),
    "one short of them": (3, 15, 2, 127, 63),
    "odd": (7, 3, 4, 33, 13),
    "more subspaces than sequences": (2, 5, 9, 40, 8),
    "largest rank in registers": (2, 2, 2, 260, 256),
    "streamed rank": (2, 2, 2, 262, 260),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str) -> None:
    sequences, length, subspaces, d, r = shape
    x = normal(sequences, length, d, seed=1, dtype=dtype, device=device)
    bank = bank_of(subspaces, d, r, seed=2, dtype=dtype, device=device)
    index = routes(sequences, subspaces, device, seed=1)
    for a, b in ((0.0, 1.0), (0.75, -1.25)):
        actual = project_routed(x, bank, index, a=a, b=b, implementation="triton")
        assert_matches(actual, x, bank, index, a, b)
        assert torch.equal(actual[index == -1], x[index == -1])
        packed, rows = pack(x)
        actual = project_routed(packed, bank, index, a=a, b=b, rows=rows, implementation="triton")
        assert_matches(actual, packed, bank, index, a, b, rows)
        assert torch.equal(actual[index[rows] == -1], packed[index[rows] == -1])


@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_configuration_writes_every_output(packed: bool, dtype: torch.dtype, device: str) -> None:
    from spd_kernels.routed.kernel import launch_routed

    d = 96
    x = normal(3, 17, d, seed=3, dtype=dtype, device=device)
    index = integers([1, -1, 0], device)
    rows = None
    if packed:
        x, rows = pack(x)
    candidates = config.candidates(1, x.element_size(), "sm_90", packed=packed)
    assert {c.streamed for c in candidates} == {False, True}
    for chosen in dict.fromkeys(candidates):
        r = min(chosen.block_w, d) - 3
        bank = bank_of(2, d, r, seed=4, dtype=dtype, device=device)
        for ranks in (None, integers([r - 1, 5], device)):
            out = torch.full_like(x, torch.nan)
            assert launch_routed(x, bank, index, 0.5, 0.5, rows, ranks, out=out, config=chosen) is out
            assert_matches(out, x, bank, index, 0.5, 0.5, rows, ranks)


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_configurations_follow_rows_and_rank(architecture: Architecture) -> None:
    for itemsize in (2, 4):
        arguments = (1024, 64, itemsize, architecture)
        # A decode step has short tiles, however many sequences it has; prefill has tall ones.
        assert config.choose(4096, 1, *arguments).block_n == config.SHORT
        assert config.choose(64, 1024, *arguments).block_n > config.SHORT
        assert config.choose_packed(4096, 4096, *arguments[1:]).block_n == config.SHORT
        assert config.choose_packed(64, 65536, *arguments[1:]).block_n > config.SHORT
        for rank, ranked, rows in itertools.product(
            (1, 16, 17, 64, 65, 128, 129, 256, 257, 512), (0, 1), (1, 100, 4096)
        ):
            rest = (1024, rank, itemsize, architecture)
            chosen = config.choose(16, rows, *rest, ranked=bool(ranked))
            assert chosen in config.candidates(rank, itemsize, architecture, packed=False)
            chosen = config.choose_packed(16, 16 * rows, *rest[1:], ranked=bool(ranked))
            assert chosen in config.candidates(rank, itemsize, architecture, packed=True)


def test_rows_of_a_short_tile_share_the_processors() -> None:
    short, tall = config.choose_packed(8, 8, 8, 2, "sm_90"), config.choose_packed(8, 65536, 8, 2, "sm_90")
    assert [config.rows_per_program(n, short, 132) for n in (1, 132, 133, 10**6)] == [1, 1, 2, 16]
    assert config.rows_per_program(10**6, tall, 132) == tall.block_n


class TestRoutes:
    """Which subspace serves which row."""

    d, r = 48, 11

    def _inputs(self, device: str, sequences: int = 6, length: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
        x = normal(sequences, length, self.d, seed=5, device=device)
        return x, bank_of(4, self.d, self.r, seed=6, dtype=torch.float32, device=device)

    def test_each_sequence_is_projected_by_its_own_subspace(self, device: str) -> None:
        x, bank = self._inputs(device)
        index = integers([3, 0, 1, 1, 2, 0], device)
        actual = project_routed(x, bank, index, a=0.5, b=2.0, implementation="triton")
        for i, s in enumerate(index.tolist()):
            exact = project_reference(x[i].double(), bank[s].double(), 0.5, 2.0)
            assert_within_budget(actual[i], project_reference(x[i], bank[s], 0.5, 2.0), exact)
        control = project_routed(x, bank, index.flip(0), a=0.5, b=2.0, implementation="triton")
        assert (control - actual).abs().amax((1, 2))[index != index.flip(0)].min() > 0.1

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
    @pytest.mark.parametrize("packed", [False, True], ids=["sequences", "packed"])
    def test_either_type_of_integer(self, packed: bool, dtype: torch.dtype, device: str) -> None:
        x, bank = self._inputs(device)
        index, ranks = integers([3, -1, 1, 1, 2, 0], device), integers([0, 3, 11, 8], device)
        rows = None
        if packed:
            x, rows = pack(x)
        expected = project_routed(x, bank, index, rows=rows, ranks=ranks, implementation="triton")
        arguments = {"rows": None if rows is None else rows.to(dtype), "ranks": ranks.to(dtype)}
        actual = project_routed(x, bank, index.to(dtype), **arguments, implementation="triton")
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize("index", [[2, 2, 2, 2, 2, 2], [-1] * 6, [0, 1, 2, 3, 0, 1]], ids=str)
    def test_packed_equals_unpacked(self, index: list[int], device: str) -> None:
        from spd_kernels.routed.kernel import launch_routed

        x, bank = self._inputs(device)
        chosen = config.choose_packed(6, 30, self.r, 4, "sm_90")
        route = integers(index, device)
        unpacked = launch_routed(x, bank, route, 0.5, 1.0, config=chosen)
        packed, rows = pack(x)
        actual = launch_routed(packed, bank, route, 0.5, 1.0, rows=rows, config=chosen)
        expected, _ = pack(unpacked)
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize("packed", [False, True], ids=["sequences", "packed"])
    def test_order_does_not_matter(self, packed: bool, device: str) -> None:
        x, bank = self._inputs(device)
        index = integers([3, -1, 1, 1, 2, 0], device)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(7)).to(device)
        rows = None
        if packed:
            x, rows = pack(x)
            order = torch.randperm(30, generator=torch.Generator().manual_seed(8)).to(device)
        expected = project_routed(x, bank, index, rows=rows, implementation="triton")
        again = {"rows": rows[order]} if rows is not None else {}
        route = index if packed else index[order]
        assert torch.equal(project_routed(x[order], bank, route, **again, implementation="triton"), expected[order])
        # Nor does the order of the subspaces, where the index follows it.
        flipped = torch.where(index >= 0, 3 - index, index)
        assert torch.equal(project_routed(x, bank.flip(0), flipped, rows=rows, implementation="triton"), expected)

    def test_left_alone_bit_for_bit(self, device: str) -> None:
        x, bank = self._inputs(device)
        x = x.bfloat16()
        x[1, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0], dtype=x.dtype)
        index = integers([0, -1, 1, -1, 2, 3], device)
        y = project_routed(x, bank.bfloat16(), index, a=0.5, implementation="triton")
        assert torch.equal(y[index == -1].view(torch.int16), x[index == -1].view(torch.int16))
        control = project_routed(x, bank.bfloat16(), index.clamp(min=0), a=0.5, implementation="triton")[[1, 3]]
        assert not torch.equal(control.view(torch.int16), x[[1, 3]].view(torch.int16))

    def test_leading_axes(self, device: str) -> None:
        """(B, H, T, d) and (B, d); packed (…, d)."""
        x, bank = self._inputs(device)
        index = integers([3, -1, 1, 1, 2, 0], device)
        expected = project_routed(x, bank, index, implementation="triton")
        heads = x[:, None].expand(6, 2, 5, self.d).transpose(1, 2)
        actual = project_routed(heads, bank, index, implementation="triton")
        assert all(torch.equal(actual[:, :, h], expected) for h in range(2))
        assert torch.equal(project_routed(x[:, 2], bank, index, implementation="triton"), expected[:, 2])
        rows = torch.arange(6, device=device)[:, None].expand(6, 5)
        assert_matches(project_routed(x, bank, index, rows=rows, implementation="triton"), x, bank, index, rows=rows)
        one = project_routed(x[3, 2], bank, index, rows=rows[3, 2], implementation="triton")
        assert_matches(one, x[3, 2], bank, index, rows=rows[3, 2])

    @pytest.mark.parametrize("implementation", ["triton", "reference"])
    def test_nothing_to_do(self, implementation: Implementation, device: str) -> None:
        x, bank = self._inputs(device)
        none = integers([], device)
        index = integers([0] * 6, device)
        assert project_routed(x[:, :0], bank, index, implementation=implementation).shape == (6, 0, self.d)
        assert project_routed(x[:0], bank, none, implementation=implementation).shape == (0, 5, self.d)
        assert project_routed(x[0, :0], bank, none, rows=none, implementation=implementation).shape == (0, self.d)
        leaves = x[:, :0].clone().requires_grad_(), bank.clone().requires_grad_()
        project_routed(*leaves, index, implementation=implementation).sum().backward()
        assert leaves[1].grad is not None and not leaves[1].grad.any()


class TestRanks:
    """A subspace has its first ranks[s] columns."""

    d = 60

    def _inputs(self, r: int, device: str, dtype: torch.dtype = torch.float32) -> Tensors:
        return {
            "x": normal(5, 20, self.d, seed=9, dtype=dtype, device=device),
            "bank": bank_of(4, self.d, r, seed=10, dtype=dtype, device=device),
            "index": integers([3, 0, 1, -1, 2], device),
            "ranks": integers([0, 1, r // 2, r], device),
        }

    @pytest.mark.parametrize("r", [13, 32, 60], ids="r={}".format)
    @pytest.mark.parametrize("packed", [False, True], ids=["sequences", "packed"])
    @pytest.mark.parametrize("streamed", [False, True], ids=["in registers", "streamed"])
    def test_columns_past_a_rank_do_not_count(self, r: int, packed: bool, streamed: bool, device: str) -> None:
        from spd_kernels.routed.kernel import launch_routed

        t = self._inputs(r, device)
        if packed:
            t["x"], t["rows"] = pack(t["x"])
        every = config.candidates(r, 4, "sm_90", packed=packed)
        chosen = next(c for c in every if c.streamed == streamed)
        past = torch.arange(r, device=device) >= t["ranks"][:, None, None]
        ranks, bank = t.pop("ranks"), t.pop("bank")
        actual = launch_routed(bank=bank, ranks=ranks, a=0.5, b=1.0, config=chosen, **t)
        x, index, rows = t["x"], t["index"], t.get("rows")
        assert_matches(actual, x, bank, index, 0.5, 1.0, rows, ranks)
        # Zero columns give the same, whatever else stands there gives the same.
        zeros = torch.where(past, 0.0, bank)
        assert_matches(
            launch_routed(bank=zeros, a=0.5, b=1.0, config=chosen, **t), x, bank, index, 0.5, 1.0, rows, ranks
        )
        garbage = torch.where(past, 1e6 * bank, bank)
        assert torch.equal(launch_routed(bank=garbage, ranks=ranks, a=0.5, b=1.0, config=chosen, **t), actual)
        # Past the last group of 16 bytes it is not even read.
        group = 4 if r % 4 == 0 else 1
        unread = (
            torch.arange(r, device=device)
            >= (ranks + group - 1).div(group, rounding_mode="floor")[:, None, None] * group
        )
        poisoned = torch.where(unread, torch.nan, bank)
        assert poisoned.isnan().any()
        assert torch.equal(launch_routed(bank=poisoned, ranks=ranks, a=0.5, b=1.0, config=chosen, **t), actual)
        assert launch_routed(bank=poisoned, a=0.5, b=1.0, config=chosen, **t).isnan().any(), "the control"

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_large_ranks(self, dtype: torch.dtype, device: str) -> None:
        """Those from which on blocks of directions stop at each rank."""
        d = 280
        x = normal(2, 40, d, seed=11, dtype=dtype, device=device)
        bank = bank_of(2, d, d, seed=12, dtype=dtype, device=device)
        index, ranks = integers([1, 0], device), integers([130, 7], device, torch.int32)
        assert_matches(
            project_routed(x, bank, index, ranks=ranks, implementation="triton"), x, bank, index, ranks=ranks
        )

    def test_clamped_on_a_gpu(self, device: str) -> None:
        t = self._inputs(13, device)
        wrong = integers([-5, 1, 6, 14], device)
        expected = project_routed(**t, a=0.5, implementation="triton")
        assert torch.equal(project_routed(**t | {"ranks": wrong}, a=0.5, implementation="triton"), expected)

    def test_rank_zero_leaves_the_x_term(self, device: str) -> None:
        t = self._inputs(13, device)
        t["x"][1, 2, 3] = torch.inf
        y = project_routed(**t, a=0.5, implementation="triton")
        assert torch.equal(y[1], 0.5 * t["x"][1])

    def test_stack(self, device: str) -> None:
        bases = [orthonormal(self.d, r, seed=13 + r, device=device) for r in (5, 20, 1)] + [
            torch.zeros(self.d, 0, device=device)
        ]
        bank, ranks = stack_subspaces(bases)
        assert bank.shape == (4, self.d, 32) and ranks.tolist() == [5, 20, 1, 0] and ranks.dtype is torch.int32
        assert ranks.device == bank.device
        x = normal(4, 3, self.d, seed=14, device=device)
        index = torch.arange(4, device=device)
        y = project_routed(x, bank, index, ranks=ranks, implementation="triton")
        for i, u in enumerate(bases):
            exact = project_reference(x[i].double(), u.double())
            assert_within_budget(y[i], project_reference(x[i], u), exact)
        torch.testing.assert_close(project_routed(x, bank, index, implementation="triton"), y)

    def test_stack_is_no_wider_than_d_and_differentiable(self) -> None:
        bases = [orthonormal(20, 18, seed=15).requires_grad_(), orthonormal(20, 2, seed=16).requires_grad_()]
        bank, _ = stack_subspaces(bases)
        assert bank.shape == (2, 20, 20)
        bank.square().sum().backward()
        for u in bases:
            torch.testing.assert_close(u.grad, 2 * u.detach())


class TestOutOfRange:
    """An error where it costs nothing to look, NaN where a GPU would have to be waited for."""

    def _inputs(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A bank that lies between NaNs, so that a read beyond it would show in rows that it must not reach."""
        memory = torch.full((5, 24, 6), torch.nan, device=device)
        memory[1:4] = bank_of(3, 24, 6, seed=17, dtype=torch.float32, device=device)
        return normal(6, 3, 24, seed=18, device=device), memory[1:4]

    @pytest.mark.parametrize("wrong", [-2, 3, 2**31 - 1, 2**32 + 1, -(2**40)])
    @pytest.mark.parametrize("packed", [False, True], ids=["sequences", "packed"])
    def test_index(self, wrong: int, packed: bool, device: str) -> None:
        x, bank = self._inputs(device)
        good, bad = integers([0, 1, -1, 2, 1, 0], device), integers([0, 1, -1, 2, wrong, 0], device)
        rows = None
        if packed:
            x, rows = pack(x)
        expected = project_routed(x, bank, good, rows=rows, implementation="triton")
        actual = project_routed(x, bank, bad, rows=rows, implementation="triton")
        concerned = torch.arange(6, device=device) == 4 if rows is None else rows == 4
        assert actual[concerned].isnan().all() and torch.equal(actual[~concerned], expected[~concerned])
        torch.testing.assert_close(project_routed_reference(x, bank, bad, rows=rows), actual, equal_nan=True)

    @pytest.mark.parametrize("wrong", [-1, 6, 2**31 - 1, 2**32, -(2**40)])
    def test_rows(self, wrong: int, device: str) -> None:
        x, rows = pack(self._inputs(device)[0])
        _, bank = self._inputs(device)
        index = integers([0, 1, -1, 2, 1, 0], device)
        expected = project_routed(x, bank, index, rows=rows, implementation="triton")
        concerned = rows == 4
        bad = torch.where(concerned, wrong, rows)
        actual = project_routed(x, bank, index, rows=bad, implementation="triton")
        assert actual[concerned].isnan().all() and torch.equal(actual[~concerned], expected[~concerned])
        none = project_routed(x, bank, index[:0], rows=rows, implementation="triton")
        assert none.isnan().all() and project_routed_reference(x, bank, index[:0], rows=rows).isnan().all()

    def test_never_launches_with_a_pointer_outside_the_bank(self, device: str) -> None:
        """With the NaN rows' subspace read as anything, these addresses would be far outside of any memory."""
        x, bank = self._inputs(device)
        huge = bank.as_strided(bank.shape, bank.stride())
        y = project_routed(x, huge, integers([2**62] * 6, device), implementation="triton")
        assert y.isnan().all()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"index": [0, 3]}, r"index\[1\]: expected -1 to 2; got 3"),
            ({"index": [-2, 0]}, r"index\[0\]: expected -1 to 2; got -2"),
            ({"rows": [0, 2]}, r"rows\[1\]: expected 0 to 1; got 2"),
            ({"rows": [-1, 0]}, r"rows\[0\]: expected 0 to 1; got -1"),
            ({"ranks": [1, 7, 0]}, r"ranks\[1\]: expected 0 to 6; got 7"),
            ({"ranks": [1, 2, -1]}, r"ranks\[2\]: expected 0 to 6; got -1"),
        ],
    )
    @pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
    def test_errors_on_the_cpu(self, changes: dict[str, list[int]], message: str, grad: bool) -> None:
        x, bank = normal(2, 24, seed=19).requires_grad_(grad), self._inputs("cpu")[1]
        arguments = {name: integers(values, "cpu") for name, values in ({"index": [0, 1]} | changes).items()}
        with pytest.raises(ValueError, match=message):
            project_routed(x, bank, **arguments)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


LONG = torch.int64


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bank": zeros(3, 5, 2)}, ValueError, r"bank: expected shape \(S, 4, r\), since x is \(2, 3, 4\); got"),
        ({"bank": zeros(4, 2)}, ValueError, r"bank: expected shape \(S, 4, r\).*got \(4, 2\)"),
        ({"bank": zeros(3, 4, 5)}, ValueError, r"bank: expected 1 <= r <= d = 4 columns; got r = 5"),
        ({"bank": zeros(3, 4, 0)}, ValueError, r"bank: expected 1 <= r <= d = 4 columns; got r = 0"),
        ({"bank": zeros(0, 4, 2)}, ValueError, r"bank: expected at least one subspace; got none"),
        ({"bank": zeros(3, 4, 2, dtype=torch.float64)}, TypeError, r"bank: expected dtype torch.float32.*float64"),
        ({"bank": zeros(3, 4, 2, device="meta")}, ValueError, r"bank: expected device cpu as x has; got meta"),
        ({"x": zeros()}, ValueError, r"x: expected shape .*got a scalar"),
        ({"x": zeros(2, 3, 4, dtype=LONG)}, TypeError, r"x: expected float32.*got torch.int64"),
        ({"x": zeros(3, 4)}, ValueError, r"x: expected shape \(2, ..., 4\), since index is \(2,\); got \(3, 4\)"),
        ({"x": zeros(4)}, ValueError, r"x: expected shape \(2, ..., 4\).*packed rows need the argument rows"),
        ({"index": zeros(2)}, TypeError, r"index: expected int32 or int64; got torch.float32"),
        ({"index": zeros(2, dtype=torch.bool)}, TypeError, r"index: expected int32 or int64; got torch.bool"),
        ({"index": zeros(2, 1, dtype=LONG)}, ValueError, r"index: expected shape \(B,\).*got \(2, 1\)"),
        ({"index": zeros(2, dtype=LONG, device="meta")}, ValueError, r"index: expected device cpu as x has; got meta"),
        ({"rows": zeros(2, 3)}, TypeError, r"rows: expected int32 or int64; got torch.float32"),
        ({"rows": zeros(2, dtype=LONG)}, ValueError, r"rows: expected shape \(2, 3\), one a row of x; got \(2,\)"),
        ({"ranks": zeros(3)}, TypeError, r"ranks: expected int32 or int64; got torch.float32"),
        ({"ranks": zeros(2, dtype=LONG)}, ValueError, r"ranks: expected shape \(3,\), one a subspace; got \(2,\)"),
    ],
)
def test_arguments(changes: Tensors, error: type[Exception], message: str) -> None:
    arguments = {"x": zeros(2, 3, 4), "bank": zeros(3, 4, 2), "index": zeros(2, dtype=LONG)} | changes
    with pytest.raises(error, match=message):
        project_routed(**arguments)


@pytest.mark.parametrize(
    ("bases", "error", "message"),
    [
        ([], ValueError, r"bases: expected at least one; got none"),
        ([zeros(4)], ValueError, r"bases\[0\]: expected shape \(d, r\) with r <= d; got \(4,\)"),
        ([zeros(4, 2), zeros(4, 5)], ValueError, r"bases\[1\]: expected shape .*got \(4, 5\)"),
        ([zeros(4, 2), zeros(5, 2)], ValueError, r"bases\[1\]: expected d = 4 as bases\[0\] has; got 5"),
        ([zeros(4, 2), zeros(4, 2, dtype=torch.float16)], TypeError, r"bases\[1\]: expected dtype torch.float32"),
        ([zeros(4, 2, dtype=LONG)], TypeError, r"bases\[0\]: expected float32.*got torch.int64"),
        ([zeros(4, 2), zeros(4, 2, device="meta")], ValueError, r"bases\[1\]: expected device cpu.*got meta"),
    ],
)
def test_bases(bases: list[torch.Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        stack_subspaces(bases)


def test_offsets_past_32_bits(device: str) -> None:
    """Rows, columns and subspaces whose offsets in elements exceed 2^31: what lies between is not touched."""
    sequences, d, gap = 3, 3, 2**30 + 8
    storage = torch.empty(2 * gap + 64, dtype=torch.float16, device=device)
    bank, index = bank_of(3, d, 2, seed=20, dtype=torch.float16, device=device), integers([2, -1, 0], device)
    x = normal(sequences, d, seed=21, dtype=torch.float16, device=device)
    rows = integers([2, 0, 1], device)
    for strides in ((gap, 1), (1, gap)):
        far = storage.as_strided((sequences, d), strides)
        far.copy_(x)
        assert_matches(project_routed(far, bank, index, implementation="triton"), x, bank, index)
        assert_matches(project_routed(far, bank, index, rows=rows, implementation="triton"), x, bank, index, rows=rows)
    for strides in ((gap, 2, 1), (1, gap, 3), (2, 8, gap)):
        size = (3, d, 2) if strides[2] == 1 else (2, d, 2)
        far = storage.as_strided(size, strides)
        far.copy_(bank[: size[0]])
        near = index.clamp(max=size[0] - 1)
        assert_matches(project_routed(x, far, near, implementation="triton"), x, bank, near)


GRADIENT_CASES = {
    "sequences": ((4, 9, 33, 13), [2, -1, 0, 2], False, False),
    "packed": ((4, 5, 33, 13), [2, -1, 0, 2], True, False),
    "sequences with ranks": ((3, 4, 16, 16), [1, 0, 2], False, True),
    "packed with ranks": ((3, 4, 16, 16), [1, 0, 2], True, True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRADIENT_CASES.values(), ids=GRADIENT_CASES.keys())
def test_gradients(case: tuple[tuple[int, ...], list[int], bool, bool], dtype: torch.dtype, device: str) -> None:
    (sequences, length, d, r), route, packed, ranked = case
    x, g = (normal(sequences, length, d, seed=s, dtype=dtype, device=device) for s in (22, 23))
    bank = normal(4, d, r, seed=24, dtype=dtype, device=device) / d**0.5
    index = integers(route, device)
    ranks = integers([r, 3, 0, 1], device) if ranked else None
    rows = None
    if packed:
        (x, rows), (g, _) = pack(x), pack(g)

    def gradients(dtype: torch.dtype, function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, bank)]
        y = function(*leaves, index, a=0.5, b=-1.5, rows=rows, ranks=ranks)
        return torch.autograd.grad(y, leaves, g.to(dtype))

    def kernel(*tensors: torch.Tensor, **more: Any) -> torch.Tensor:
        return project_routed(*tensors, **more, implementation="triton")

    exact = gradients(torch.float64, project_routed_reference)
    eager = gradients(dtype, project_routed_reference)
    actual = gradients(dtype, kernel)
    for name, t, e, ex in zip(("x", "bank"), actual, eager, exact, strict=True):
        assert_within_budget(t, e, ex, f"gradient to {name}")
    assert torch.equal(
        actual[0][index[rows] == -1 if packed else index == -1], g[index[rows] == -1 if packed else index == -1]
    )
    unused = [s for s in range(4) if s not in route]
    assert unused and not actual[1][unused].any()
    if ranks is not None:
        assert not actual[1][torch.arange(r, device=device).expand_as(bank) >= ranks[:, None, None]].any()


@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "packed"])
def test_gradients_keep_to_their_subspace(packed: bool, device: str) -> None:
    """NaN in one sequence, and past the ranks, reaches neither another subspace's gradient nor another row's."""
    x, bank = normal(3, 4, 12, seed=25, device=device), bank_of(3, 12, 4, seed=26, dtype=torch.float32, device=device)
    x[1], bank[:, :, 3] = torch.nan, torch.nan
    index, ranks = integers([0, 1, -1], device), integers([3, 3, 3], device)
    rows = None
    if packed:
        x, rows = pack(x)
    leaves = x.requires_grad_(), bank.requires_grad_()
    project_routed(*leaves, index, rows=rows, ranks=ranks, implementation="reference").nan_to_num(0.0).sum().backward()
    assert leaves[1].grad is not None
    assert leaves[1].grad[0].isfinite().all() and leaves[1].grad[2].eq(0).all() and leaves[1].grad[1].isnan().any()


@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "packed"])
def test_double_backward(packed: bool) -> None:
    x, bank = (normal(*s, seed=27, dtype=torch.float64) for s in ((3, 2, 5), (3, 5, 3)))
    index, ranks = integers([2, -1, 0], "cpu"), integers([3, 1, 2], "cpu")
    rows = None
    if packed:
        x, rows = pack(x)

    def operator(x: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        return project_routed(x, bank, index, a=0.5, b=2.0, rows=rows, ranks=ranks)

    leaves = x.clone().requires_grad_(), bank.clone().requires_grad_()
    assert torch.autograd.gradcheck(operator, leaves)
    assert torch.autograd.gradgradcheck(operator, leaves)


def test_a_fixed_bank_keeps_no_activation_alive(device: str) -> None:
    x = normal(2, 4, 8, seed=28, device=device).requires_grad_()
    bank, index = bank_of(2, 8, 2, seed=29, dtype=torch.float32, device=device), integers([0, 1], device)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        project_routed(x, bank, index, implementation="triton")
    assert [t.shape for t in saved] == [bank.shape, index.shape]


def test_not_a_number_stays_in_its_row(device: str) -> None:
    x, bank = normal(3, 7, 20, seed=30, device=device), bank_of(2, 20, 3, seed=31, dtype=torch.float32, device=device)
    x[1, 4, 2] = torch.nan
    bad = project_routed(x, bank, integers([0, 1, -1], device), implementation="triton").isnan()
    assert bad[1, 4].all() and bad.sum() == 20


@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "packed"])
def test_one_launch(packed: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixed decode step: one launch, and packed one program a row at least."""
    from spd_kernels.routed import kernel

    launches: list[tuple[int, ...]] = []
    name = "routed_rows_kernel" if packed else "routed_kernel"
    original = getattr(kernel, name)

    class Counting:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            launches.append(grid)
            return original[grid]

    monkeypatch.setattr(kernel, name, Counting())
    monkeypatch.setattr(kernel.launch, "processors", lambda device: 132)
    x, bank = normal(5, 16, seed=32, device=device), bank_of(3, 16, 4, seed=33, dtype=torch.float32, device=device)
    rows = torch.arange(5, device=device) if packed else None
    project_routed(x, bank, integers([0, 1, -1, 2, 0], device), rows=rows, implementation="triton")
    assert launches == [(5, 1)]


class TestLayouts:
    """Any strides of any argument."""

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(data=st.data(), dtype=dtypes, shape=st.tuples(st.integers(0, 4), st.integers(0, 18), sizes(40), sizes(40)))
    def test_sequences(self, data: st.DataObject, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
        sequences, length, d, r = shape
        x = data.draw(strided((sequences, length, d), dtype, device))
        self._check(data, x, sequences, min(d, r), None, device)

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(data=st.data(), dtype=dtypes, shape=st.tuples(st.integers(1, 4), st.integers(0, 40), sizes(40), sizes(40)))
    def test_packed(self, data: st.DataObject, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
        sequences, n, d, r = shape
        x = data.draw(strided((n, d), dtype, device))
        rows = torch.tensor(data.draw(st.lists(st.integers(0, sequences - 1), min_size=n, max_size=n)))
        self._check(data, x, sequences, min(d, r), rows.long().to(device), device)

    def _check(
        self, data: st.DataObject, x: torch.Tensor, sequences: int, r: int, rows: torch.Tensor | None, device: str
    ) -> None:
        subspaces = data.draw(st.integers(1, 4))
        bank = data.draw(strided((subspaces, x.shape[-1], r), x.dtype, device)) / x.shape[-1] ** 0.5
        values = data.draw(st.lists(st.integers(-1, subspaces - 1), min_size=sequences, max_size=sequences))
        index = torch.tensor(values, dtype=torch.int64).repeat_interleave(2).to(device)[::2]
        ranks = None
        if data.draw(st.booleans()):
            each = data.draw(st.lists(st.integers(0, r), min_size=subspaces, max_size=subspaces))
            ranks = torch.tensor(each, dtype=torch.int32).flip(0).to(device)
        actual = project_routed(x, bank, index, a=0.5, b=1.5, rows=rows, ranks=ranks, implementation="triton")
        assert actual.is_contiguous()
        assert_matches(actual, x, bank, index, 0.5, 1.5, rows, ranks)


def inputs(device: str, grad: bool = False) -> Tensors:
    return {
        "x": normal(3, 4, 16, seed=34, device=device).requires_grad_(grad),
        "bank": bank_of(3, 16, 5, seed=35, dtype=torch.float32, device=device).requires_grad_(grad),
        "index": integers([2, -1, 0], device),
        "rows": integers([0, 1, 2, 2] * 3, device).view(3, 4),
        "ranks": integers([5, 0, 3], device, torch.int32),
    }


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_opcheck(implementation: str | None, grad: bool, device: str) -> None:
    x, bank, index, rows, ranks = inputs(device, grad).values()
    operator = torch.ops.spd_kernels.project_routed.default
    torch.library.opcheck(operator, (x, bank, index, None, None, 0.5, 2.0, implementation))
    torch.library.opcheck(operator, (x.transpose(0, 1), bank, index, rows.T, ranks, 0.0, 1.0, implementation))


@pytest.mark.parametrize("implementation", [None, "triton"])
@pytest.mark.parametrize(
    ("backend", "packed"),
    [
        ("aot_eager", False),
        ("aot_eager", True),
        pytest.param("inductor", False, marks=pytest.mark.slow),  # compiles C++
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_compile(backend: str, packed: bool, implementation: Implementation | None, device: str) -> None:
    def function(x: torch.Tensor, bank: torch.Tensor, index: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return project_routed(x, bank, index, a=1.0, b=-1.0, **more, implementation=implementation)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected, actual = inputs(device, grad=True), inputs(device, grad=True)
    for t in (expected, actual):
        if not packed:
            del t["rows"]
    results = function(**expected), compiled(**actual)
    torch.testing.assert_close(*results)
    for y in results:
        y.square().sum().backward()
    for name in ("x", "bank"):
        torch.testing.assert_close(actual[name].grad, expected[name].grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**actual), results[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a GPU")
@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "packed"])
def test_graph_capture(packed: bool) -> None:
    """Replayed after the routes changed, a graph follows the new ones."""
    t = inputs("cuda")
    if not packed:
        del t["rows"]
    project_routed(**t)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = project_routed(**t)
    t["index"].copy_(torch.tensor([1, 0, 2]))
    t["ranks"].copy_(torch.tensor([1, 4, 2]))
    graph.replay()
    torch.testing.assert_close(y, project_routed(**t))


def test_work() -> None:
    """Subspaces that occur are read once, those that do not are not; a sequence left alone is only moved."""
    work = routed_work(rows=[10, 20, 30], index=[1, 1, -1], ranks=[64, 8, 512], d=100, itemsize=2)
    assert work == Work(2 * 60 * 100 * 2 + 8 * 100 * 2, 4 * 30 * 100 * 8)
