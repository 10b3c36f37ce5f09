"""Attention over latents against the float64 reference: values by regime, what is not there, and the theorems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from spd_kernels import latent_attention
from spd_kernels.latent_attention import config
from spd_kernels.latent_attention.grouped import latent_attention_grouped
from spd_kernels.latent_attention.reference import latent_attention_reference
from spd_kernels.latent_attention.work import latent_attention_work
from spd_kernels.testing import assert_within_budget, normal, orthonormal
from tests.spd_kernels.layouts import EXAMPLES, dtypes, sizes, strided

# Few tokens a tile, and steps over pairs, ranks and latents of V, so that small problems walk every loop.
SMALL = config.LatentAttentionConfig(16, 16, 16, 16, num_warps=4, num_stages=2)
SMALL_STREAMED = replace(SMALL, streamed=True)


@dataclass(frozen=True)
class Problem:
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    queries: int = 1
    head_dim: int = 32
    tokens: int = 40
    rank_k: int | None = 12
    rank_v: int = 20
    norm: bool = False
    interleaved: bool = False
    rotated: bool = True
    dtype: torch.dtype = torch.float32

    def tensors(self, device: str) -> dict[str, Any]:
        """Keyword arguments, positions and lengths aside."""
        d, dtype = self.kv_heads * self.head_dim, self.dtype
        cos, sin = table(self.tokens + 40, self.head_dim, device)
        latent = self.rank_k is not None
        lead = (self.batch, self.tokens) if latent else (self.batch, self.kv_heads, self.tokens)
        return {
            "q": normal(self.batch, self.heads, self.queries, self.head_dim, seed=1, dtype=dtype, device=device),
            "c_k": 3 * normal(*lead, self.rank_k or self.head_dim, seed=2, dtype=dtype, device=device),
            "c_v": normal(self.batch, self.tokens, self.rank_v, seed=3, dtype=dtype, device=device),
            "u_k": orthonormal(d, self.rank_k, seed=4, dtype=dtype, device=device) if self.rank_k else None,
            "u_v": orthonormal(d, self.rank_v, seed=5, dtype=dtype, device=device),
            "cos": cos.to(dtype) if latent and self.rotated else None,
            "sin": sin.to(dtype) if latent and self.rotated else None,
            "kv_heads": self.kv_heads,
            "norm_weight": 1 + normal(self.head_dim, seed=6, dtype=dtype, device=device) / 4 if self.norm else None,
            "interleaved": self.interleaved,
        }


def table(rows: int, head_dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines in float64."""
    frequencies = 10000.0 ** (-torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().to(device), angles.sin().to(device)


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for k, t in arguments.items()}


def check(arguments: dict[str, Any], actual: torch.Tensor | None = None) -> None:
    """The kernel, unless another result is given, and the few products that stand for it on the CPU."""
    exact = latent_attention_reference(**widened(arguments))
    eager = latent_attention_reference(**arguments)
    if actual is None:
        actual = latent_attention(**arguments, implementation="triton")
    assert_within_budget(actual, eager, exact, "kernel")
    assert actual.is_contiguous()
    assert_within_budget(latent_attention_grouped(**arguments), eager, exact, "grouped")


def launch(arguments: dict[str, Any], **options: Any) -> torch.Tensor:
    from spd_kernels.latent_attention.kernel import launch_latent_attention

    out = torch.full_like(arguments["q"], torch.nan, memory_format=torch.contiguous_format)
    return launch_latent_attention(**arguments, out=out, **options)


