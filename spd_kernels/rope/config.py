"""Frozen launch configurations of the rope kernels.

None was timed on a device: the shapes follow from the arithmetic in csrc_notes/rope.md and from what compiles without
a spill (csrc_notes/aot.md). The rows of sm_80 also fit the 99 KiB of shared memory of sm_86 and sm_89.
"""

from __future__ import annotations

from dataclasses import dataclass

from spd_kernels.launch import Architecture


@dataclass(frozen=True, slots=True)
class RopeConfig:
    block_n: int  # rows of a tile
    block_w: int  # rank block
    block_k: int  # step over d in pass 1; streamed: also over the rank in pass 2
    num_warps: int
    num_stages: int
    streamed: bool = False


# Heads up to NARROW_HEAD_DIM leave the registers room for 128 rows, those up to WIDE_HEAD_DIM for 64, others for 16.
# Beyond MAX_HEAD_DIM (no model is known to have such heads) the reference serves.
NARROW_HEAD_DIM = 128
WIDE_HEAD_DIM = 256
MAX_HEAD_DIM = 512
# Up to this many rows, tiles of 16 rows give each of an H200's 132 multiprocessors at most one.
FEW_ROWS = 2048
# Registers a thread that the angles of a tile may take for the whole walk over the heads; beyond, every head reads them
# again, from the first-level cache, as it does where c is streamed. 64 is what 128 rows of 64 pairs take with 8 warps
# at one angle a pair. At one an element 64 spilled on sm_80.
HELD_REGISTERS = 64
HELD_REGISTERS_FULL = 32

# In each table by increasing block_w: the first that holds the rank serves, else the streamed one at the end.
_Table = tuple[RopeConfig, ...]


@dataclass(frozen=True, slots=True)
class _Tables:
    many: _Table  # rows, of narrow heads
    many_wide: _Table
    few: _Table
    few_wide: _Table
    widest: _Table  # in any number of rows


# 16-bit. 128 rows read U half as often as 64. Of the streamed tiles of 16 rows, those with 4 warps or with steps of 64
# spill somewhere.
_STREAMED_WIDE = RopeConfig(64, 128, 32, num_warps=8, num_stages=2, streamed=True)
_STREAMED_FEW = RopeConfig(16, 128, 32, num_warps=8, num_stages=3, streamed=True)
_WIDE = (
    RopeConfig(64, 64, 32, num_warps=8, num_stages=2),
    RopeConfig(64, 128, 32, num_warps=8, num_stages=2),
    _STREAMED_WIDE,
)
_FEW = RopeConfig(16, 128, 32, num_warps=4, num_stages=2)
_FEW_256 = RopeConfig(16, 256, 32, num_warps=4, num_stages=2)
_MANY_RECENT = (
    RopeConfig(128, 64, 64, num_warps=8, num_stages=2),
    RopeConfig(128, 128, 32, num_warps=8, num_stages=3),  # steps of 64 spill at heads of 80
    RopeConfig(64, 256, 32, num_warps=8, num_stages=2),  # two stages of a head of U are 128 KiB
)
SIXTEEN_BIT: dict[Architecture, _Tables] = {
    # 128 rows of interleaved pairs spill here, and so does rank 256 in registers.
    "sm_80": _Tables(
        many=(
            RopeConfig(64, 64, 32, num_warps=8, num_stages=2),
            RopeConfig(64, 128, 32, num_warps=8, num_stages=2),
            RopeConfig(128, 128, 32, num_warps=8, num_stages=2, streamed=True),
        ),
        many_wide=_WIDE,
        few=(_FEW, _FEW_256, _STREAMED_FEW),
        few_wide=(_FEW, _STREAMED_FEW),
        widest=(_STREAMED_FEW,),
    ),
    "sm_90": _Tables(
        many=(*_MANY_RECENT, RopeConfig(128, 128, 64, num_warps=8, num_stages=3, streamed=True)),
        many_wide=_WIDE,
        few=(_FEW, _FEW_256, _STREAMED_FEW),
        few_wide=(_FEW, _STREAMED_FEW),
        widest=(_STREAMED_FEW,),
    ),
    "sm_100": _Tables(
        many=(*_MANY_RECENT, RopeConfig(128, 128, 32, num_warps=8, num_stages=3, streamed=True)),
        many_wide=_WIDE,
        few=(_FEW, _FEW_256, _STREAMED_FEW),
        few_wide=(_FEW, _STREAMED_FEW),
        widest=(_STREAMED_FEW,),
    ),
    # 64 KiB of shared memory; with 4 warps a thread may have 512 registers. One stage keeps the many scalars of
    # the streamed tiles within the scalar registers.
    "gfx942": _Tables(
        many=(
            RopeConfig(64, 128, 32, num_warps=4, num_stages=2),
            RopeConfig(64, 256, 32, num_warps=4, num_stages=1),
            RopeConfig(64, 128, 64, num_warps=4, num_stages=1, streamed=True),
        ),
        many_wide=(RopeConfig(64, 128, 32, num_warps=8, num_stages=1, streamed=True),),
        few=(_FEW, RopeConfig(16, 128, 64, num_warps=4, num_stages=1, streamed=True)),
        few_wide=(RopeConfig(16, 128, 64, num_warps=4, num_stages=1, streamed=True),),
        widest=(RopeConfig(16, 128, 64, num_warps=4, num_stages=1, streamed=True),),
    ),
}

