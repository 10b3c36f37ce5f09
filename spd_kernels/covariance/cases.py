"""What the covariance's launcher can launch, for ahead-of-time compilation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from spd_kernels.aot.case import SIXTEEN_BIT, Case
from spd_kernels.covariance.config import shipped
from spd_kernels.launch import Architecture


def cases(architecture: Architecture, dtypes: Sequence[str], *, every: bool = False) -> Iterator[Case]:
    """Every shipped configuration, with and without a mask; 32-bit rows have no kernel."""
    chosen = [dtype for dtype in dtypes if dtype in SIXTEEN_BIT]
    for dtype, config, masked in itertools.product(chosen, shipped(architecture), (False, True)):
        yield Case(
            "covariance.kernel:moments_kernel",
            dtype,
            f"{config.block_n} x {config.block_d}" + " masked" * masked,
            {
                "HAS_MASK": masked,
                "WIDEN": False,
                "PRECISION": "ieee",
                "WIDE": False,
                "BLOCK_N": config.block_n,
                "BLOCK_D": config.block_d,
            },
            config.num_warps,
            config.num_stages,
            tall=True,
            types={"mask_ptr": "*u8", "sum_ptr": "*fp32", "gram_ptr": "*fp32"},
            ones=frozenset({"stride_gd"}),
        )