SHAPES = {
    "one of everything": Problem(batch=1, heads=1, kv_heads=1, head_dim=2, tokens=1, rank_k=1, rank_v=1),
    "one token": Problem(tokens=1),
    "one tile and a token": Problem(tokens=65, rank_k=16, rank_v=16),
    "odd": Problem(batch=3, tokens=37, head_dim=22, rank_k=13, rank_v=7),
    "every head its own keys": Problem(heads=5, kv_heads=5),
    "groups of eight": Problem(heads=16, kv_heads=2),
    "groups of seven": Problem(heads=14, kv_heads=2, queries=2),
    "more rows than a block": Problem(batch=1, heads=8, kv_heads=1, queries=5),
    "a head wider than a step": Problem(batch=1, heads=2, kv_heads=1, head_dim=144, rank_k=40, rank_v=70),
    "interleaved, normed": Problem(interleaved=True, norm=True, queries=3),
    "normed": Problem(norm=True),
    "not rotated": Problem(rotated=False),
    "dense keys": Problem(rank_k=None, queries=4),
    "dense keys, wide head": Problem(batch=1, heads=4, kv_heads=4, rank_k=None, head_dim=136, rank_v=130),
}


# fp16 differs from bf16 in the instructions' types alone: the property below takes it too.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", SHAPES.values(), ids=SHAPES.keys())
def test_values(problem: Problem, dtype: torch.dtype, device: str) -> None:
    check(replace(problem, dtype=dtype).tensors(device))


CONFIGURATIONS = {
    (itemsize, latent, chosen)
    for architecture in ("sm_80", "sm_90", "sm_100", "gfx942")
    for itemsize in (2, 4)
    for latent, chosen in config.shipped(itemsize, architecture)
}


@pytest.mark.parametrize(("itemsize", "latent", "chosen"), sorted(CONFIGURATIONS, key=str), ids=str)
def test_every_configuration_writes_every_output(
    itemsize: int, latent: bool, chosen: config.LatentAttentionConfig, device: str
) -> None:
    problem = Problem(
        batch=1, kv_heads=4, tokens=20, head_dim=32, dtype=torch.bfloat16 if itemsize == 2 else torch.float32
    )
    rank = (chosen.block_r + 5 if chosen.streamed else 9) if latent else None
    arguments = replace(problem, rank_k=rank).tensors(device)
    check(arguments, launch(arguments, config=chosen))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_choices(architecture: Any) -> None:
    for itemsize in (2, 4):
        shipped = list(config.shipped(itemsize, architecture))
        for rank_k in (None, 1, 64, 65, 512, 1024):
            latent = rank_k is not None
            for rank_v in (1, 64, 65, 512, 1024):
                chosen = config.choose(rank_k, rank_v, itemsize, architecture)
                assert (latent, chosen) in shipped
                assert chosen in config.candidates(rank_k, itemsize, architecture)
                assert rank_k is None or chosen.streamed or rank_k <= chosen.block_r


@pytest.mark.parametrize("splits", [1, 4, 9], ids=lambda n: f"{n} splits")
@pytest.mark.parametrize("rank_k", [None, 12, 40], ids=["dense", "one block", "streamed"])
def test_splits_and_slices(splits: int, rank_k: int | None, device: str) -> None:
    """As many as there are tiles, more, and latents of V in slices."""
    arguments = Problem(
        batch=1, head_dim=34, tokens=70, rank_k=rank_k, rank_v=36, queries=2, norm=rank_k == 40
    ).tensors(device)
    lengths = torch.tensor([17], device=device)
    chosen = SMALL_STREAMED if rank_k == 40 else SMALL
    for more in ({}, {"lengths": lengths}):
        check(arguments | more, launch(arguments | more, config=chosen, splits=splits))


def test_splits_do_not_depend_on_lengths() -> None:
    """So that one captured graph serves as the cache fills: they are counted from shapes and processors alone."""
    one = config.choose(64, 64, 2, "sm_90")
    assert config.splits_for(131072, 2, one, 132) == config.PROGRAMS_PER_PROCESSOR * 132 // 2
    assert config.splits_for(one.block_t, 1, one, 132) == 1
    assert config.splits_for(131072, 10**6, one, 132) == 1


def padded_positions(starts: list[int], tokens: int, device: str) -> torch.Tensor:
    """Left padding of so many tokens."""
    return (torch.arange(tokens) - torch.tensor(starts)[:, None]).clamp(min=-1).to(device)


