"""Frozen launch configurations of the projection kernels.

None was timed on a device: the shapes follow from the arithmetic in csrc_notes/project.md, and what each compiles to
(registers, spills, shared memory) is in csrc_notes/aot.md. Every row fits the 99 KiB of shared memory of sm_86 and
sm_89 and the 64 KiB of gfx942.
"""

from __future__ import annotations

from dataclasses import dataclass

from spd_kernels.launch import Architecture


@dataclass(frozen=True, slots=True)
class ProjectConfig:
    block_n: int  # rows of a tile
    block_w: int  # rank block; streamed: also the output columns of the second product
    block_k: int  # step over d; streamed: contraction step of both products
    num_warps: int
    num_stages: int
    streamed: bool = False


# Up to this many rows, tiles of 16 rows still give no more than one tile to each of an H200's 132 multiprocessors.
FEW_ROWS = 2048

# By increasing block_w: the first one that holds the rank serves, else the streamed one at the end.
# 16-bit: 128 rows read U half as often as 64; at rank 256 the accumulator c allows only 64.
SIXTEEN_BIT_MANY = (
    ProjectConfig(128, 16, 64, num_warps=8, num_stages=3),
    ProjectConfig(128, 64, 64, num_warps=8, num_stages=3),
    ProjectConfig(128, 128, 64, num_warps=8, num_stages=2),
    ProjectConfig(64, 256, 32, num_warps=8, num_stages=3),
    ProjectConfig(128, 128, 32, num_warps=8, num_stages=3, streamed=True),
)
SIXTEEN_BIT_FEW = (
    ProjectConfig(16, 64, 64, num_warps=4, num_stages=3),
    ProjectConfig(16, 256, 64, num_warps=4, num_stages=2),
    ProjectConfig(16, 128, 64, num_warps=8, num_stages=3, streamed=True),
)
# 32-bit: without TF32 the products run on the ordinary units with their operands in registers, hence smaller tiles.
# Steps and warps of the streamed ones are those at which no architecture spills.
THIRTY_TWO_BIT_MANY = (
    ProjectConfig(64, 64, 32, num_warps=8, num_stages=2),
    ProjectConfig(32, 128, 32, num_warps=8, num_stages=2),
    ProjectConfig(64, 64, 16, num_warps=4, num_stages=2, streamed=True),
)
THIRTY_TWO_BIT_FEW = (
    ProjectConfig(16, 64, 32, num_warps=4, num_stages=2),
    ProjectConfig(16, 64, 32, num_warps=8, num_stages=2, streamed=True),
)


def choose(n_rows: int, d: int, rank: int, itemsize: int, architecture: Architecture) -> ProjectConfig:
    """The configuration for so many rows, this (larger) rank and this element size."""
    few = n_rows <= FEW_ROWS
    table: tuple[ProjectConfig, ...]
    if itemsize == 2:
        table = SIXTEEN_BIT_FEW if few else SIXTEEN_BIT_MANY
    else:
        table = THIRTY_TWO_BIT_FEW if few else THIRTY_TWO_BIT_MANY
    for config in table[:-1]:
        if rank <= config.block_w:
            return config
    return table[-1]


def shipped(itemsize: int, architecture: Architecture) -> tuple[ProjectConfig, ...]:
    """Every configuration that `choose` can return for this element size."""
    if itemsize == 2:
        return SIXTEEN_BIT_MANY + SIXTEEN_BIT_FEW
    return THIRTY_TWO_BIT_MANY + THIRTY_TWO_BIT_FEW


def columns_per_program(tiles: int, d: int, config: ProjectConfig, processors: int) -> int:
    """Columns of y that one program writes: all of them, unless so few tiles of rows leave processors idle.

    Programs that share a tile each read its rows and all of U, and write a slice of the columns: U's way through one
    multiprocessor is what a short decode step waits for, and half of it, the second product's, is thus divided.
    """
    step = config.block_w if config.streamed else config.block_k
    slices = min(-(-d // step), max(1, processors // tiles))
    return -(-d // (slices * step)) * step
