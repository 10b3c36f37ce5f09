"""What the projection's launchers can launch, for ahead-of-time compilation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from spd_kernels.aot.case import SIXTEEN_BIT, Case
from spd_kernels.launch import Architecture
from spd_kernels.project.config import (
    BasisConfig,
    ProjectConfig,
    shipped,
    shipped_basis,
    shipped_coefficients,
)

# One tensor's kernel is that of the pair without the selection.
KERNELS = ("project.kernel:project_kv_kernel", "project.kernel:project_kernel")
_ONES = frozenset(
    f"stride_{axis}" for axis in ("xd", "yd", "kd", "vd", "y_kd", "y_vd", "g_kd", "g_vd", "ur", "u_kr", "u_vr")
)


def cases(architecture: Architecture, dtypes: Sequence[str], *, every: bool = False) -> Iterator[Case]:
    """Every shipped configuration, for a pair with an x term (a != 0); for `every`, also without one and for one
    tensor."""
    for dtype in dtypes:
        itemsize = 2 if dtype in SIXTEEN_BIT else 4
        blends = (True, False) if every else (True,)
        for kernel in KERNELS if every else KERNELS[:1]:
            for config, blend in itertools.product(shipped(itemsize, architecture), blends):
                yield _case(kernel, dtype, config, blend, {})
        for config, blend in itertools.product(shipped_coefficients(itemsize), blends):
            yield _case("project.gradient:coefficients_kernel", dtype, config, blend, {"HAS_Y": True})
        for basis in shipped_basis(itemsize, architecture):
            yield _basis_case(dtype, basis)


def _shared(dtype: str) -> dict[str, Any]:
    return {"WIDEN": False, "PRECISION": "tf32" if dtype == "tf32" else "ieee", "WIDE": False}


def _case(kernel: str, dtype: str, config: ProjectConfig, blend: bool, more: dict[str, Any]) -> Case:
    blocks = f"{config.block_n} x {config.block_w} x {config.block_k}"
    return Case(
        kernel,
        dtype,
        blocks + " streamed" * config.streamed + " no x term" * (not blend),
        _shared(dtype)
        | {
            "HAS_A": blend,
            "STREAMED": config.streamed,
            "BLOCK_N": config.block_n,
            "BLOCK_W": config.block_w,
            "BLOCK_K": config.block_k,
        }
        | more,
        config.num_warps,
        config.num_stages,
        tall=config.block_n >= 64,
        types={"a": "fp32", "b": "fp32"},
        ones=_ONES,
    )


def _basis_case(dtype: str, config: BasisConfig) -> Case:
    return Case(
        "project.gradient:basis_kernel",
        dtype,
        f"{config.block_n} x {config.block_d} x {config.block_r}",
        _shared(dtype) | {"BLOCK_N": config.block_n, "BLOCK_D": config.block_d, "BLOCK_R": config.block_r},
        config.num_warps,
        config.num_stages,
        tall=True,
        types={"b": "fp32", "partial_ptr": "*fp32"},
        ones=_ONES,
        unaligned=frozenset({"tiles_r"}),
    )
