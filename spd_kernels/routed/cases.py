"""What the routed projection's launcher can launch, for ahead-of-time compilation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from spd_kernels.aot.case import SIXTEEN_BIT, Case
from spd_kernels.launch import Architecture
from spd_kernels.routed.config import shipped, shipped_packed

KERNELS = ("routed.kernel:routed_kernel", "routed.kernel:routed_rows_kernel")
_VARIANTS = {(True, True): "", (False, True): " no x term", (True, False): " no ranks", (False, False): " neither"}


def cases(architecture: Architecture, dtypes: Sequence[str], *, every: bool = False) -> Iterator[Case]:
    """Every shipped configuration with an x term (a != 0) and ranks; also without them for `every`."""
    for dtype, kernel in itertools.product(dtypes, KERNELS):
        itemsize = 2 if dtype in SIXTEEN_BIT else 4
        packed = kernel.endswith("rows_kernel")
        configs = shipped_packed(itemsize, architecture) if packed else shipped(itemsize, architecture)
        types = {"a": "fp32", "b": "fp32", "index_ptr": "*i64", "ranks_ptr": "*i32"}
        if packed:
            types["rows_ptr"] = "*i64"
        for config, (blend, ranked) in itertools.product(configs, _VARIANTS):
            if not (every or (blend and ranked)):
                continue
            blocks = f"{config.block_n} x {config.block_w} x {config.block_k}"
            yield Case(
                kernel,
                dtype,
                blocks + " streamed" * config.streamed + _VARIANTS[blend, ranked],
                {
                    "HAS_RANKS": ranked,
                    "HAS_A": blend,
                    "WIDEN": False,
                    "PRECISION": "tf32" if dtype == "tf32" else "ieee",
                    "WIDE": False,
                    "STREAMED": config.streamed,
                    "GROUP": 16 // itemsize,
                    "BLOCK_N": config.block_n,
                    "BLOCK_W": config.block_w,
                    "BLOCK_K": config.block_k,
                },
                config.num_warps,
                config.num_stages,
                tall=config.block_n >= 64,
                types=types,
                ones=frozenset(("stride_xd", "stride_yd", "stride_ur")),
            )