WHICH = {
    "left padding": {"positions": [0, 23]},
    "a sequence of padding alone": {"positions": [40, 7]},
    "ragged": {"lengths": [40, 17]},
    "an empty sequence": {"lengths": [0, 1]},
    "longer than the cache": {"lengths": [99, 40]},
    "both, and nothing left": {"positions": [5, 30], "lengths": [40, 30]},
}


@pytest.mark.parametrize("rank_k", [12, None], ids=["latent", "dense"])
@pytest.mark.parametrize("which", WHICH.values(), ids=WHICH.keys())
def test_what_is_not_there_is_not_read(which: dict[str, list[int]], rank_k: int | None, device: str) -> None:
    """The cache holds NaN wherever no token is."""
    for dtype, queries in ((torch.float32, 3), (torch.bfloat16, 1)):
        arguments = Problem(rank_k=rank_k, queries=queries, dtype=dtype, rank_v=9).tensors(device)
        there = torch.ones(2, 40, dtype=torch.bool, device=device)
        if "positions" in which:
            arguments["positions"] = padded_positions(which["positions"], 40, device)
            there &= arguments["positions"] >= 0
        if "lengths" in which:
            arguments["lengths"] = torch.tensor(which["lengths"], dtype=torch.int32, device=device)
            there &= torch.arange(40, device=device) < arguments["lengths"][:, None]
        arguments["c_v"][~there] = torch.nan
        arguments["c_k"].movedim(-2, 1)[~there] = torch.nan
        check(arguments, launch(arguments, config=SMALL))
        empty = ~there.any(1)
        assert (latent_attention(**arguments)[empty] == 0).all()


