"""GradientCovariance and its kernel against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from spd_kernels import GradientCovariance
from spd_kernels.covariance.reference import moments_reference, spectrum_reference
from spd_kernels.testing import normal, orthonormal


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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_rows_that_are_not_finite(bad: float, device: str) -> None:
    g = normal(5, 4, seed=15, device=device)
    g[2, 1] = bad
    accumulator = accumulated(g)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (70, 5), (130, 64), (129, 65), (300, 200)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_kernel(shape: tuple[int, int], masked: bool, dtype: torch.dtype, device: str) -> None:
    """The kernel's sums against float64, within the stated budget of fp32 accumulation."""
    from spd_kernels.covariance.kernel import launch_moments

    n, d = shape
    g = normal(n, d, seed=20, dtype=dtype, device=device) + 1
    mask = normal(n, seed=21, device=device) > 0 if masked else None
    rows = (g if mask is None else g[mask]).double()
    if mask is not None:
        g[~mask] = torch.nan
    splits = -(-n // 128)
    poisoned = (torch.full((splits, d), torch.nan, device=device), torch.full((splits, d, d), torch.nan, device=device))
    sums, gram = launch_moments(g, mask, out=poisoned)
    assert sums.dtype == gram.dtype == torch.float64
    upper = torch.ones(d, d, dtype=torch.bool, device=device).triu()
    error = (gram - rows.T @ rows).abs()[upper]
    budget = (1e-5 * (rows.abs().T @ rows.abs()))[upper]
    assert (error <= budget).all()
    assert ((sums - rows.sum(0)).abs() <= 1e-5 * rows.abs().sum(0)).all()


def test_kernel_in_several_launches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from spd_kernels.covariance import kernel

    monkeypatch.setattr(kernel, "PARTIAL_BYTES", 4 * 2 * 6 * 6)
    g = normal(500, 3, 6, seed=22, dtype=torch.bfloat16, device=device).transpose(0, 1)
    accumulator = accumulated(g, implementation="triton")
    count, mean, covariance = moments_reference(g)
    assert accumulator.count == count
    torch.testing.assert_close(accumulator.mean(), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(accumulator.covariance(), covariance, rtol=0, atol=1e-5 * float(covariance.max()))


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
