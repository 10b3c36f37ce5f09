"""What the covariance's launcher can launch, for ahead-of-time compilation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from spd_kernels.aot.case import SIXTEEN_BIT, Case
from spd_kernels.covariance.config import (
    CHUNK_ROWS,
    COUNT_COLUMNS,
    FEW_SPLITS,
    MANY_SPLITS,
    MEAN_COLUMNS,
    MEAN_SPLITS,
    MERGE_ELEMENTS,
    MERGE_WARPS,
    MomentsConfig,
    candidates,
    choose,
    shipped,
)
from spd_kernels.launch import Architecture

# One width of each kind: one narrow tile, one wide tile, many tiles.
_WIDTHS = (64, 128, 1024)


def cases(architecture: Architecture, dtypes: Sequence[str], *, every: bool = False) -> Iterator[Case]:
    """Every shipped configuration with and without a mask; for `every` also rows on two axes and the tuner's
    candidates. 32-bit rows have no kernel. The small kernels' operands are fp32 and fp64 whatever the rows' type."""
    chosen = [dtype for dtype in dtypes if dtype in SIXTEEN_BIT]
    for dtype, d, masked in itertools.product(chosen, _WIDTHS, (False, True)):
        config = choose(d, architecture)
        yield _moments(dtype, config, d, masked=masked, flat=True)
        if every:
            yield _moments(dtype, config, d, masked=masked, flat=False)
    if every and "bf16" in chosen:
        for d in _WIDTHS:
            for config in candidates(d, architecture):
                if config not in shipped(architecture):
                    yield _moments("bf16", config, d, masked=False, flat=True)
    if chosen:
        yield _mean()
        for block_s, block_d in itertools.product((FEW_SPLITS, MANY_SPLITS), (64, 128)):
            yield _merge(block_s, block_d)


def _moments(dtype: str, config: MomentsConfig, d: int, *, masked: bool, flat: bool) -> Case:
    single = d <= config.block_d
    blocks = f"{config.block_n} x {config.block_d}, {config.num_stages} stages"
    return Case(
        "covariance.kernel:moments_kernel",
        dtype,
        blocks + " one tile" * single + " masked" * masked + " two axes" * (not flat),
        {
            "HAS_MASK": masked,
            "FLAT": flat,
            "SINGLE": single,
            "ONCE": config.once,
            "WIDEN": False,
            "PRECISION": "ieee",
            "WIDE": False,
            "CHUNK_N": CHUNK_ROWS,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "COUNT": COUNT_COLUMNS,
        },
        config.num_warps,
        config.num_stages,
        tall=True,
        types={f"mask_{site}_ptr": "*u8" for site in range(4)} | {"sum_ptr": "*fp32", "gram_ptr": "*fp32"},
        ones=frozenset({"stride_gd"}),
    )


def _mean() -> Case:
    doubles = [f"{name}_{site}_ptr" for name in ("count", "mean") for site in range(4)]
    return Case(
        "covariance.kernel:mean_kernel",
        "fp32",
        f"{MEAN_SPLITS} x {MEAN_COLUMNS}",
        {"BLOCK_S": MEAN_SPLITS, "BLOCK_D": MEAN_COLUMNS, "COUNT": COUNT_COLUMNS},
        4,
        3,
        matrix=False,
        types=dict.fromkeys(["stage_ptr", *doubles], "*fp64"),
        unaligned=frozenset({"splits"}),
    )


def _merge(block_s: int, block_d: int) -> Case:
    doubles = [f"{name}_{site}_ptr" for name in ("count", "scatter") for site in range(4)]
    return Case(
        "covariance.kernel:merge_kernel",
        "fp32",
        f"{block_s} x {MERGE_ELEMENTS} of {block_d} x {block_d}",
        {"BLOCK_S": block_s, "BLOCK_E": MERGE_ELEMENTS, "BLOCK_D": block_d},
        MERGE_WARPS,
        3,
        matrix=False,
        types=dict.fromkeys(["stage_ptr", *doubles], "*fp64"),
        unaligned=frozenset({"splits", "tiles_of"}),
    )
