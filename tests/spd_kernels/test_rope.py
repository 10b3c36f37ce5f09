"""Projected, normed and rotated keys against the float64 reference, against transformers, and the theorems."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from layouts import DTYPES, EXAMPLES, dtypes, strided

from spd_kernels import project, project_rope
from spd_kernels.rope import config
from spd_kernels.rope.reference import project_rope_reference, pull_back, rotate, store
from spd_kernels.rope.work import rope_work
from spd_kernels.testing import assert_within_budget, normal, orthonormal


class Shape(NamedTuple):
    batch: int
    steps: int
    heads: int
    head_dim: int
    rank: int
    norm: bool = False
    full: bool = True
    interleaved: bool = False


SHAPES = {
    "one row, one pair": Shape(1, 1, 1, 2, 1, norm=True),
    "decode": Shape(3, 1, 2, 64, 16),
    "interleaved, one angle a pair": Shape(2, 5, 2, 16, 20, norm=True, full=False, interleaved=True),
    "heads of 80": Shape(1, 17, 2, 80, 33, norm=True, interleaved=True),
    "odd half, one angle a pair": Shape(2, 9, 3, 6, 13, full=False),
    "r = d, streamed": Shape(2, 8, 3, 48, 144, norm=True),
    "wide heads": Shape(1, 3, 1, 132, 20, norm=True),
    "widest heads": Shape(1, 2, 1, 260, 5, interleaved=True),
}


class Inputs(NamedTuple):
    k: torch.Tensor
    u: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    norm_weight: torch.Tensor | None
    head_dim: int
    interleaved: bool

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(t.to(dtype) if isinstance(t, torch.Tensor) else t for t in self))

    def reference(self) -> torch.Tensor:
        k, u, cos, sin, weight, head_dim, interleaved = self
        return project_rope_reference(k, u, cos, sin, head_dim, weight, 1e-6, interleaved)

    def run(self, implementation: Any = "triton", **others: Any) -> torch.Tensor:
        k, u, cos, sin, *_ = self
        named = {"head_dim": self.head_dim, "norm_weight": self.norm_weight, "interleaved": self.interleaved}
        return project_rope(k, u, cos, sin, implementation=implementation, **(named | others))


def make(shape: Shape, dtype: torch.dtype, device: str, seed: int = 1) -> Inputs:
    """The tables are any numbers, not angles of a rotation: every element is taken as it is."""
    d = shape.heads * shape.head_dim
    width = shape.head_dim if shape.full else shape.head_dim // 2
    cos, sin = (normal(1, shape.steps, width, seed=seed + s, dtype=dtype, device=device) for s in (1, 2))
    return Inputs(
        normal(shape.batch, shape.steps, d, seed=seed, dtype=dtype, device=device),
        orthonormal(d, shape.rank, seed=seed, dtype=dtype, device=device),
        cos,
        sin,
        normal(shape.head_dim, seed=seed + 3, dtype=dtype, device=device) if shape.norm else None,
        shape.head_dim,
        shape.interleaved,
    )


def check(inputs: Inputs, actual: torch.Tensor, what: str = "result") -> None:
    assert_within_budget(actual, inputs.reference(), inputs.to(torch.float64).reference(), what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values(shape: Shape, dtype: torch.dtype, device: str) -> None:
    inputs = make(shape, dtype, device)
    actual = inputs.run()
    check(inputs, actual)
    assert actual.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [90, 132, 260])
def test_every_configuration_writes_every_output(head_dim: int, dtype: torch.dtype, device: str) -> None:
    from spd_kernels.rope.kernel import launch_rope

    itemsize = torch.finfo(dtype).bits // 8
    every = {c for name in config.SIXTEEN_BIT for c in config.shipped(head_dim, itemsize, name)}
    for c in sorted(every, key=dataclasses.astuple):
        heads = 3 if head_dim == 90 else 1
        rank = min(heads * head_dim, c.block_w + 1 if c.streamed else c.block_w)
        inputs = make(Shape(1, c.block_n + 1, heads, head_dim, rank, norm=True), dtype, device)
        k, u, cos, sin, weight, *_ = inputs
        out = torch.full_like(k, torch.nan)
        assert launch_rope(k, u, cos, sin, head_dim, weight, 1e-6, False, out=out, config=c) is out
        check(inputs, out, str(c))


def test_configurations_follow_rows_rank_and_head() -> None:
    for architecture in config.SIXTEEN_BIT:
        for head_dim in (2, 64, 128, 130, 256, 258, 512):
            for itemsize in (2, 4):
                for n in (1, config.FEW_ROWS, config.FEW_ROWS + 1):
                    chosen = [config.choose(n, rank, head_dim, itemsize, architecture) for rank in range(1, 600)]
                    assert all(c.streamed or c.block_w >= rank for rank, c in enumerate(chosen, start=1))
                    assert chosen[-1].streamed
                    assert set(chosen) <= set(config.shipped(head_dim, itemsize, architecture))
                    if head_dim <= 256:
                        assert all((c.block_n > 16) == (n > config.FEW_ROWS) for c in chosen)
                    for rank, c in ((1, chosen[0]), (64, chosen[63]), (599, chosen[598])):
                        assert c in config.candidates(n, rank, head_dim, itemsize, architecture)


@pytest.mark.parametrize("tiles", [1, 20, 66, 200])
def test_heads_are_shared_out_where_tiles_are_few(tiles: int) -> None:
    each = config.heads_per_program(tiles, 8, 132)
    assert {1: 1, 20: 2, 66: 4, 200: 8}[tiles] == each


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda t: t.transpose(0, 1),
    "columns first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "every other column": lambda t: torch.stack((t, t), dim=-1).flatten(-2)[..., ::2],
    "sliced rows": lambda t: t[:, ::2],
    "expanded rows": lambda t: t[:1, :1].expand(3, 4, -1),
    "expanded columns": lambda t: t[..., :1].expand(-1, -1, 12),
    "no rows": lambda t: t[:, :0],
    "a vector": lambda t: t[0, 0],
    "two leading axes more": lambda t: t[:, None, None].expand(-1, 2, 1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(layout: Callable[[torch.Tensor], torch.Tensor], device: str) -> None:
    """Of k, and of tables that have its leading shape."""
    k = layout(normal(3, 4, 12, seed=1, device=device))
    u = orthonormal(12, 5, seed=2, device=device)
    cos, sin = (layout(normal(3, 4, 12, seed=s, device=device))[..., :6] for s in (3, 4))
    check(inputs := Inputs(k, u, cos, sin, None, 6, False), inputs.run())


@pytest.mark.parametrize("lead", [(), (1,), (4,), (1, 4), (3, 1), (3, 4)], ids=str)
def test_tables_broadcast(lead: tuple[int, ...], device: str) -> None:
    k, u = normal(3, 4, 12, seed=1, device=device), orthonormal(12, 5, seed=2, device=device)
    cos, sin = (normal(*lead, 6, seed=s, device=device) for s in (3, 4))
    check(inputs := Inputs(k, u, cos, sin, None, 6, False), inputs.run())
    apart = torch.stack((sin, sin), dim=-1)[..., 0]  # laid out unlike cos
    check(inputs := Inputs(k, u, cos, apart, None, 6, False), inputs.run())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tables_and_weight_in_float32(dtype: torch.dtype, device: str) -> None:
    inputs = make(Shape(2, 3, 2, 8, 7, norm=True), dtype, device)
    wide = make(Shape(2, 3, 2, 8, 7, norm=True), torch.float32, device)
    mixed = inputs._replace(cos=wide.cos, sin=wide.sin, norm_weight=wide.norm_weight)
    actual = mixed.run()
    assert actual.dtype is dtype
    check(mixed, actual)


@pytest.mark.parametrize("rank", [6, 140], ids=["in registers", "streamed"])
def test_layouts_of_u(rank: int, device: str) -> None:
    d = 144
    inputs, wide = make(Shape(1, 3, 3, 48, 1), torch.float32, device), orthonormal(d, d, seed=10, device=device)
    for u in (wide[:, :rank], wide.T[:, :rank], wide[:, :1].expand(d, rank) / rank):
        check(other := inputs._replace(u=u), other.run())


def test_offsets_past_32_bits(device: str) -> None:
    """Rows, and columns, whose offsets in elements exceed 2^31: the memory between them is reserved, never touched."""
    gap = 2**30 + 8
    storage = torch.empty(3 * gap + 16, dtype=torch.float16, device=device)
    inputs = make(Shape(1, 3, 2, 2, 3), torch.float16, device)
    for strides in ((0, gap, 1), (0, 1, gap)):
        k = storage.as_strided((1, 3, 4), strides)
        k.copy_(inputs.k)
        check(inputs._replace(k=k.clone()), inputs._replace(k=k).run())
    positions = torch.tensor([2, 0, 1], device=device)
    for strides in ((0, 2, gap, 1), (0, gap, 2, 1), (0, 2, 4, gap)):
        cache = storage.as_strided((1, 2, 3, 2), strides)
        inputs.run(cache=cache, positions=positions)
        check(inputs, cache[:, :, positions].transpose(1, 2).flatten(-2))


GRADIENTS = {
    "plain": Shape(2, 9, 3, 6, 11),
    "norm": Shape(2, 9, 3, 6, 11, norm=True, full=False),
    "interleaved norm": Shape(1, 5, 2, 32, 40, norm=True, interleaved=True),
    "no rows": Shape(2, 0, 2, 4, 3, norm=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_gradient(shape: Shape, dtype: torch.dtype, device: str) -> None:
    inputs = make(shape, dtype, device)
    g = normal(*inputs.k.shape, seed=9, dtype=dtype, device=device)

    def gradient(dtype: torch.dtype, implementation: str, g: torch.Tensor = g) -> torch.Tensor:
        at = inputs.to(dtype)
        k = at.k.clone().requires_grad_()
        return torch.autograd.grad(at._replace(k=k).run(implementation), k, g.to(dtype))[0]

    exact, eager = gradient(torch.float64, "reference"), gradient(dtype, "reference")
    assert_within_budget(gradient(dtype, "triton"), eager, exact)
    apart = torch.stack((g, g), dim=-1)[..., 0]
    assert_within_budget(gradient(dtype, "triton", apart), eager, exact)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_gradients_to_everything(implementation: str, device: str) -> None:
    inputs = make(Shape(2, 3, 2, 4, 5, norm=True), torch.float32, device)
    g = normal(2, 3, 8, seed=9, device=device)

    def gradients(dtype: torch.dtype, implementation: str) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs[:5]]  # type: ignore[union-attr]
        y = Inputs(*leaves, 4, False).run(implementation)
        return torch.autograd.grad(y, leaves, g.to(dtype))

    exact, eager = gradients(torch.float64, "reference"), gradients(torch.float32, "reference")
    for name, actual, e, ex in zip(
        Inputs._fields, gradients(torch.float32, implementation), eager, exact, strict=False
    ):
        assert_within_budget(actual, e, ex, f"gradient to {name}")


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_the_gradient_is_the_reference_s(norm: bool, interleaved: bool) -> None:
    """`pull_back` against autograd through `rotate`, and the operator's derivatives against finite differences."""
    inputs = make(Shape(1, 2, 2, 4, 3, norm=norm, interleaved=interleaved), torch.float64, "cpu")
    _, u, cos, sin, weight, head_dim, _ = inputs
    p, g = normal(1, 2, 8, seed=5, dtype=torch.float64).requires_grad_(), normal(1, 2, 8, seed=6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(rotate(p, cos, sin, head_dim, weight, 1e-6, interleaved), p, g)
    torch.testing.assert_close(pull_back(g, p, cos, sin, head_dim, weight, 1e-6, interleaved), expected)

    def operator(k: torch.Tensor) -> torch.Tensor:
        return torch.ops.spd_kernels.project_rope(k, u, cos, sin, weight, head_dim, 1e-6, interleaved, "reference")

    k = inputs.k.clone().requires_grad_()
    assert torch.autograd.gradcheck(operator, (k,))
    assert torch.autograd.gradgradcheck(operator, (k,))


def test_the_operator_withholds_no_gradient_in_silence(device: str) -> None:
    k, u, cos, sin, *_ = make(Shape(1, 2, 1, 4, 3), torch.float32, device)
    with pytest.raises(RuntimeError, match=r"gives a gradient to k alone"):
        torch.ops.spd_kernels.project_rope(k, u.requires_grad_(), cos, sin, None, 4, 1e-6, False, None)


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_only_a_norm_keeps_k_alive(norm: bool, device: str) -> None:
    inputs = make(Shape(1, 3, 2, 4, 5, norm=norm), torch.float32, device)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        inputs._replace(k=inputs.k.requires_grad_()).run()
    assert (inputs.k.numel() in saved) == norm


def positions_of(shape: tuple[int, ...], capacity: int, device: str, seed: int = 1) -> torch.Tensor:
    """Different ones in every sequence."""
    draws = torch.rand((*shape[:-1], capacity), generator=torch.Generator().manual_seed(seed))
    return draws.argsort(-1)[..., : shape[-1]].to(device)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("shared", [False, True], ids=["(B, T)", "(T,)"])
def test_a_cache_is_written_only_where_told(shared: bool, interleaved: bool, index: torch.dtype, device: str) -> None:
    inputs = make(Shape(2, 5, 3, 6, 9, norm=True, interleaved=interleaved), torch.float16, device)
    positions = positions_of((5,) if shared else (2, 5), 8, device).to(index)
    positions[..., 1] = -1
    positions[..., 3] = -7
    memory = torch.full((3, 2, 6, 9), torch.nan, dtype=torch.float16, device=device)
    cache = memory.permute(1, 0, 3, 2)[:, :, 1:]  # (2, 3, 8, 6)
    assert inputs.run(cache=cache, positions=positions) is cache
    expected = torch.full((2, 3, 8, 6), torch.nan, dtype=torch.float64, device=device)
    eager = torch.full_like(expected, torch.nan, dtype=torch.float16)
    store(inputs.to(torch.float64).reference(), expected, positions)
    store(inputs.reference(), eager, positions)
    assert torch.equal(cache.isnan(), expected.isnan()) and expected.isnan().sum() == 2 * 3 * 5 * 6
    assert memory[..., 0].isnan().all()
    assert_within_budget(cache.nan_to_num(), eager.nan_to_num(), expected.nan_to_num())


def test_a_position_past_the_cache(device: str) -> None:
    inputs = make(Shape(1, 3, 2, 4, 5), torch.float32, device)
    memory = torch.full((1, 2, 6, 4), torch.nan, device=device)
    positions = torch.tensor([1, 4, 2**30], device=device)
    inputs.run(cache=memory[:, :, :4], positions=positions)  # the kernel stores row 0 alone
    assert memory.isnan().logical_not().sum() == 8 and memory[:, :, 1].isfinite().all()
    cpu = Inputs(*(t.cpu() if isinstance(t, torch.Tensor) else t for t in inputs))
    with pytest.raises(ValueError, match=r"positions: expected at most 3, since cache has 4; got 1073741824"):
        cpu.run("reference", cache=torch.zeros(1, 2, 4, 4), positions=positions.cpu())


def test_no_rows_leave_the_cache_alone(device: str) -> None:
    inputs = make(Shape(2, 0, 2, 4, 3), torch.float32, device)
    cache = torch.full((2, 2, 3, 4), torch.nan, device=device)
    inputs.run(cache=cache, positions=torch.zeros(0, dtype=torch.int64, device=device))
    assert cache.isnan().all()


def test_a_cache_takes_no_gradients(device: str) -> None:
    inputs = make(Shape(1, 3, 2, 4, 5), torch.float32, device)
    cache, positions = torch.zeros(1, 2, 4, 4, device=device), torch.arange(3, device=device)
    for name in ("k", "u", "cos"):
        needy = inputs._replace(**{name: getattr(inputs, name).clone().requires_grad_()})
        with pytest.raises(ValueError, match=r"cache: expected tensors that need no gradient"):
            needy.run(cache=cache, positions=positions)
        with torch.no_grad():
            needy.run(cache=cache, positions=positions)
    with pytest.raises(ValueError, match=r"cache: expected elements that do not share memory"):
        inputs.run(cache=cache[:, :1].expand(1, 2, 4, 4), positions=positions)


class TestTheorems:
    """What norm and rotation do to a head, each with a control."""

    heads, head_dim, rank, steps = 3, 16, 29, 7

    def _inputs(self, device: str, start: int = 0, interleaved: bool = False, norm: bool = True) -> Inputs:
        d = self.heads * self.head_dim
        frequencies = 10.0 ** -torch.arange(0, 4, 4 / (self.head_dim // 2), dtype=torch.float64)
        angles = torch.arange(start, start + self.steps, dtype=torch.float64)[:, None] * frequencies
        return Inputs(
            normal(1, self.steps, d, seed=1, device=device),
            orthonormal(d, self.rank, seed=2, device=device),
            angles.cos().float().to(device),
            angles.sin().float().to(device),
            normal(self.head_dim, seed=3, device=device) if norm else None,
            self.head_dim,
            interleaved,
        )

    def test_every_head_has_the_weight_s_size(self, device: str) -> None:
        """Without rotation and with equal weights; unequal ones are the control."""
        inputs = self._inputs(device)
        still = inputs._replace(cos=torch.ones_like(inputs.cos), sin=torch.zeros_like(inputs.sin))
        equal = still._replace(norm_weight=torch.full((self.head_dim,), -2.5, device=device))
        sizes = equal.run().unflatten(-1, (-1, self.head_dim)).square().mean(-1).sqrt()
        torch.testing.assert_close(sizes, torch.full_like(sizes, 2.5), rtol=1e-5, atol=0)
        sizes = still.run().unflatten(-1, (-1, self.head_dim)).square().mean(-1).sqrt()
        assert (sizes / sizes.mean() - 1).abs().max() > 1e-2

    @pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
    def test_rotation_keeps_norms(self, interleaved: bool, device: str) -> None:
        inputs = self._inputs(device, start=3, interleaved=interleaved, norm=False)
        p = project(inputs.k, inputs.u, implementation="triton").unflatten(-1, (-1, self.head_dim))
        y = inputs.run().unflatten(-1, (-1, self.head_dim))
        torch.testing.assert_close(y.norm(dim=-1), p.norm(dim=-1), rtol=1e-5, atol=0)
        assert (y - p).abs().max() > 0.1
        control = inputs._replace(sin=2 * inputs.sin).run().unflatten(-1, (-1, self.head_dim))
        assert (control.norm(dim=-1) / p.norm(dim=-1) - 1).abs().max() > 0.1

    def test_position_0_only_projects(self, device: str) -> None:
        inputs = self._inputs(device, norm=False)
        assert (inputs.sin[0] == 0).all()
        projected = project(inputs.k, inputs.u, implementation="triton")
        torch.testing.assert_close(inputs.run()[:, 0], projected[:, 0], rtol=0, atol=1e-5)
        assert (inputs.run()[:, 1] - projected[:, 1]).abs().max() > 0.1

    @pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
    def test_scores_depend_on_the_difference_of_positions(self, interleaved: bool, device: str) -> None:
        def scores(start_q: int, start_k: int) -> torch.Tensor:
            q, k = (self._inputs(device, s, interleaved).run() for s in (start_q, start_k))
            return torch.einsum("bqhd,bkhd->bhqk", *(t.unflatten(-1, (-1, self.head_dim)) for t in (q, k)))

        near, far = scores(5, 2), scores(105, 102)
        torch.testing.assert_close(near, far, rtol=0, atol=1e-3 * near.abs().max().item())
        assert (near - scores(5, 3)).abs().max() > 0.05 * near.abs().max()

    def test_not_a_number_stays_in_its_row(self, device: str) -> None:
        inputs = self._inputs(device)
        inputs.k[0, 4, 7] = torch.nan
        bad = inputs.run().isnan()
        assert bad[0, 4].all() and bad.sum() == self.heads * self.head_dim

    def test_a_bad_angle_stays_in_its_pair(self, device: str) -> None:
        inputs = self._inputs(device)
        inputs.cos[2, 3] = torch.inf
        y = inputs.run()
        assert torch.equal(y.isfinite(), inputs.reference().isfinite()) and not y.isfinite().all()


class TestTransformers:
    """The reference is what the models do; only these tests need transformers."""

    batch, steps, heads, head_dim, rank = 2, 6, 2, 16, 11

    def _compare(
        self, name: str, *, interleaved: bool = False, half: bool = False, norm: bool = False, **options: Any
    ) -> None:
        pytest.importorskip("transformers")
        from importlib import import_module

        from transformers import AutoConfig

        module = import_module(f"transformers.models.{name}.modeling_{name}")
        made = AutoConfig.for_model(name, head_dim=self.head_dim, hidden_size=64, num_attention_heads=4, **options)
        (rotary,) = (v for k, v in vars(module).items() if k.endswith("RotaryEmbedding"))
        d = self.heads * self.head_dim
        for dtype in (torch.float32, torch.bfloat16):
            k, u = (
                normal(self.batch, self.steps, d, seed=1, dtype=dtype),
                orthonormal(d, self.rank, seed=2, dtype=dtype),
            )
            positions = torch.arange(3, 3 + self.steps)[None].expand(self.batch, -1)
            cos, sin = rotary(made)(k, positions)
            assert cos.shape == (self.batch, self.steps, self.head_dim) and cos.dtype is dtype
            heads = ((k @ u) @ u.mT).unflatten(-1, (self.heads, self.head_dim))
            weight = None
            if norm:
                (norm_type,) = (v for k, v in vars(module).items() if k.endswith("RMSNorm"))
                k_norm = norm_type(self.head_dim, eps=1e-5).to(dtype)
                weight = k_norm.weight.data.copy_(normal(self.head_dim, seed=3))
                heads = k_norm(heads)
            theirs = heads.transpose(1, 2)
            _, theirs = module.apply_rotary_pos_emb(theirs, theirs, cos, sin)
            if half:
                cos, sin = cos[..., : self.head_dim // 2], sin[..., : self.head_dim // 2]
            ours = project_rope_reference(k, u, cos, sin, self.head_dim, weight, 1e-5, interleaved)
            expected = theirs.transpose(1, 2).flatten(-2)
            # One rounding apart where a model rotates in fp32 what this reference rotates in its own type.
            step = torch.finfo(dtype).eps * expected.abs().max().item()
            torch.testing.assert_close(ours, expected, rtol=0, atol=2 * step)

    def test_llama(self) -> None:
        self._compare("llama")
        self._compare("llama", half=True)

    def test_qwen3(self) -> None:
        self._compare("qwen3", norm=True)

    def test_cohere(self) -> None:
        self._compare("cohere", interleaved=True)

    def test_glm(self) -> None:
        parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
        self._compare("glm", interleaved=True, half=True, partial_rotary_factor=1.0, rope_parameters=parameters)


def rounded(t: torch.Tensor) -> torch.Tensor:
    """t itself, all of its memory rounded."""
    t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0).round_()
    return t


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_any_layout(data: st.DataObject) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = data.draw(dtypes)
    batch, steps, heads = (data.draw(st.integers(0 if i == 1 else 1, 3)) for i in range(3))
    head_dim = 2 * data.draw(st.integers(1, 5))
    d = heads * head_dim
    width = data.draw(st.sampled_from([head_dim, head_dim // 2]))
    lead = data.draw(st.sampled_from([(), (steps,), (1, steps), (batch, steps), (batch, 1)]))
    # Whole numbers, whose sums are exact: no luck with cancellation decides the budget.
    k = rounded(data.draw(strided((batch, steps, d), dtype, device)))
    u = rounded(data.draw(strided((d, data.draw(st.integers(1, d))), dtype, device)))
    cos, sin = (data.draw(strided((*lead, width), dtype, device)) for _ in range(2))
    weight = data.draw(st.one_of(st.none(), strided((head_dim,), dtype, device)))
    inputs = Inputs(k, u, cos, sin, weight, head_dim, data.draw(st.booleans()))
    check(inputs, inputs.run())


def operator_arguments(norm: bool, device: str, grad: bool = False) -> tuple[Any, ...]:
    k, u, cos, sin, weight, head_dim, _ = make(Shape(2, 3, 2, 4, 5, norm=norm), torch.float32, device)
    return k.requires_grad_(grad), u, cos, sin, weight, head_dim, 1e-6, False


@pytest.mark.parametrize("implementation", ["reference", "triton", None])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_opcheck(norm: bool, implementation: str | None, device: str) -> None:
    operators = torch.ops.spd_kernels
    for grad in (False, True):
        arguments = operator_arguments(norm, device, grad)
        torch.library.opcheck(operators.project_rope.default, (*arguments, implementation))
    k, *rest = operator_arguments(norm, device)
    g = normal(2, 3, 8, seed=8, device=device)
    torch.library.opcheck(operators.project_rope_gradient.default, (g, k if norm else None, *rest, implementation))
    cache, positions = torch.zeros(2, 2, 4, 4, device=device), torch.tensor([1, -1, 3], device=device)
    arguments = (k, *rest[:4], cache, positions, *rest[4:], implementation)
    torch.library.opcheck(operators.project_rope_store.default, arguments)


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_compile(implementation: Any, device: str) -> None:
    torch.compiler.reset()
    inputs = make(Shape(2, 3, 2, 4, 5, norm=True), torch.float32, device)

    def function(k: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return 2 * inputs._replace(k=0.5 * k, u=u).run(implementation)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for needed in ("k", "k u"):
        grads = []
        for f in (function, compiled):
            k, u = (t.clone().requires_grad_(n in needed) for n, t in (("k", inputs.k), ("u", inputs.u)))
            y = f(k, u)
            grads.append((y, *torch.autograd.grad(y.square().sum(), [t for t in (k, u) if t.requires_grad])))
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_compile_with_a_cache(implementation: Any, device: str) -> None:
    torch.compiler.reset()
    inputs = make(Shape(2, 3, 2, 4, 5), torch.float32, device)
    positions = torch.tensor([2, -1, 0], device=device)

    def function(cache: torch.Tensor) -> torch.Tensor:
        return inputs.run(implementation, cache=cache, positions=positions)[:, :, :3] + 1

    caches = [torch.zeros(2, 2, 4, 4, device=device) for _ in range(2)]
    expected = function(caches[0])
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(caches[1])
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(caches[1], caches[0])


def test_heads_beyond_the_kernel(device: str) -> None:
    inputs = make(Shape(1, 2, 1, 514, 3), torch.float32, device)
    check(inputs, inputs.run())
    cache, positions = torch.zeros(1, 1, 2, 514, device=device), torch.arange(2, device=device)
    with pytest.raises(ValueError, match=r"head_dim: expected at most 512 for the kernel with a cache; got 514"):
        inputs.run(cache=cache, positions=positions)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


POSITIONS = zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"head_dim": 3}, ValueError, r"head_dim: expected a positive even int; got 3"),
        ({"head_dim": 0}, ValueError, r"head_dim: expected a positive even int; got 0"),
        ({"head_dim": True}, ValueError, r"head_dim: expected a positive even int; got True"),
        ({"head_dim": 6}, ValueError, r"head_dim: expected a divisor of d = 8; got 6"),
        ({"u": zeros(6, 2)}, ValueError, r"u: expected shape \(8, r\), since k is \(2, 3, 8\); got \(6, 2\)"),
        (
            {"cos": zeros(3, 3)},
            ValueError,
            r"cos: expected shape \(\.\.\., 4\) or \(\.\.\., 2\) .*\(2, 3\).*got \(3, 3\)",
        ),
        ({"cos": zeros(2, 4)}, ValueError, r"cos: expected .*whose leading axes broadcast to \(2, 3\).*got \(2, 4\)"),
        ({"cos": zeros(1, 1, 3, 4)}, ValueError, r"cos: expected .*got \(1, 1, 3, 4\)"),
        ({"sin": zeros(3, 2)}, ValueError, r"sin: expected shape \(3, 4\) as cos has; got \(3, 2\)"),
        ({"cos": zeros(3, 4, dtype=torch.float64)}, TypeError, r"cos: expected dtype torch.float32.*got torch.float64"),
        ({"cos": zeros(3, 4).to("meta")}, ValueError, r"cos: expected device cpu as k has; got meta"),
        ({"norm_weight": zeros(8)}, ValueError, r"norm_weight: expected shape \(4,\); got \(8,\)"),
        ({"norm_weight": zeros(4, dtype=torch.float16)}, TypeError, r"norm_weight: .*got torch.float16"),
        ({"cache": zeros(2, 2, 5, 4)}, ValueError, r"positions: expected a tensor, since cache is given; got None"),
        ({"positions": POSITIONS}, ValueError, r"cache: expected a tensor, since positions is given; got None"),
        (
            {"cache": zeros(2, 5, 2, 4), "positions": POSITIONS},
            ValueError,
            r"cache: expected shape \(2, 2, capacity, 4\); got \(2, 5, 2, 4\)",
        ),
        (
            {"cache": zeros(2, 2, 5, 4, dtype=torch.float16), "positions": POSITIONS},
            TypeError,
            r"cache: expected dtype torch.float32 as k has; got torch.float16",
        ),
        (
            {"cache": zeros(2, 2, 5, 4), "positions": zeros(2, dtype=torch.int64)},
            ValueError,
            r"positions: expected shape \(2, 3\) or \(3,\); got \(2,\)",
        ),
        (
            {"cache": zeros(2, 2, 5, 4), "positions": zeros(3)},
            TypeError,
            r"positions: expected int32 or int64; got torch.float32",
        ),
        (
            {"k": zeros(3, 8), "cache": zeros(1, 2, 5, 4), "positions": POSITIONS},
            ValueError,
            r"k: expected shape \(B, T, d\), since there is a cache; got \(3, 8\)",
        ),
    ],
)
def test_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"k": zeros(2, 3, 8), "u": zeros(8, 2), "cos": zeros(3, 4), "sin": zeros(3, 4)}
    with pytest.raises(error, match=message):
        project_rope(**(arguments | {"head_dim": 4} | change))


def test_work() -> None:
    """By hand: k and y of 10 x 8, U of 8 x 3, tables of 5 x 2, a weight of 4; 4 N d r operations."""
    work = rope_work(10, 8, 3, 4, 2, angle_rows=5, angles=2, angle_itemsize=4, norm=True)
    assert (work.bytes, work.flops) == (2 * (80 + 80 + 24 + 4) + 4 * 20, 4 * 10 * 8 * 3)
