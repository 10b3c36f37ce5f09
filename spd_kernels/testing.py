"""Seeded inputs and the error budget of the kernels' tests and benchmarks."""

from __future__ import annotations

import os

import torch

# How many times the eager error a kernel may err: it sums in another order, with other roundings on the way.
BUDGET_FACTOR = 3.0


def generator(*seed: int) -> torch.Generator:
    """A CPU generator of its own for every test case; the environment variable SPD_KERNELS_TEST_SEED gives others."""
    value = int(os.environ.get("SPD_KERNELS_TEST_SEED", "0"))
    for part in seed:
        value = (value * 1_000_003 + part) % 2**63
    return torch.Generator().manual_seed(value)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=generator(seed, *shape), dtype=torch.float64).to(dtype).to(device)


def orthonormal(d: int, r: int, *, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """A random (d, r) basis with orthonormal columns (to the precision of dtype)."""
    basis, _ = torch.linalg.qr(normal(d, r, seed=seed, dtype=torch.float64))
    return basis.to(dtype).to(device).contiguous()


def assert_within_budget(actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, what: str = "result") -> None:
    """The kernel's worst error against float64 is at most a small factor times (eager's in the same dtype + rounding).

    Args:
        actual: the kernel's result.
        eager: the plain formula's result in the same dtype.
        exact: the reference in float64, on the same inputs.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, expected {eager.dtype}"
    if exact.numel() == 0:
        return
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    budget = BUDGET_FACTOR * ((eager.double() - exact).abs().max().item() + rounding)
    error = (actual.double() - exact).abs().max().item()
    # Written so that NaN fails.
    assert error <= budget, f"{what}: error {error:.3e} over the budget {budget:.3e}"
