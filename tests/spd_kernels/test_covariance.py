"""GradientCovariance and its kernel against the float64 reference."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import get_args

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from spd_kernels import GradientCovariance, update_many
from spd_kernels.covariance.config import (
    CHUNK_ROWS,
    COUNT_COLUMNS,
    MAX_ROWS_PER_SPLIT,
    MomentsConfig,
    candidates,
    choose,
    shipped,
    splits_of,
)
from spd_kernels.covariance.reference import moments_reference, spectrum_reference
from spd_kernels.covariance.work import covariance_work
from spd_kernels.launch import Architecture
from spd_kernels.testing import normal, orthonormal
from tests.spd_kernels.layouts import EXAMPLES, sizes, strided

SIXTEEN_BIT = [torch.float16, torch.bfloat16]
# Of sum_n |g_ni| |g_nj|: what the fp32 sums of 16-bit rows may err (csrc_notes/covariance.md).
BUDGET = 1e-5


def accumulated(g: torch.Tensor, mask: torch.Tensor | None = None, **options: str) -> GradientCovariance:
    accumulator = GradientCovariance(g.shape[-1], device=g.device, **options)
    accumulator.update(g, mask)
    return accumulator


def assert_same(actual: GradientCovariance, g: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Equal to the reference up to fp64 rounding."""
    count, mean, covariance = moments_reference(g, mask)
    assert actual.count == count
    scale = float(covariance.diagonal().max()) if count else 1.0
    torch.testing.assert_close(actual.mean(), mean, rtol=1e-12, atol=1e-12 * max(1.0, float(mean.abs().max())))
    torch.testing.assert_close(actual.covariance(), covariance, rtol=0, atol=1e-11 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 64), (2, 7, 65), (4, 3, 2, 300)], ids=str)
