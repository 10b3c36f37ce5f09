"""What the launchers of the rope kernels can launch, for ahead-of-time compilation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from spd_kernels.aot.case import SIXTEEN_BIT, Case
from spd_kernels.launch import Architecture
from spd_kernels.rope.config import (
    PULL_BACK_WARPS,
    RopeConfig,
    holds_angles,
    padded_half,
    pull_back_rows,
    shipped,
)

_HEAD_DIM, _WIDE_HEAD_DIM = 128, 256
# (norm, full, interleaved, cache)
_TABLE_VARIANT = (True, True, False, False)
_CACHED = (True, True, False, True)
_VARIANTS = (
    (_HEAD_DIM, (False, False, False, False)),
    (_HEAD_DIM, (True, True, True, False)),
    (_HEAD_DIM, (False, False, True, True)),
    (_HEAD_DIM, _CACHED),
    (_WIDE_HEAD_DIM, _CACHED),
    (_WIDE_HEAD_DIM, (True, True, True, True)),
    (64, _CACHED),
    (80, _CACHED),  # five eighths of a tile
    (512, _CACHED),
)
_ONES = frozenset({"stride_kd", "stride_ur", "stride_ad", "stride_w", "stride_yd"})
_ONES_BACK = frozenset({"stride_gd", "stride_ad", "stride_w"})
_UNALIGNED = frozenset({"n_heads", "heads_each"})


def cases(architecture: Architecture, dtypes: Sequence[str], *, every: bool = False) -> Iterator[Case]:
    """Every shipped configuration for heads of 128 and 256, with norm and one angle an element; for `every` also other
    sizes, no norm, one angle a pair, interleaved pairs and the store to a cache (not in fp16, which is as bf16)."""
    for dtype in dtypes:
        wanted = [(_HEAD_DIM, _TABLE_VARIANT), (_WIDE_HEAD_DIM, _TABLE_VARIANT)]
        if every and dtype != "fp16":
            wanted += _VARIANTS
        for head_dim, variant in wanted:
            for config in shipped(head_dim, 2 if dtype in SIXTEEN_BIT else 4, architecture, variant[2]):
                yield _forward(dtype, head_dim, config, *variant)
        if dtype == "tf32":
            continue  # the gradient's kernel has no product
        for head_dim, norm, interleaved in itertools.product((_HEAD_DIM, _WIDE_HEAD_DIM), (True, False), (False, True)):
            if every or (norm and not interleaved):
                yield _backward(dtype, head_dim, norm, interleaved)


def _forward(
    dtype: str, head_dim: int, config: RopeConfig, norm: bool, full: bool, interleaved: bool, cache: bool
) -> Case:
    name = f"{config.block_n} x {config.block_w} x {config.block_k} x {config.num_warps} heads of {head_dim}"
    words = (
        " streamed" * config.streamed,
        " norm" * norm,
        " full" * full,
        " interleaved" * interleaved,
        " cache" * cache,
    )
    return Case(
        "rope.kernel:rope_kernel",
        dtype,
        name + "".join(words),
        {
            "HAS_NORM": norm,
            "FULL": full,
            "INTERLEAVED": interleaved,
            "CACHE": cache,
            "HOLD": holds_angles(config, head_dim, full),
            "WIDEN": False,
            "PRECISION": "tf32" if dtype == "tf32" else "ieee",
            "WIDE": False,
            "STREAMED": config.streamed,
            "HEAD_DIM": head_dim,
            "HALF": padded_half(head_dim),
            "BLOCK_N": config.block_n,
            "BLOCK_W": config.block_w,
            "BLOCK_K": config.block_k,
        },
        config.num_warps,
        config.num_stages,
        tall=config.block_n >= 64,
        types={"eps": "fp32", "positions_ptr": "*i64"},
        ones=_ONES,
        unaligned=_UNALIGNED,
    )


def _backward(dtype: str, head_dim: int, norm: bool, interleaved: bool) -> Case:
    return Case(
        "rope.kernel:pull_back_kernel",
        dtype,
        f"{pull_back_rows(head_dim)} rows, heads of {head_dim}" + " norm" * norm + " interleaved" * interleaved,
        {
            "HAS_NORM": norm,
            "FULL": True,
            "INTERLEAVED": interleaved,
            "WIDE": False,
            "HEAD_DIM": head_dim,
            "HALF": padded_half(head_dim),
            "BLOCK_N": pull_back_rows(head_dim),
        },
        PULL_BACK_WARPS,
        num_stages=3,
        matrix=False,
        types={"eps": "fp32"},
        ones=_ONES_BACK,
        unaligned=_UNALIGNED,
    )
