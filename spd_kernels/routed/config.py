"""Frozen launch configurations of the routed projection.

Of 16-bit sequences: a tile does what a tile of the plain projection does, with registers for as many programs, so its
configurations are taken: a routed launch is slower than a plain one only by what routing costs. Of packed rows: a loop
over subspaces surrounds the passes and takes registers, so these have tables of their own. They also serve 32-bit
sequences and those on gfx942, where some of the projection's configurations spill once routing is added. None was timed
on a device; the arithmetic is in csrc_notes/routed.md, what each compiles to in csrc_notes/aot.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from spd_kernels.launch import Architecture
from spd_kernels.project import config as projection
from spd_kernels.project.config import ProjectConfig

# The least rows that a tile can have, of which a short decode step uses few.
SHORT = 16
# The tables below: up to this many rows, short tiles give no more than one to each of an H200's 132 multiprocessors.
FEW_ROWS = 2048
# No table keeps c of so many directions in registers.
_UNBOUNDED = 2**20


@dataclass(frozen=True, slots=True)
class Table:
    """By increasing block_w: the first that holds the rank serves, else the streamed one at the end."""

    few: tuple[ProjectConfig, ...]
    many: tuple[ProjectConfig, ...]


# Shared memory: within the 64 KiB of gfx942 and, since the table of sm_80 serves it too, the 99 KiB of sm_86. Where
# architectures differ, the steps and warps are those at which neither kernel spills there.
# 16-bit: up to rank 64, and from 129 to 256, two programs share a multiprocessor of sm_90. At rank 128 and where c is
# streamed there is one, with 128 rows: with 64, U would come out of the L2 cache twice as often, which then limits.
_FEW_16 = (
    ProjectConfig(16, 64, 64, num_warps=4, num_stages=3),
    ProjectConfig(16, 256, 64, num_warps=8, num_stages=2),
    ProjectConfig(16, 128, 64, num_warps=8, num_stages=2, streamed=True),
)
_MANY_16 = (
    ProjectConfig(128, 16, 64, num_warps=8, num_stages=3),
    ProjectConfig(128, 64, 64, num_warps=8, num_stages=3),
    ProjectConfig(128, 128, 64, num_warps=8, num_stages=2),
)
_RANK_256 = ProjectConfig(64, 256, 32, num_warps=8, num_stages=3)
_STREAMED_16_128 = ProjectConfig(128, 128, 32, num_warps=8, num_stages=3, streamed=True)
_STREAMED_16_64 = ProjectConfig(64, 128, 64, num_warps=8, num_stages=2, streamed=True)
# 32-bit: without TF32 the products run on the ordinary units with their operands in registers, hence smaller tiles.
_FEW_32 = ProjectConfig(16, 64, 32, num_warps=4, num_stages=2)
_STREAMED_FEW_32 = ProjectConfig(16, 64, 32, num_warps=8, num_stages=2, streamed=True)
_STREAMED_32 = ProjectConfig(32, 32, 32, num_warps=4, num_stages=2, streamed=True)

_TWO_BYTES: dict[Architecture, Table] = {
    "sm_80": Table(_FEW_16, (*_MANY_16, _RANK_256, _STREAMED_16_64)),
    "sm_90": Table(_FEW_16, (*_MANY_16, _RANK_256, _STREAMED_16_128)),
    "sm_100": Table(_FEW_16, (*_MANY_16, ProjectConfig(64, 256, 64, num_warps=8, num_stages=2), _STREAMED_16_64)),
    "gfx942": Table(_FEW_16, (*_MANY_16, _RANK_256, _STREAMED_16_64)),
}
_FOUR_BYTES: dict[Architecture, Table] = {
    "sm_80": Table(
        (_FEW_32, ProjectConfig(16, 64, 16, num_warps=4, num_stages=2, streamed=True)),
        (
            ProjectConfig(64, 64, 32, num_warps=8, num_stages=2),
            ProjectConfig(32, 128, 32, num_warps=8, num_stages=2),
            ProjectConfig(32, 64, 16, num_warps=4, num_stages=2, streamed=True),
        ),
    ),
    "sm_90": Table(
        (_FEW_32, _STREAMED_FEW_32),
        (
            ProjectConfig(64, 64, 32, num_warps=8, num_stages=2),
            ProjectConfig(32, 128, 32, num_warps=8, num_stages=2),
            _STREAMED_32,
        ),
    ),
    "sm_100": Table(
        (_FEW_32, _STREAMED_FEW_32),
        (
            ProjectConfig(32, 64, 32, num_warps=4, num_stages=2),
            ProjectConfig(32, 128, 32, num_warps=8, num_stages=2),
            _STREAMED_32,
        ),
    ),
    "gfx942": Table(
        (_FEW_32, ProjectConfig(16, 64, 32, num_warps=4, num_stages=2, streamed=True)),
        (
            ProjectConfig(64, 64, 32, num_warps=8, num_stages=2),
            ProjectConfig(16, 128, 32, num_warps=4, num_stages=2),
            ProjectConfig(32, 64, 32, num_warps=8, num_stages=2, streamed=True),
        ),
    ),
}


def _own(itemsize: int, architecture: Architecture) -> Table:
    return (_TWO_BYTES if itemsize == 2 else _FOUR_BYTES)[architecture]


def _takes_the_projection(itemsize: int, architecture: Architecture) -> bool:
    return itemsize == 2 and architecture != "gfx942"


def choose(
    sequences: int, rows: int, d: int, rank: int, itemsize: int, architecture: Architecture, *, ranked: bool = False
) -> ProjectConfig:
    """The configuration for so many sequences of so many rows each; ranked where every subspace has its own rank.

    Tiles do not reach over the end of a sequence. Up to SHORT rows a taller tile would only be emptier. Above, it reads
    U once where short ones read it twice or more, which costs more than its empty rows.
    """
    n_rows = rows if rows <= SHORT else sequences * -(-rows // SHORT) * SHORT
    own = _own(itemsize, architecture)
    if not _takes_the_projection(itemsize, architecture):
        return _hold(own.few if n_rows <= FEW_ROWS else own.many, rank, ranked)
    chosen = projection.choose(n_rows, d, rank, itemsize, architecture)
    if chosen.block_n == SHORT:
        return own.few[-1] if chosen.streamed else chosen
    return _hold((chosen, projection.choose(n_rows, d, _UNBOUNDED, itemsize, architecture)), rank, ranked)


def choose_packed(
    sequences: int, n_rows: int, rank: int, itemsize: int, architecture: Architecture, *, ranked: bool = False
) -> ProjectConfig:
    """The configuration for so many packed rows; short tiles where a sequence has few rows, for a tile takes its
    subspaces one after another."""
    own = _own(itemsize, architecture)
    return _hold(own.few if n_rows <= max(FEW_ROWS, sequences * SHORT) else own.many, rank, ranked)


def _hold(table: tuple[ProjectConfig, ...], rank: int, ranked: bool) -> ProjectConfig:
    """The first of a table that holds the rank, else the streamed one at its end.

    With ranks, the streamed one from its block of directions on: its blocks end at a subspace's rank, while c in
    registers is as wide as the largest. In tall tiles products with zeros would no longer hide behind the reading of x;
    short ones wait for the columns of U, of which those past the rank are not read either way.
    """
    chosen = next((config for config in table if not config.streamed and rank <= config.block_w), table[-1])
    return table[-1] if ranked and chosen.block_n > SHORT and rank > table[-1].block_w else chosen


def shipped(itemsize: int, architecture: Architecture) -> tuple[ProjectConfig, ...]:
    """Every configuration that `choose` can return for this element size."""
    if not _takes_the_projection(itemsize, architecture):
        return shipped_packed(itemsize, architecture)
    # Short and streamed, the projection's spills on sm_90 in some variants.
    projected = [c for c in projection.shipped(itemsize, architecture) if not (c.streamed and c.block_n == SHORT)]
    return (*projected, _own(itemsize, architecture).few[-1])


def shipped_packed(itemsize: int, architecture: Architecture) -> tuple[ProjectConfig, ...]:
    """Every configuration that `choose_packed` can return for this element size."""
    own = _own(itemsize, architecture)
    return own.many + own.few


def candidates(rank: int, itemsize: int, architecture: Architecture, *, packed: bool) -> tuple[ProjectConfig, ...]:
    """What a tuner should try for a rank: every shipped configuration that can hold it."""
    every = shipped_packed(itemsize, architecture) if packed else shipped(itemsize, architecture)
    return tuple(config for config in every if config.streamed or rank <= config.block_w)


def rows_per_program(n_rows: int, config: ProjectConfig, processors: int) -> int:
    """Packed rows of a tile: a short tile takes no more than one processor's share of the rows.

    Neighbouring rows of a decode step differ in subspace, and a tile takes its subspaces one after another.
    """
    if config.block_n > SHORT:
        return config.block_n
    return min(config.block_n, -(-n_rows // processors))