def test_no_tokens_and_no_sequences(device: str) -> None:
    arguments = Problem().tensors(device)
    for implementation in ("triton", "reference", None):
        none = arguments | {"c_k": arguments["c_k"][:, :0], "c_v": arguments["c_v"][:, :0]}
        assert (latent_attention(**none, implementation=implementation) == 0).all()
        few = arguments | {name: arguments[name][:0] for name in ("q", "c_k", "c_v")}
        assert latent_attention(**few, implementation=implementation).shape == (0, 4, 1, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_of_any_kind(dtype: torch.dtype, device: str) -> None:
    """Following one another, beginning anywhere, with gaps, repeated, running backwards; of both integer types."""
    arguments = Problem(tokens=40, dtype=dtype).tensors(device)
    count = torch.arange(40, device=device)
    for first, second in ((count + 17, count), (count // 2, 39 - count), (count.flip(0), (count * 7) % 40)):
        positions = torch.stack((first, second))
        check(arguments | {"positions": positions}, launch(arguments | {"positions": positions}, config=SMALL))
        check(arguments | {"positions": positions.int()})


@pytest.mark.parametrize("first", [0, 3], ids=["zeroth angle 0", "some zeroth angle"])
def test_following_positions_need_few_rows_of_the_table(first: int, device: str) -> None:
    """16-bit: a tile's first row and those of the first tile; all others are NaN here. A table may carry a factor."""
    problem = Problem(tokens=64, dtype=torch.bfloat16)
    arguments = problem.tensors(device)
    cos, sin = (1.25 * t[first:].float() for t in table(110, problem.head_dim, device))
    positions = torch.arange(64, device=device) + torch.tensor([[0], [21]], device=device)
    arguments |= {"cos": cos, "sin": sin, "positions": positions}
    holes = torch.ones(cos.shape[0], dtype=torch.bool, device=device)
    holes[:16] = False
    holes[[16, 32, 48, 21, 37, 53, 69]] = False
    poisoned = arguments | {name: arguments[name].masked_fill(holes[:, None], torch.nan) for name in ("cos", "sin")}
    check(arguments, launch(poisoned, config=SMALL))
    turned = poisoned | {"positions": poisoned["positions"].flip(1)}
    assert launch(turned, config=SMALL).isnan().all(), "the control reads every row"


def test_positions_past_the_table(device: str) -> None:
    arguments = Problem(dtype=torch.bfloat16).tensors(device)
    positions = torch.arange(40, device=device).expand(2, -1) + torch.tensor([[0], [60]], device=device)
    out = launch(arguments | {"positions": positions})
    assert out[1].isnan().all() and not out[0].isnan().any()


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tokens outermost": lambda t: t.transpose(0, -2).contiguous().transpose(0, -2),
    "latents outermost": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every other of something wider": lambda t: torch.cat((t, t), dim=-1).repeat_interleave(2, dim=-1)[
        ..., : 2 * t.shape[-1] : 2
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("rank_k", [12, None], ids=["latent", "dense"])
def test_layouts(layout: Callable[[torch.Tensor], torch.Tensor], rank_k: int | None, device: str) -> None:
    arguments = Problem(rank_k=rank_k, queries=2, norm=rank_k is not None).tensors(device)
    arguments["positions"] = padded_positions([0, 11], 40, device)
    moved = {name: layout(t) if isinstance(t, torch.Tensor) and t.dim() > 1 else t for name, t in arguments.items()}
    check(moved, launch(moved, config=SMALL))


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_any_shape_and_layout(data: st.DataObject, device: str) -> None:
    group, kv_heads = data.draw(st.sampled_from([1, 3, 4])), data.draw(st.sampled_from([1, 2]))
    problem = Problem(
        batch=data.draw(st.sampled_from([1, 2])),
        heads=group * kv_heads,
        kv_heads=kv_heads,
        queries=data.draw(st.integers(1, 3)),
        head_dim=2 * data.draw(sizes(18)),
        tokens=data.draw(sizes(40)),
        norm=data.draw(st.booleans()),
        interleaved=data.draw(st.booleans()),
        rotated=data.draw(st.booleans()),
        dtype=data.draw(dtypes),
    )
    d = kv_heads * problem.head_dim
    latent = data.draw(st.booleans())
    rank_k, rank_v = (min(d, data.draw(sizes(40))) for _ in range(2))
    arguments = replace(problem, rank_k=rank_k if latent else None, rank_v=rank_v).tensors(device)
    for name in ("q", "c_k", "c_v"):
        arguments[name] = data.draw(strided(arguments[name].shape, problem.dtype, device))
    if data.draw(st.booleans()):
        starts = [data.draw(st.integers(0, problem.tokens)) for _ in range(problem.batch)]
        arguments["positions"] = padded_positions(starts, problem.tokens, device)
    if data.draw(st.booleans()):
        most = problem.tokens + 2
        arguments["lengths"] = torch.tensor([data.draw(st.integers(0, most)) for _ in range(problem.batch)]).to(device)
    chosen = SMALL_STREAMED if rank_k > 16 or data.draw(st.booleans()) else SMALL
    arguments["scale"] = data.draw(st.sampled_from([None, 0.3]))
    check(arguments, launch(arguments, config=chosen, splits=data.draw(st.integers(1, 2))))


def test_offsets_past_32_bits(device: str) -> None:
    """Tokens, and latents, whose offsets in elements exceed 2^31: the memory between is reserved, never touched."""
    gap = 2**30 + 8
    storage = torch.empty(2 * gap + 64, dtype=torch.float16, device=device)
    arguments = Problem(1, 2, 2, 1, 16, 3, 3, 3, dtype=torch.float16).tensors(device)
    for name in ("c_k", "c_v"):
        for strides in ((0, gap, 1), (0, 1, gap)):
            x = storage.as_strided((1, 3, 3), strides)
            x.copy_(arguments[name])
            moved = arguments | {name: x}
            exact = latent_attention_reference(**widened(arguments))
            assert_within_budget(launch(moved), latent_attention_reference(**arguments), exact, name)


class TestTheorems:
    """What the method rests on, each with a control in which it does not hold."""

    def test_it_is_dense_attention_with_projected_keys_and_values(self, device: str) -> None:
        """scaled_dot_product_attention over K U U^T, rotated, and V U U^T; unprojected keys and values differ."""
        problem = Problem(heads=8, kv_heads=2, head_dim=16, tokens=30, rank_k=10, rank_v=6)
        arguments = problem.tensors(device)
        k, v = (normal(2, 30, 32, seed=s, device=device) for s in (20, 21))
        u_k, u_v, cos, sin = (arguments[name] for name in ("u_k", "u_v", "cos", "sin"))

        def dense(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (k, v))
            first, second = k.chunk(2, dim=-1)
            c, s = cos[:30], sin[:30]
            k = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
            return torch.nn.functional.scaled_dot_product_attention(arguments["q"], k, v, enable_gqa=True)

        arguments |= {"c_k": k @ u_k, "c_v": v @ u_v}
        expected = dense(k @ u_k @ u_k.mT, v @ u_v @ u_v.mT)
        for implementation in ("triton", "reference", None):
            actual = latent_attention(**arguments, implementation=implementation)
            torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)
            assert (actual - dense(k, v)).abs().max() > 0.1

    def test_tokens_may_be_stored_in_any_order_with_their_positions(self, device: str) -> None:
        arguments = Problem().tensors(device)
        arguments["positions"] = padded_positions([0, 9], 40, device)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(7)).to(device)
        moved = arguments | {name: arguments[name][:, order] for name in ("c_k", "c_v", "positions")}
        for implementation in ("triton", None):
            expected, actual = (latent_attention(**a, implementation=implementation) for a in (arguments, moved))
            torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)
            control = latent_attention(**moved | {"positions": arguments["positions"]}, implementation=implementation)
            assert (control - expected).abs().max() > 1e-2

    def test_a_block_of_queries_is_as_many_steps(self, device: str) -> None:
        arguments = Problem(queries=4).tensors(device)
        block = latent_attention(**arguments, implementation="triton")
        for step in range(4):
            lengths = torch.full((2,), 40 - 3 + step, device=device)
            one = arguments | {"q": arguments["q"][:, :, step : step + 1], "lengths": lengths}
            torch.testing.assert_close(
                block[:, :, step : step + 1], latent_attention(**one, implementation="triton"), rtol=0, atol=2e-6
            )
        everything = latent_attention(**arguments | {"q": arguments["q"][:, :, :1]}, implementation="triton")
        assert (everything - block[:, :, :1]).abs().max() > 1e-3, "the control sees later tokens"

    def test_not_a_number_stays_in_its_sequence(self, device: str) -> None:
        arguments = Problem().tensors(device)
        for name in ("c_k", "c_v"):
            bad = arguments[name].clone()
            bad[1, 5, 3] = torch.nan
            for implementation in ("triton", "reference", None):
                found = latent_attention(**arguments | {name: bad}, implementation=implementation).isnan()
                assert found[1].any() and not found[0].any()


