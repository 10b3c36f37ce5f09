"""Frozen choices of the gradient covariance.

None was timed on a GPU: the arithmetic is in csrc_notes/covariance.md, what each configuration compiles to in
csrc_notes/aot.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from spd_kernels.launch import Architecture

# Rows are converted to fp64 in chunks of this size, whatever the number of rows. On one core of an EPYC with 16 MiB of
# L3 cache to itself, 4 to 32 MiB were within 15 % of one another and 64 MiB a third slower.
CHUNK_BYTES = 8 * 2**20
# Only the upper triangle is summed, in bands of this many rows of it: at d = 1024 that is 62.5 % of the products.
# On the same core narrower bands lost more in the matrix product than they saved.
TRIANGLE_BAND = 256

# 16-bit rows on a GPU: a program sums at most this many rows in fp32 before the sum moves to fp64, which bounds the
# accumulation error; and never fewer than the smaller number, below which writing the partial sums dominates.
MAX_ROWS_PER_SPLIT = 1024
MIN_ROWS_PER_SPLIT = 128
# fp32 partial sums alive at once.
PARTIAL_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class MomentsConfig:
    block_n: int  # rows a step
    block_d: int  # side of a tile of the Gram matrix
    num_warps: int
    num_stages: int


NARROW = MomentsConfig(block_n=64, block_d=64, num_warps=4, num_stages=3)
# Two stages take 64 KiB on sm_90, so that two programs share a multiprocessor.
WIDE = MomentsConfig(block_n=64, block_d=128, num_warps=8, num_stages=2)


def choose(d: int, architecture: Architecture) -> MomentsConfig:
    """The configuration for rows of this width."""
    return NARROW if d <= NARROW.block_d else WIDE


def shipped(architecture: Architecture) -> tuple[MomentsConfig, ...]:
    """Every configuration that `choose` can return on an architecture."""
    return (NARROW, WIDE)


def rows_per_split(n_rows: int, d: int, block_d: int, processors: int) -> int:
    """Rows a program sums: enough programs for two on every processor, within the bounds above."""
    tiles = -(-d // block_d)
    triangle = tiles * (tiles + 1) // 2
    wanted = -(-n_rows * triangle // (2 * processors))
    rows = min(max(wanted, MIN_ROWS_PER_SPLIT), MAX_ROWS_PER_SPLIT)
    return rows // MIN_ROWS_PER_SPLIT * MIN_ROWS_PER_SPLIT
