"""What the projection's launcher can launch, for ahead-of-time compilation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from spd_kernels.aot.case import SIXTEEN_BIT, Case
from spd_kernels.launch import Architecture
from spd_kernels.project.config import shipped

KERNELS = ("project.kernel:project_kernel", "project.kernel:project_kv_kernel")
_ONES = frozenset(f"stride_{axis}" for axis in ("xd", "yd", "kd", "vd", "y_kd", "y_vd", "ur", "u_kr", "u_vr"))


def cases(architecture: Architecture, dtypes: Sequence[str], *, every: bool = False) -> Iterator[Case]:
    """Every shipped configuration with an x term (a != 0), and without one too for `every`."""
    for dtype, kernel in itertools.product(dtypes, KERNELS):
        for config, blend in itertools.product(shipped(2 if dtype in SIXTEEN_BIT else 4, architecture), (True, False)):
            if not (blend or every):
                continue
            blocks = f"{config.block_n} x {config.block_w} x {config.block_k}"
            yield Case(
                kernel,
                dtype,
                blocks + " streamed" * config.streamed + " no x term" * (not blend),
                {
                    "HAS_A": blend,
                    "WIDEN": False,
                    "PRECISION": "tf32" if dtype == "tf32" else "ieee",
                    "WIDE": False,
                    "STREAMED": config.streamed,
                    "BLOCK_N": config.block_n,
                    "BLOCK_W": config.block_w,
                    "BLOCK_K": config.block_k,
                },
                config.num_warps,
                config.num_stages,
                tall=config.block_n >= 64,
                types={"a": "fp32", "b": "fp32"},
                ones=_ONES,
            )