def test_operator(device: str) -> None:
    arguments = Problem(norm=True).tensors(device)
    arguments["positions"] = padded_positions([0, 9], 40, device)
    for implementation in ("reference", "triton", None):
        torch.library.opcheck(
            torch.ops.spd_kernels.latent_attention.default,
            (),
            arguments | {"scale": None, "lengths": None, "eps": 1e-6, "implementation": implementation},
        )


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_compile(implementation: Any, device: str) -> None:
    torch.compiler.reset()
    arguments = Problem().tensors(device)

    def function(q: torch.Tensor, **others: Any) -> torch.Tensor:
        return latent_attention(2 * q, **others, implementation=implementation) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments), function(**arguments))
    arguments |= {"lengths": torch.tensor([40, 3], device=device)}
    torch.testing.assert_close(compiled(**arguments), function(**arguments))


def change(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arguments: (
        arguments | {name: value(arguments[name]) if callable(value) else value for name, value in changes.items()}
    )


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (change(q=lambda q: q.long()), TypeError, r"q: expected float32.*got torch.int64"),
        (change(q=lambda q: q[0]), ValueError, r"q: expected shape \(B, H, Tq, D\); got \(4, 1, 32\)"),
        (change(kv_heads=3), ValueError, r"kv_heads: expected a divisor of the 4 heads of q; got 3"),
        (change(kv_heads=0), ValueError, r"kv_heads: .*got 0"),
        (change(c_v=lambda c: c[:1]), ValueError, r"c_v: expected shape \(2, T, r\).*got \(1, 40, 20\)"),
        (change(c_k=lambda c: c[:, 1:]), ValueError, r"c_k: expected shape \(2, 40, r\) beside u_k; got \(2, 39, 12\)"),
        (change(u_k=None), ValueError, r"c_k: expected shape \(2, 2, 40, 32\); got \(2, 40, 12\)"),
        (change(u_k=lambda u: u[:, 1:]), ValueError, r"u_k: expected shape \(64, 12\); got \(64, 11\)"),
        (change(u_v=lambda u: u[1:]), ValueError, r"u_v: expected shape \(64, 20\); got \(63, 20\)"),
        (change(u_v=lambda u: u.half()), TypeError, r"u_v: expected dtype torch.float32 as q has; got torch.float16"),
        (change(cos=None), ValueError, r"cos, sin: expected both or neither"),
        (change(cos=lambda t: t[:, 1:]), ValueError, r"cos: expected shape \(positions, 16\) or .* got \(80, 15\)"),
        (change(cos=lambda t: t[:9], sin=lambda t: t[:9]), ValueError, r"cos: expected at least 40 rows.*got 9"),
        (change(sin=lambda t: t[:50]), ValueError, r"sin: expected shape \(80, 16\) as cos has; got \(50, 16\)"),
        (change(cos=lambda t: t.half()), TypeError, r"cos: expected dtype torch.float32.*got torch.float16"),
        (change(positions=torch.zeros(2, 40)), TypeError, r"positions: expected int32 or int64; got torch.float32"),
        (change(positions=torch.zeros(2, 4).long()), ValueError, r"positions: expected shape \(2, 40\); got \(2, 4\)"),
        (change(lengths=torch.zeros(3).int()), ValueError, r"lengths: expected shape \(2,\); got \(3,\)"),
        (change(norm_weight=torch.ones(31)), ValueError, r"norm_weight: expected shape \(32,\); got \(31,\)"),
        (change(c_v=lambda c: c.to("meta")), ValueError, r"c_v: expected device .* as q has; got meta"),
        (change(q=lambda q: q.requires_grad_()), ValueError, r"q: expected no need for a gradient.*no_grad"),
    ],
)
def test_arguments(changed: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        latent_attention(**changed(Problem().tensors("cpu")))


def test_positions_past_the_table_are_refused_on_the_cpu() -> None:
    positions = torch.arange(60, 100).expand(2, -1)
    with pytest.raises(ValueError, match=r"positions: expected less than 80, the rows of cos; got 99"):
        latent_attention(**Problem().tensors("cpu"), positions=positions)


def test_tables_may_hold_every_angle_twice(device: str) -> None:
    for interleaved in (False, True):
        arguments = Problem(interleaved=interleaved).tensors(device)
        twice = {
            name: arguments[name].repeat_interleave(2, dim=1) if interleaved else arguments[name].repeat(1, 2)
            for name in ("cos", "sin")
        }
        assert torch.equal(latent_attention(**arguments | twice), latent_attention(**arguments))


def test_a_parameter_passes_where_gradients_are_off(device: str) -> None:
    arguments = Problem(norm=True).tensors(device)
    expected = latent_attention(**arguments)
    arguments["norm_weight"] = torch.nn.Parameter(arguments["norm_weight"])
    with torch.no_grad():
        assert torch.equal(latent_attention(**arguments), expected)


def test_work_is_what_the_design_counts() -> None:
    """32 query heads, 8 key heads of 128, 131072 tokens, bf16: 125, 24 and 66 microseconds on an H200."""
    from spd_kernels.roofline import H200

    def microseconds(rank_k: int | None, rank_v: int | None) -> float:
        work = latent_attention_work(1, 32, 8, 128, 131072, rank_k, rank_v, itemsize=2)
        return 1e6 * H200.seconds(work, torch.bfloat16)

    expected = {(None, None): 125, (64, 64): 24, (None, 64): 66, (512, 512): 181}
    assert {ranks: round(microseconds(*ranks)) for ranks in expected} == expected