# 32-bit. IEEE products hold their operands in registers; with c there too only one tile does not spill. Without, most
# tiles spill 8 to 40 bytes on one architecture or another, in the store to a cache: these do not.
_SINGLE = RopeConfig(32, 128, 16, num_warps=8, num_stages=2)
_SINGLE_MANY_WIDE = (RopeConfig(32, 64, 16, num_warps=8, num_stages=2, streamed=True),)
_SINGLE_FEW_WIDE = (RopeConfig(16, 32, 32, num_warps=8, num_stages=3, streamed=True),)
_SINGLE_WIDEST = (RopeConfig(16, 64, 16, num_warps=8, num_stages=3, streamed=True),)
_SINGLE_FEW_GFX942 = (RopeConfig(16, 64, 32, num_warps=4, num_stages=1, streamed=True),)
THIRTY_TWO_BIT: dict[Architecture, _Tables] = {
    "sm_80": _Tables(
        many=(_SINGLE, RopeConfig(32, 32, 32, num_warps=8, num_stages=2, streamed=True)),
        many_wide=_SINGLE_MANY_WIDE,
        few=(RopeConfig(16, 32, 32, num_warps=8, num_stages=3, streamed=True),),
        few_wide=_SINGLE_FEW_WIDE,
        widest=_SINGLE_WIDEST,
    ),
    "sm_90": _Tables(
        many=(_SINGLE, RopeConfig(64, 64, 16, num_warps=8, num_stages=2, streamed=True)),
        many_wide=_SINGLE_MANY_WIDE,
        few=(RopeConfig(16, 32, 32, num_warps=8, num_stages=2, streamed=True),),
        few_wide=_SINGLE_FEW_WIDE,
        widest=_SINGLE_WIDEST,
    ),
    "sm_100": _Tables(
        many=(_SINGLE, RopeConfig(64, 128, 16, num_warps=8, num_stages=2, streamed=True)),
        many_wide=_SINGLE_MANY_WIDE,
        few=(RopeConfig(16, 64, 16, num_warps=8, num_stages=2, streamed=True),),
        few_wide=_SINGLE_FEW_WIDE,
        widest=_SINGLE_WIDEST,
    ),
    "gfx942": _Tables(
        many=(RopeConfig(64, 64, 16, num_warps=4, num_stages=1, streamed=True),),
        many_wide=(RopeConfig(32, 64, 16, num_warps=4, num_stages=1, streamed=True),),
        few=_SINGLE_FEW_GFX942,
        few_wide=_SINGLE_FEW_GFX942,
        widest=_SINGLE_FEW_GFX942,
    ),
}

# The kernel of the gradient: 16 elements a thread (8 on gfx942) of each of its eight tiles.
PULL_BACK_ELEMENTS = 2048
PULL_BACK_WARPS = 4


def choose(
    n_rows: int, rank: int, head_dim: int, itemsize: int, architecture: Architecture, interleaved: bool = False
) -> RopeConfig:
    """The configuration for so many rows, this rank, head and element size."""
    table = _table(n_rows <= FEW_ROWS, head_dim, itemsize, architecture, interleaved)
    for config in table[:-1]:
        if rank <= config.block_w:
            return config
    return table[-1]


def shipped(
    head_dim: int, itemsize: int, architecture: Architecture, interleaved: bool = False
) -> tuple[RopeConfig, ...]:
    """Every configuration that `choose` can return for these heads and elements."""
    tables = (_table(few, head_dim, itemsize, architecture, interleaved) for few in (False, True))
    return tuple(dict.fromkeys(config for table in tables for config in table))


def candidates(
    n_rows: int, rank: int, head_dim: int, itemsize: int, architecture: Architecture, interleaved: bool = False
) -> tuple[RopeConfig, ...]:
    """What a tuner should try for these arguments: whatever holds the rank, of tiles that the rows fill."""
    return tuple(
        config
        for config in shipped(head_dim, itemsize, architecture, interleaved)
        if (config.streamed or rank <= config.block_w) and (config.block_n <= 16 or n_rows > 16)
    ) or (choose(n_rows, rank, head_dim, itemsize, architecture, interleaved),)


def _table(few: bool, head_dim: int, itemsize: int, architecture: Architecture, interleaved: bool) -> _Table:
    tables = (SIXTEEN_BIT if itemsize == 2 else THIRTY_TWO_BIT)[architecture]
    if head_dim > WIDE_HEAD_DIM:
        return tables.widest
    if head_dim > NARROW_HEAD_DIM:
        # No model is known to have wide heads of interleaved pairs: what serves few rows serves them, without a spill.
        return tables.few_wide if few or interleaved else tables.many_wide
    return tables.few if few else tables.many


def padded_half(head_dim: int) -> int:
    """Pairs of a head as the kernel's tiles hold them: a power of two that the matrix units take."""
    return max(16, 1 << (head_dim // 2 - 1).bit_length())


def holds_angles(config: RopeConfig, head_dim: int, full: bool) -> bool:
    """Whether the angles of a tile stay in registers while its heads pass."""
    registers = config.block_n * padded_half(head_dim) * (4 if full else 2) // (32 * config.num_warps)
    return not config.streamed and registers <= (HELD_REGISTERS_FULL if full else HELD_REGISTERS)


def heads_per_program(tiles: int, n_heads: int, processors: int) -> int:
    """Heads that one program writes: all of them, unless so few tiles of rows leave processors idle.

    Programs that share a tile each compute its c again; the second product and the stores are divided.
    """
    shares = min(n_heads, max(1, processors // tiles))
    return -(-n_heads // shares)


def pull_back_rows(head_dim: int) -> int:
    """Rows of a tile of the gradient's kernel."""
    return PULL_BACK_ELEMENTS // padded_half(head_dim)
