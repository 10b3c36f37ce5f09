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
# Sums of several accumulators that are copied together to be exchanged between processes: eight of d = 1024.
REDUCE_BYTES = 64 * 2**20

# 16-bit rows on a GPU. The matrix unit adds 16 rows at a time: 64 roundings of at most 2^-23 in a chunk, and one of
# 2^-24 for each chunk of a split when it joins the total. 64 * 2^-23 + 32 * 2^-24 = 9.6e-6 of sum_n |g_ni g_nj|.
CHUNK_ROWS = 1024
MAX_ROWS_PER_SPLIT = 32 * CHUNK_ROWS
# fp32 partial sums alive at once.
PARTIAL_BYTES = 64 * 2**20
# Behind the column sums of a split, of which the first holds its number of rows: 16 keep the next split aligned.
COUNT_COLUMNS = 16
# Sites that one launch serves: the pointers that its kernels take.
SITES = 4


@dataclass(frozen=True, slots=True)
class MomentsConfig:
    block_n: int  # rows a step
    block_d: int  # side of a tile of the Gram matrix
    num_warps: int
    num_stages: int
    resident: int = 1  # programs that a processor holds at once
    once: bool = True  # tiles on the diagonal load their panel once, for both operands


@dataclass(frozen=True, slots=True)
class _Table:
    narrow: MomentsConfig  # d <= 64
    single: MomentsConfig  # d <= 128: one tile, bound by memory
    wide: MomentsConfig  # tiles of 128 x 128, bound by the way from the L2 cache


# Two fp32 tiles of 128 x 128 are 128 registers a thread with 8 warps, so that one program has a processor to itself.
_TABLES: dict[Architecture, _Table] = {
    # A step is 8 KiB (narrow), 16 KiB (single) or 32 KiB (wide). Consumer GPUs have 99 KiB. There an operand that is
    # loaded once for both sides is not copied asynchronously. Four warps spill there, and on sm_100, with rows on two
    # axes or unmasked.
    "sm_80": _Table(
        MomentsConfig(32, 64, 8, 4, 2, once=False),
        MomentsConfig(32, 128, 8, 4, once=False),
        MomentsConfig(32, 128, 8, 4, once=False),
    ),
    "sm_90": _Table(MomentsConfig(64, 64, 4, 6, 3), MomentsConfig(64, 128, 8, 6), MomentsConfig(64, 128, 8, 4)),
    "sm_100": _Table(MomentsConfig(64, 64, 8, 4, 2), MomentsConfig(64, 128, 8, 6), MomentsConfig(64, 128, 8, 4)),
    # 64 KiB of shared memory, and no asynchronous copies: more stages take registers.
    "gfx942": _Table(MomentsConfig(64, 64, 4, 2, 2), MomentsConfig(64, 128, 8, 2), MomentsConfig(64, 128, 8, 2)),
}
# What else a tuner should time: for a row that one tile holds, and for wider rows.
_NARROW_CANDIDATES: dict[Architecture, tuple[MomentsConfig, ...]] = {
    "sm_80": (MomentsConfig(32, 64, 4, 3, 2, once=False), MomentsConfig(64, 64, 8, 4, 2, once=False)),
    "sm_90": (MomentsConfig(64, 64, 4, 4, 3), MomentsConfig(32, 64, 4, 6, 4), MomentsConfig(128, 64, 8, 4, 2)),
    "sm_100": (MomentsConfig(64, 64, 8, 3, 2), MomentsConfig(128, 64, 8, 4, 2)),
    "gfx942": (MomentsConfig(32, 64, 4, 2, 2),),
}
_WIDE_CANDIDATES: dict[Architecture, tuple[MomentsConfig, ...]] = {
    "sm_80": (MomentsConfig(32, 128, 8, 3, once=False), MomentsConfig(32, 64, 4, 4, 2, once=False)),
    "sm_90": (
        MomentsConfig(32, 128, 8, 6),
        MomentsConfig(64, 128, 8, 3),
        MomentsConfig(64, 128, 8, 4, once=False),
        MomentsConfig(64, 64, 4, 4, 3),
    ),
    "sm_100": (MomentsConfig(32, 128, 8, 6), MomentsConfig(64, 128, 8, 3), MomentsConfig(64, 64, 4, 4, 3)),
    "gfx942": (MomentsConfig(32, 128, 8, 2), MomentsConfig(64, 64, 4, 2, 2)),
}

# Splitting the rows, in units of the time that one row takes a program (8 to 10 ns on an H200, whether memory or the L2
# cache binds): what starting and ending a program costs, and what writing and reading a split's tile costs.
_PROGRAM_ROWS = 256
_TILE_ROWS = 4
_MAX_WAVES = 8

# The two small kernels: columns and splits of a block; elements of a tile and splits of a block.
MEAN_COLUMNS, MEAN_SPLITS = 32, 128
MERGE_ELEMENTS, MERGE_WARPS = 256, 8
FEW_SPLITS, MANY_SPLITS = 8, 32


def choose(d: int, architecture: Architecture) -> MomentsConfig:
    """The configuration for rows of this width."""
    table = _TABLES[architecture]
    if d <= table.narrow.block_d:
        return table.narrow
    return table.single if d <= table.single.block_d else table.wide


def shipped(architecture: Architecture) -> tuple[MomentsConfig, ...]:
    """Every configuration that `choose` can return on an architecture."""
    table = _TABLES[architecture]
    return tuple(dict.fromkeys((table.narrow, table.single, table.wide)))


def candidates(d: int, architecture: Architecture) -> tuple[MomentsConfig, ...]:
    """What a tuner should time for rows of this width on a device, the frozen choice first."""
    narrow = d <= _TABLES[architecture].narrow.block_d
    others = (_NARROW_CANDIDATES if narrow else _WIDE_CANDIDATES)[architecture]
    return tuple(dict.fromkeys((choose(d, architecture), *others)))


def splits_of(n_rows: int, units: int, config: MomentsConfig, processors: int) -> int:
    """Splits of the rows; `units` programs, tiles times sites, work on each.

    Only numbers of splits that fill whole waves of programs are worth a look. More waves lose less to an uneven last
    one and cost more programs and more partial sums.
    """
    slots = processors * config.resident
    best, least = 1, None
    for waves in range(1, _MAX_WAVES + 1):
        splits = max(1, min(waves * slots // units, -(-n_rows // config.block_n)))
        filled = -(-splits * units // slots)
        cost = filled * (-(-n_rows // splits) + _PROGRAM_ROWS) + _TILE_ROWS * splits * units
        if least is None or cost < least:
            best, least = splits, cost
    return best