def test_moments(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    g = normal(*shape, seed=1, dtype=dtype, device=device)
    assert_same(accumulated(g), g)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_rows_on_the_reference_path(dtype: torch.dtype, device: str) -> None:
    g = normal(40, 33, seed=2, dtype=dtype, device=device)
    assert_same(accumulated(g, implementation="reference"), g)


@pytest.mark.parametrize("splits", [[100], [1] * 100, [0, 37, 0, 63], [99, 1]], ids=["one", "rows", "empty", "uneven"])
def test_batching_does_not_matter(splits: list[int], device: str) -> None:
    g = normal(100, 12, seed=3, device=device)
    accumulator = GradientCovariance(12, device=device)
    for part in g.split(splits):
        accumulator.update(part)
    assert_same(accumulator, g)


def test_chunks_inside_an_update(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spd_kernels.covariance.api.CHUNK_BYTES", 8 * 10 * 7)
    g, mask = normal(5, 10, 10, seed=4, device=device), normal(5, 10, seed=5, device=device) > 0
    mask[2] = False
    assert_same(accumulated(g), g)
    assert_same(accumulated(g, mask), g, mask)


def test_triangle_bands(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spd_kernels.covariance.api.TRIANGLE_BAND", 16)
    g = normal(50, 40, seed=6, device=device)
    assert_same(accumulated(g), g)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30], ids=str)
def test_masked_rows_do_not_exist(value: float, implementation: str, device: str) -> None:
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]], device=device)
    for dtype in (torch.float32, torch.bfloat16):
        g = normal(2, 4, 6, seed=7, dtype=dtype, device=device)
        clean = accumulated(g[mask], implementation=implementation)
        g[~mask] = value
        dirty = accumulated(g, mask, implementation=implementation)
        assert dirty.count == 4
        torch.testing.assert_close(dirty.mean(), clean.mean(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(dirty.covariance(), clean.covariance(), rtol=1e-6, atol=1e-6)


def test_no_row_kept(device: str) -> None:
    g = torch.full((3, 4), torch.nan, device=device)
    for implementation, dtype in (("reference", torch.float32), ("triton", torch.float16)):
        accumulator = accumulated(g.to(dtype), g.new_zeros(3, dtype=torch.bool), implementation=implementation)
        accumulator.update(g[:0].to(dtype))
        assert accumulator.count == 0
        assert not accumulator.mean().any() and not accumulator.covariance().any()


def test_layouts(device: str) -> None:
    g = normal(6, 5, 4, seed=8, device=device)
    for view in (g.transpose(0, 1), g[::2, :, 1:], g[:1].expand(6, 5, 4), g.permute(2, 1, 0), g[0, 0]):
        assert_same(accumulated(view), view)


def test_order_of_rows_does_not_matter(device: str) -> None:
    g = normal(200, 9, seed=9, device=device)
    assert_same(accumulated(g.flip(0)), g)


def test_a_mean_far_larger_than_the_spread(device: str) -> None:
    g = normal(300, 8, seed=10, dtype=torch.float64, device=device)
    shifted = (g + 1e5).float()
    accumulator = GradientCovariance(8, device=device)
    for part in shifted.split(17):
        accumulator.update(part)
    _, _, exact = moments_reference(shifted)
    torch.testing.assert_close(accumulator.covariance(), exact, rtol=1e-10, atol=1e-8)
    # The control that keeps raw sums in fp32, as a plain implementation would.
    plain = shifted.T @ shifted - shifted.sum(0).outer(shifted.sum(0)) / len(shifted)
    assert (plain.double() - exact).abs().max() > 1.0


def rows_of_falling_spectrum(n: int, d: int, device: str, smallest: float = 1e-6) -> torch.Tensor:
    """fp32 rows whose singular values fall geometrically to `smallest` times the first."""
    left = orthonormal(n, d, seed=11, dtype=torch.float64)
    left = torch.linalg.qr(left - left.mean(0))[0]
    values = torch.logspace(0, torch.log10(torch.tensor(smallest)).item(), d, dtype=torch.float64)
    return (left * values @ orthonormal(d, d, seed=12, dtype=torch.float64).T).float().to(device)


def test_captured_energy_is_the_best_at_every_rank(device: str) -> None:
    g = rows_of_falling_spectrum(400, 96, device)
    accumulator = GradientCovariance(96, device=device)
    for part in g.split(23):
        accumulator.update(part)
    _, vectors = accumulator.eigh()
    best_values, _ = spectrum_reference(g)
    centred = g.double() - g.double().mean(0)
    captured = (centred @ vectors).square().sum(0).cumsum(0)
    best = best_values.square().cumsum(0)
    assert ((best - captured) / best).max() < 1e-9


def test_small_directions_survive_where_fp32_sums_lose_them(device: str) -> None:
    """The energy beyond rank r is relative to itself here, which is what the squared condition number destroys."""
    g = rows_of_falling_spectrum(400, 64, device, smallest=1e-5)
    values, vectors = accumulated(g).eigh()
    exact, _ = spectrum_reference(g)
    centred = g.double() - g.double().mean(0)

    def residual(vectors: torch.Tensor) -> torch.Tensor:
        energy = (centred @ vectors).square().sum(0)
        return energy.flip(0).cumsum(0).flip(0)

    best = exact.square().flip(0).cumsum(0).flip(0)
    assert (residual(vectors) / best - 1).abs().max() < 1e-3
    torch.testing.assert_close(values, exact, rtol=1e-3, atol=0)
    control = torch.linalg.eigh(centred.float().T @ centred.float())[1].flip(1).double()
    assert (residual(control) / best - 1).abs().max() > 1.0


def test_singular_values_and_vectors(device: str) -> None:
    g = normal(50, 7, seed=13, device=device)
    values, vectors = accumulated(g).eigh()
    exact_values, exact_vectors = spectrum_reference(g)
    assert values.shape == (7,) and vectors.shape == (7, 7)
    torch.testing.assert_close(values, exact_values, rtol=1e-12, atol=0)
    torch.testing.assert_close((vectors * exact_vectors).sum(0).abs(), torch.ones_like(values), rtol=1e-10, atol=0)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(7, dtype=torch.float64, device=device))
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    flipped = accumulated(-g).eigh()[1]
    torch.testing.assert_close(flipped, vectors, rtol=0, atol=1e-10)


def test_fewer_rows_than_columns(device: str) -> None:
    values, vectors = accumulated(normal(3, 10, seed=14, device=device)).eigh()
    assert values.shape == (10,) and (values[2:] < 1e-6 * values[0]).all()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(10, dtype=torch.float64, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_rows_that_are_not_finite(bad: float, dtype: torch.dtype, device: str) -> None:
    g = normal(5, 4, seed=15, dtype=dtype, device=device)
    g[2, 1] = bad
    accumulator = accumulated(g, implementation="triton")
    with pytest.raises(ValueError, match="finite"):
        accumulator.eigh()


def test_no_rows_have_no_spectrum(device: str) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        GradientCovariance(4, device=device).eigh()


def test_merge_is_associative_and_equals_one_pass(device: str) -> None:
    g = normal(90, 11, seed=16, device=device) + 3.0
    left, right = accumulated(g[:10]), accumulated(g[40:])
    middle = accumulated(g[10:40])
    left.merge(middle)
    left.merge(right)
    assert_same(left, g)
    middle.merge(right)
    first = accumulated(g[:10])
    first.merge(middle)
    assert_same(first, g)
    first.merge(GradientCovariance(11, device=device))
    assert_same(first, g)
    empty = GradientCovariance(11, device=device)
    empty.merge(first)
    assert_same(empty, g)
    empty.merge(empty)
    assert_same(empty, torch.cat((g, g)))


def test_state_round_trip(device: str) -> None:
    g = normal(30, 6, seed=17, device=device)
    source = accumulated(g[:20])
    state = {name: tensor.cpu() for name, tensor in source.state_dict().items()}
    target = accumulated(normal(3, 6, seed=18, device=device))
    target.load_state_dict(state)
    for accumulator in (source, target):
        accumulator.update(g[20:])
        assert_same(accumulator, g)
    assert state["count"].item() == 20  # a copy: later rows did not reach it


def test_sums_are_copies(device: str) -> None:
    g = normal(30, 6, seed=19, device=device)
    accumulator = accumulated(g)
    accumulator.mean().zero_()
    accumulator.covariance().zero_()
    assert_same(accumulator, g)


def assert_close(
    actual: GradientCovariance | tuple[torch.Tensor, ...], g: torch.Tensor, mask: torch.Tensor | None = None
) -> None:
    """Equal to the reference up to the fp32 sums: of the products, and twice of the columns, which give the mean."""
    if isinstance(actual, GradientCovariance):
        actual = (torch.tensor(actual.count), actual.mean(), actual.covariance())
    count, mean, covariance = moments_reference(g, mask)
    rows = g.reshape(-1, g.shape[-1])
    magnitude = (rows if mask is None else rows[mask.reshape(-1)]).double().abs()
    sums = magnitude.sum(0)
    assert actual[0].item() == count
    assert ((actual[1] - mean).abs() <= BUDGET * sums / max(count, 1)).all()
    budget = BUDGET * (magnitude.T @ magnitude + 2 * sums.outer(sums) / max(count, 1))
    assert ((actual[2] - covariance).abs() <= budget)[torch.ones_like(budget, dtype=torch.bool).triu()].all()


def poisoned_partials(splits: int, d: int, block_d: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    from spd_kernels.covariance.kernel import partial_shapes

    sums, grams = partial_shapes(1, splits, d, block_d)
    return torch.full(sums, torch.nan, device=device), torch.full(grams, torch.nan, device=device)


def whole_gram(tiles: torch.Tensor, d: int) -> torch.Tensor:
    """The upper triangle of the Gram matrix, from its tiles (tiles, block_d, block_d)."""
    block = tiles.shape[-1]
    side = -(-d // block)
    gram = tiles.new_zeros(side * block, side * block)
    order = [(i, j) for j in range(side) for i in range(j + 1)]
    for (i, j), tile in zip(order, tiles, strict=True):
        gram[i * block : (i + 1) * block, j * block : (j + 1) * block] = tile
    return gram[:d, :d].triu()


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (70, 5), (130, 64), (129, 65), (300, 200)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_kernel(shape: tuple[int, int], masked: bool, dtype: torch.dtype, device: str) -> None:
    """The splits' sums against float64, within the stated budget of fp32 accumulation; then what becomes of them."""
    from spd_kernels.covariance.kernel import launch_moments

    n, d = shape
    g = normal(n, d, seed=20, dtype=dtype, device=device) + 1
    mask = normal(n, seed=21, device=device) > 0 if masked else None
    rows = (g if mask is None else g[mask]).double()
    if mask is not None:
        g[~mask] = torch.nan
    config = MomentsConfig(64, 64, 4, 2) if d == 200 else None  # ten tiles
    block_d = 64 if d == 200 else choose(d, "sm_90").block_d
    partials = poisoned_partials(n, d, block_d, device)
    count, mean, covariance = launch_moments(g, mask, config=config, partials=partials)
    written = partials[0][0, :, : -COUNT_COLUMNS + 1]  # the column sums and the count
    used = int((~written.isnan()).all(1).sum())
    assert used >= 1 and not partials[1][0, :used].isnan().any()
    sums = partials[0][0, :used].double().sum(0)
    gram = whole_gram(partials[1][0, :used].double().sum(0), d)
    exact = (rows.T @ rows).triu()
    assert ((gram - exact).abs() <= BUDGET * (rows.abs().T @ rows.abs())).all()
    assert ((sums[:d] - rows.sum(0)).abs() <= BUDGET * rows.abs().sum(0)).all()
    assert count.item() == len(rows)
    torch.testing.assert_close(mean, sums[:d] / max(len(rows), 1), rtol=1e-14, atol=0)
    outer = sums[:d].outer(sums[:d]) / max(len(rows), 1)
    torch.testing.assert_close(covariance, gram - outer.triu(), rtol=0, atol=1e-14 * float(gram.max()) + 1e-30)


ARCHITECTURES = get_args(Architecture)
CONFIGS = sorted(
    {config for name, d in itertools.product(ARCHITECTURES, (1, 70, 200)) for config in candidates(d, name)},
    key=str,
)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.resident != 3 or c.num_stages == 4], ids=str)
def test_configurations(config: MomentsConfig, device: str) -> None:
    """One that differs in the number of stages alone is the same program in the interpreter."""
    if device == "cuda" and config not in (*candidates(1, "sm_90"), *candidates(70, "sm_90")):
        pytest.skip("of another architecture")
    from spd_kernels.covariance.kernel import launch_moments

    g = normal(2, 70, 70, seed=23, dtype=torch.bfloat16, device=device).transpose(0, 1)
    mask = normal(70, 2, seed=24, device=device) > -1
    assert_close(launch_moments(g, mask, config=config), g, mask)


def test_tables() -> None:
    for architecture in ARCHITECTURES:
        for d in (1, 64, 65, 128, 129, 5000):
            found = candidates(d, architecture)
            assert found[0] == choose(d, architecture) in shipped(architecture) and len(set(found)) == len(found)
        for config in shipped(architecture):
            assert CHUNK_ROWS % config.block_n == 0 == MAX_ROWS_PER_SPLIT % CHUNK_ROWS


def test_the_budget_of_a_split() -> None:
    """16 rows a rounding of the matrix unit, which may truncate, within a chunk; one rounding to nearest a chunk."""
    assert CHUNK_ROWS / 16 * 2**-23 + MAX_ROWS_PER_SPLIT / CHUNK_ROWS * 2**-24 <= BUDGET


@pytest.mark.parametrize("sites", [1, 4])
@pytest.mark.parametrize("n", [1, 1000, 65536, 10**6])
@pytest.mark.parametrize("d", [1, 128, 256, 512, 1024, 4096])
def test_splits_fill_the_device(d: int, n: int, sites: int) -> None:
    config = choose(d, "sm_90")
    side = -(-d // config.block_d)
    units = sites * side * (side + 1) // 2
    slots = 132 * config.resident
    splits = splits_of(n, units, config, 132)
    assert 1 <= splits <= -(-n // config.block_n)
    waves = splits * units / slots
    if n >= 65536:
        assert waves / -(-waves // 1) >= 0.9 or splits == 1


def test_one_rounding_a_chunk(device: str) -> None:
    """Positive products over several chunks of one split, which a sum of one level would round 16 rows at a time."""
    from spd_kernels.covariance.kernel import launch_moments

    g = normal(5 * CHUNK_ROWS + 3, 2, seed=25, dtype=torch.float16, device=device).abs() + 1
    partials = poisoned_partials(8, 2, 64, device)
    result = launch_moments(g, None, config=MomentsConfig(128, 64, 4, 2), partials=partials)
    assert_close(result, g)
    exact = g.double().T @ g.double()
    gram = whole_gram(partials[1][0, : splits_of(len(g), 1, MomentsConfig(128, 64, 4, 2), 2)].double().sum(0), 2)
    if device == "cpu":  # the split of a device depends on its size
        assert ((gram - exact.triu()).abs() <= BUDGET * exact).all()


def test_kernel_in_several_launches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from spd_kernels.covariance import kernel

    monkeypatch.setattr(kernel, "MAX_ROWS_PER_SPLIT", 128)
    monkeypatch.setattr(kernel, "PARTIAL_BYTES", 0)
    g = normal(500, 3, 6, seed=22, dtype=torch.bfloat16, device=device).transpose(0, 1)
    assert_close(accumulated(g, implementation="triton"), g)


def test_masked_chunks_are_passed_over(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from spd_kernels.covariance import kernel

    monkeypatch.setattr(kernel, "CHUNK_ROWS", 128)
    g = normal(700, 7, seed=26, dtype=torch.bfloat16, device=device)
    mask = torch.ones(700, dtype=torch.bool, device=device)
    mask[100:520] = False
    g[100:520] = torch.nan
    assert_close(accumulated(g, mask, implementation="triton"), g, mask)


def test_the_kernel_repeats_itself_to_the_bit(device: str) -> None:
    g = normal(400, 70, seed=27, dtype=torch.bfloat16, device=device)
    first, second = (accumulated(g, implementation="triton") for _ in range(2))
    assert torch.equal(first.covariance(), second.covariance()) and torch.equal(first.mean(), second.mean())


def test_offsets_past_32_bits(device: str) -> None:
    """Rows, and columns, whose offsets in elements exceed 2^31: the memory between them is reserved, never touched."""
    n, d, gap = 3, 3, 2**30 + 8
    storage = torch.empty(2 * gap + 16, dtype=torch.float16, device=device)
    for strides in ((gap, 1), (1, gap)):
        g = storage.as_strided((n, d), strides)
        g.copy_(normal(n, d, seed=28, dtype=torch.float16))
        assert_close(accumulated(g, implementation="triton"), g)


class TestSeveralSites:
    @pytest.fixture()
    def launches(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many sites each launch served."""
        from spd_kernels.covariance import kernel

        seen: list[int] = []
        launch_group = kernel._launch_group

        def counted(group, *rest):  # type: ignore[no-untyped-def]
            seen.append(len(group[1]))
            launch_group(group, *rest)

        monkeypatch.setattr(kernel, "_launch_group", counted)
        return seen

    def test_alike(self, launches: list[int], device: str) -> None:
        """Five alike take two launches; each gets its own rows."""
        gradients = [normal(2, 30, 6, seed=30 + i, dtype=torch.float16, device=device) * 2**i for i in range(5)]
        masks = [normal(2, 30, seed=40 + i, device=device) > 0 for i in range(5)]
        accumulators = [GradientCovariance(6, device, implementation="triton") for _ in range(5)]
        for _ in range(2):
            update_many(accumulators, gradients, masks)
        assert launches == [4, 1, 4, 1]
        for accumulator, g, mask in zip(accumulators, gradients, masks, strict=True):
            assert_close(accumulator, torch.cat((g, g)), torch.cat((mask, mask)))

    def test_unlike(self, launches: list[int], device: str) -> None:
        """What differs in width, type, layout or mask goes apart; so does an accumulator that comes twice."""
        base = normal(8, 5, 6, seed=50, dtype=torch.bfloat16, device=device)
        mask = normal(8, 5, seed=51, device=device) > 0
        gradients = [base, base, base.half(), base[..., :4], base.transpose(0, 1), base, base.float(), base[:0]]
        masks = [None, mask, None, None, None, None, None, None]
        accumulators = [GradientCovariance(g.shape[-1], device, implementation="triton") for g in gradients]
        accumulators[5] = accumulators[0]
        update_many(accumulators, gradients, masks)
        assert launches == [1] * 6
        assert_close(accumulators[0], torch.cat((base, base)))
        for index in (1, 2, 3, 4, 6, 7):
            assert_close(accumulators[index], gradients[index], masks[index])

    def test_no_kernel(self, launches: list[int], device: str) -> None:
        gradients = [normal(9, 4, seed=52 + i, device=device) for i in range(2)]
        accumulators = [GradientCovariance(4, device) for _ in range(2)]
        update_many(accumulators, gradients)
        update_many([], [])
        assert launches == []
        for accumulator, g in zip(accumulators, gradients, strict=True):
            assert_same(accumulator, g)

    @pytest.mark.parametrize(
        ("gradients", "masks", "error", "message"),
        [
            ([torch.zeros(2, 4)], None, ValueError, r"gradients: expected 2, one for each accumulator; got 1"),
            ([torch.zeros(2, 4)] * 2, [None], ValueError, r"masks: expected 2, one for each accumulator; got 1"),
            ([torch.zeros(2, 4), torch.zeros(2, 3)], None, ValueError, r"gradients\[1\]: expected shape \(..., 4\)"),
            ([torch.zeros(2, 4)] * 2, [None, torch.zeros(2)], TypeError, r"masks\[1\]: expected dtype torch.bool"),
        ],
    )
    def test_arguments(self, gradients, masks, error, message) -> None:  # type: ignore[no-untyped-def]
        """Nothing is changed where anything is wrong."""
        accumulators = [GradientCovariance(4), GradientCovariance(4)]
        with pytest.raises(error, match=message):
            update_many(accumulators, gradients, masks)
        assert [a.count for a in accumulators] == [0, 0]

    def test_not_an_accumulator(self) -> None:
        with pytest.raises(TypeError, match=r"accumulators\[0\]: expected a GradientCovariance; got int"):
            update_many([3], [torch.zeros(2, 4)])  # type: ignore[list-item]


class TestProperties:
    """Random rows, layouts, masks and orders."""

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(data=st.data())
    def test_layouts_and_masks(self, data: st.DataObject, device: str) -> None:
        d, dtype = data.draw(sizes(66)), data.draw(st.sampled_from(SIXTEEN_BIT))
        lead = (data.draw(st.integers(0, 4)), data.draw(sizes(33)))
        g = data.draw(strided((*lead, d), dtype, device))
        mask = data.draw(st.none() | st.integers(0, 2**16).map(lambda seed: normal(*lead, seed=seed) > 0))
        mask = None if mask is None else mask.to(device)
        assert_close(accumulated(g, mask, implementation="triton"), g, mask)

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(
        parts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
        seed=st.integers(0, 2**16),
        shuffle=st.randoms(use_true_random=False),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
    )
    def test_chunks_and_merges_in_any_order(self, parts, seed, shuffle, dtype, device: str) -> None:  # type: ignore[no-untyped-def]
        g = normal(sum(parts), 5, seed=seed, dtype=dtype, device=device) + 2
        pieces = [accumulated(piece) for piece in g.split(parts)]
        while len(pieces) > 1:
            shuffle.shuffle(pieces)
            pieces[0].merge(pieces.pop())
        (assert_close if dtype is torch.float16 else assert_same)(pieces[0], g)

    @settings(max_examples=EXAMPLES // 2, deadline=None)
    @given(seed=st.integers(0, 2**16), n=st.integers(1, 150), d=st.integers(1, 9))
    def test_order_of_rows(self, seed: int, n: int, d: int, device: str) -> None:
        g = normal(n, d, seed=seed, dtype=torch.bfloat16, device=device)
        order = normal(n, seed=seed + 1).argsort().to(device)
        assert_close(accumulated(g[order], implementation="triton"), g)

    @settings(max_examples=EXAMPLES // 2, deadline=None)
    @given(
        seed=st.integers(0, 2**16), power=st.integers(-8, 8), implementation=st.sampled_from(["triton", "reference"])
    )
    def test_powers_of_two_come_through_exactly(self, seed: int, power: int, implementation: str, device: str) -> None:
        g = normal(37, 5, seed=seed, dtype=torch.bfloat16, device=device)
        plain, scaled = (accumulated(rows, implementation=implementation) for rows in (g, g * 2.0**power))
        assert torch.equal(scaled.mean(), plain.mean() * 2.0**power)
        torch.testing.assert_close(scaled.covariance(), plain.covariance() * 4.0**power, rtol=1e-13, atol=0)

    @settings(max_examples=EXAMPLES // 2, deadline=None)
    @given(seed=st.integers(0, 2**16), bad=st.sampled_from([torch.nan, torch.inf]), kept=st.booleans())
    def test_a_bad_number_counts_where_its_row_does(self, seed: int, bad: float, kept: bool, device: str) -> None:
        g = normal(20, 3, seed=seed, dtype=torch.float16, device=device)
        mask = normal(20, seed=seed + 1, device=device) > 0
        mask[4] = kept
        mask[5] = True
        clean = accumulated(g, mask, implementation="triton")
        g[4, 1] = bad
        dirty = accumulated(g, mask, implementation="triton")
        if kept:
            with pytest.raises(ValueError, match="finite"):
                dirty.eigh()
        else:
            assert torch.equal(dirty.covariance(), clean.covariance())


# Three processes that meet in a file; forked, so that PyTorch is imported once. The middle one has no rows; then the
# outer two meet again, in a group.
PROCESSES = """
import multiprocessing
import sys
import torch
import torch.distributed as dist
from spd_kernels import GradientCovariance
from spd_kernels.covariance import api
from spd_kernels.covariance.api import all_reduce_many
from spd_kernels.testing import normal

api.REDUCE_BYTES = 8 * (7 * 7 + 3 * 3)  # two of the three below together


def accumulated(g):
    accumulator = GradientCovariance(7)
    accumulator.update(g)
    return accumulator


def narrow(g):
    accumulator = GradientCovariance(3)
    accumulator.update(g[:, :3])
    return accumulator


def check(accumulator, exact):
    assert accumulator.count == exact.count
    torch.testing.assert_close(accumulator.mean(), exact.mean(), rtol=1e-13, atol=0)
    torch.testing.assert_close(accumulator.covariance(), exact.covariance(), rtol=0, atol=1e-12 * 60)


def run(rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=3)
    rows = normal(60, 7, seed=60, dtype=torch.float64) + 5
    mine = [rows[:41], rows[:0], rows[41:]][rank]
    accumulator = accumulated(mine)
    accumulator.all_reduce()
    check(accumulator, accumulated(rows))
    accumulator.update(rows[:3])
    check(accumulator, accumulated(torch.cat((rows, rows[:3]))))
    nobody = GradientCovariance(7)
    nobody.all_reduce()
    check(nobody, GradientCovariance(7))

    outer = dist.new_group([0, 2])
    accumulator = accumulated(mine)
    try:
        accumulator.all_reduce(outer)
        check(accumulator, accumulated(rows))
    except ValueError as error:
        assert rank == 1 and "group" in str(error), error
        check(accumulator, accumulated(mine))
    else:
        assert rank != 1

    several = [accumulated(mine), GradientCovariance(3), accumulated(mine)]
    several[1].update(mine[:, :3])
    all_reduce_many(several)
    for each in several:
        check(each, accumulated(rows) if each.d == 7 else narrow(rows))

    accumulator = GradientCovariance(4 + rank)
    try:
        accumulator.all_reduce()
    except ValueError as error:
        assert "expected one width d; got 4 to 6" in str(error), error
    else:
        raise AssertionError("widths differ")
    dist.destroy_process_group()


fork = multiprocessing.get_context("fork")
processes = [fork.Process(target=run, args=(rank,), daemon=True) for rank in range(3)]
for process in processes:
    process.start()
for process in processes:
    process.join(60)
sys.exit(0 if [process.exitcode for process in processes] == [0, 0, 0] else 1)
"""


def test_all_reduce(tmp_path: Path) -> None:
    """Three processes, and two of them in a group, against one that sees all rows."""
    command = [sys.executable, "-c", PROCESSES, str(tmp_path / "meeting")]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


def test_all_reduce_without_processes() -> None:
    with pytest.raises(RuntimeError, match=r"expected torch\.distributed to be initialised"):
        GradientCovariance(3).all_reduce()


def test_work() -> None:
    """By hand: N rows of d numbers of 2 bytes, mean and triangle in fp64 both ways, N d (d + 1) FLOPs."""
    work = covariance_work(10, 3, 2, sites=2)
    assert work.bytes == 2 * (10 * 3 * 2 + 16 * (6 + 3)) and work.flops == 2 * (10 * 3 * 4)


def test_memory_is_bounded() -> None:
    """The largest tensor made along the way is one chunk or d x d, not the number of rows in fp64."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from spd_kernels.covariance.config import CHUNK_BYTES

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype is torch.float64:
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    g = torch.zeros(1, 64).expand(100_000, 64)
    accumulator = GradientCovariance(64)
    with Watch():
        accumulator.update(g)
    assert accumulator.count == 100_000
    assert largest <= CHUNK_BYTES < 8 * g.numel()
