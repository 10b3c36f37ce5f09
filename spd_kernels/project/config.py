"""Frozen launch configurations of the projection kernels.

None was timed on a device: the shapes follow from the arithmetic in csrc_notes/project.md, and what each compiles to
(registers, spills, shared memory) is in csrc_notes/aot.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from spd_kernels.launch import Architecture


@dataclass(frozen=True, slots=True)
class ProjectConfig:
    block_n: int  # rows of a tile
    block_w: int  # rank block; streamed: also the output columns of the second product
    block_k: int  # step over d; streamed: contraction step of both products
    num_warps: int
    num_stages: int
    streamed: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """By increasing block_w: the first that holds the rank serves, else the streamed one at the end."""

    few: tuple[ProjectConfig, ...]
    some: tuple[ProjectConfig, ...]
    many: tuple[ProjectConfig, ...]


@dataclass(frozen=True, slots=True)
class BasisConfig:
    block_n: int  # rows a step
    block_d: int  # tile of U
    block_r: int
    num_warps: int
    num_stages: int


# Up to this many rows, tiles are 16 rows tall, the least that tl.dot takes. Each of a few programs then pulls U through
# one multiprocessor; beyond, so many would pull it that the L2 cache limits them, and taller tiles pull it less often.
FEW_ROWS = 32
# Up to this many rows, tiles are 64 rows tall: 128 tiles are not yet one for each of an H200's 132 multiprocessors.
SOME_ROWS = 8192

# 16-bit elements.
# Few and some rows: while a multiprocessor computes, (stages - 1) (block_w + block_n) block_k elements are on their way
# to it, 58 to 80 KiB of them here: 100 GB/s times a latency of 0.7 us ask for 70.
# Many rows: each tile pulls U twice, so tiles are as tall as registers allow: the accumulators of 256 x 128 and of
# 128 x 256 take 128 registers a thread.
_DEEP = Table(  # 227 KiB of shared memory
    few=(
        ProjectConfig(16, 64, 128, num_warps=4, num_stages=5),
        ProjectConfig(16, 128, 64, num_warps=4, num_stages=5),
        ProjectConfig(16, 256, 32, num_warps=8, num_stages=5),
        ProjectConfig(16, 128, 64, num_warps=8, num_stages=5, streamed=True),
    ),
    some=(
        ProjectConfig(64, 64, 64, num_warps=4, num_stages=4),
        ProjectConfig(64, 128, 64, num_warps=8, num_stages=4),
        ProjectConfig(64, 256, 32, num_warps=8, num_stages=4),
        ProjectConfig(64, 128, 64, num_warps=8, num_stages=4, streamed=True),
    ),
    many=(
        ProjectConfig(128, 16, 64, num_warps=8, num_stages=3),
        ProjectConfig(128, 64, 64, num_warps=8, num_stages=3),
        ProjectConfig(256, 128, 64, num_warps=8, num_stages=3),
        ProjectConfig(128, 256, 64, num_warps=8, num_stages=2),
        ProjectConfig(128, 128, 64, num_warps=8, num_stages=3, streamed=True),
    ),
)
# 99 KiB (the consumer GPUs that the table of sm_80 serves too) and 64 KiB (gfx942).
_SHALLOW = Table(
    few=(
        ProjectConfig(16, 64, 128, num_warps=4, num_stages=4),
        ProjectConfig(16, 128, 64, num_warps=4, num_stages=4),
        ProjectConfig(16, 256, 32, num_warps=4, num_stages=4),
        ProjectConfig(16, 128, 64, num_warps=8, num_stages=3, streamed=True),
    ),
    some=(
        ProjectConfig(64, 64, 64, num_warps=4, num_stages=3),
        ProjectConfig(64, 128, 64, num_warps=8, num_stages=3),
        ProjectConfig(64, 256, 32, num_warps=8, num_stages=2),
        ProjectConfig(64, 128, 32, num_warps=8, num_stages=2, streamed=True),
    ),
    many=(
        ProjectConfig(128, 16, 64, num_warps=8, num_stages=3),
        ProjectConfig(128, 64, 64, num_warps=8, num_stages=3),
        ProjectConfig(256, 128, 32, num_warps=8, num_stages=3),
        ProjectConfig(128, 256, 32, num_warps=8, num_stages=2),
        ProjectConfig(128, 128, 32, num_warps=8, num_stages=3, streamed=True),
    ),
)
# 32-bit elements: without TF32 the products run on the ordinary units with their operands in registers, hence smaller
# tiles. They take so long that 64 rows do for many. Steps and warps of the streamed ones are those that nowhere spill.
_TALL_32 = (
    ProjectConfig(64, 64, 32, num_warps=8, num_stages=2),
    ProjectConfig(64, 128, 32, num_warps=8, num_stages=3),
    ProjectConfig(64, 64, 16, num_warps=4, num_stages=2, streamed=True),
)
_FOUR_BYTES = Table(
    few=(
        ProjectConfig(16, 64, 64, num_warps=4, num_stages=3),
        ProjectConfig(16, 128, 32, num_warps=4, num_stages=3),
        ProjectConfig(16, 64, 32, num_warps=8, num_stages=2, streamed=True),
    ),
    some=_TALL_32,
    many=_TALL_32,
)
_TALL_32_SM_80 = (_TALL_32[0], ProjectConfig(64, 128, 32, num_warps=8, num_stages=2), _TALL_32[2])
_FOUR_BYTES_SM_80 = Table(
    few=(*_FOUR_BYTES.few[:-1], ProjectConfig(16, 64, 16, num_warps=4, num_stages=2, streamed=True)),
    some=_TALL_32_SM_80,
    many=_TALL_32_SM_80,
)

# The gradients' first launch, rank by rank as above. It holds more addresses than a projection: the tall tiles spill.
_COEFFICIENTS_16 = (
    ProjectConfig(128, 64, 64, num_warps=8, num_stages=3),
    ProjectConfig(128, 128, 64, num_warps=8, num_stages=2),
    ProjectConfig(64, 256, 32, num_warps=8, num_stages=2),
    ProjectConfig(128, 128, 32, num_warps=8, num_stages=3, streamed=True),
)
_COEFFICIENTS_32 = (
    ProjectConfig(64, 64, 32, num_warps=8, num_stages=3),
    ProjectConfig(64, 128, 32, num_warps=8, num_stages=3),
    ProjectConfig(64, 64, 32, num_warps=8, num_stages=2, streamed=True),
)

# The second launch, by increasing block_r; the last serves larger ranks. A step holds 2 block_n (block_d + block_r)
# elements.
_DEEP_BASIS = (
    BasisConfig(32, 128, 64, num_warps=8, num_stages=4),
    BasisConfig(32, 128, 128, num_warps=8, num_stages=4),
)
_SHALLOW_BASIS = (
    BasisConfig(32, 128, 64, num_warps=8, num_stages=3),
    BasisConfig(32, 128, 128, num_warps=8, num_stages=2),
)
# 64 columns of x at a time would be a tile for HGMMA, which takes no TF32 operand transposed: 4-byte loads.
_FOUR_BYTES_BASIS = (BasisConfig(32, 32, 64, num_warps=4, num_stages=2),)

# Rows that one program sums for dL/dU, at least: fewer, and writing the partial sums would outweigh reading the rows.
MIN_ROWS_PER_SPLIT = 256

_ROOMY = frozenset(("sm_90", "sm_100"))


def _table(itemsize: int, architecture: Architecture) -> Table:
    if itemsize == 4:
        return _FOUR_BYTES_SM_80 if architecture == "sm_80" else _FOUR_BYTES
    return _DEEP if architecture in _ROOMY else _SHALLOW


def choose(n_rows: int, d: int, rank: int, itemsize: int, architecture: Architecture) -> ProjectConfig:
    """The configuration for so many rows, this (larger) rank and this element size; d matters to none so far."""
    table = _table(itemsize, architecture)
    by_rank = table.few if n_rows <= FEW_ROWS else table.some if n_rows <= SOME_ROWS else table.many
    return _first_that_holds(rank, by_rank)


def choose_coefficients(rank: int, itemsize: int) -> ProjectConfig:
    """The configuration of the gradients' first launch, which has many rows wherever its time matters."""
    return _first_that_holds(rank, shipped_coefficients(itemsize))


def _first_that_holds(rank: int, by_rank: tuple[ProjectConfig, ...]) -> ProjectConfig:
    return next((config for config in by_rank[:-1] if rank <= config.block_w), by_rank[-1])


def choose_basis(rank: int, itemsize: int, architecture: Architecture) -> BasisConfig:
    """The configuration of the gradients' second launch."""
    by_rank = shipped_basis(itemsize, architecture)
    return next((config for config in by_rank[:-1] if rank <= config.block_r), by_rank[-1])


def shipped(itemsize: int, architecture: Architecture) -> tuple[ProjectConfig, ...]:
    """Every configuration that `choose` can return for this element size."""
    table = _table(itemsize, architecture)
    return tuple(dict.fromkeys(table.few + table.some + table.many))


def shipped_coefficients(itemsize: int) -> tuple[ProjectConfig, ...]:
    """Every configuration that `choose_coefficients` can return for this element size."""
    return _COEFFICIENTS_16 if itemsize == 2 else _COEFFICIENTS_32


def shipped_basis(itemsize: int, architecture: Architecture) -> tuple[BasisConfig, ...]:
    """Every configuration that `choose_basis` can return for this element size."""
    if itemsize == 4:
        return _FOUR_BYTES_BASIS
    return _DEEP_BASIS if architecture in _ROOMY else _SHALLOW_BASIS


def candidates(n_rows: int, d: int, rank: int, itemsize: int, architecture: Architecture) -> tuple[ProjectConfig, ...]:
    """What a tuner should try: every shipped configuration that can serve, also with a stage less and with the other
    number of warps; of those with c in registers the two narrowest that hold the rank, for each height."""
    found: dict[ProjectConfig, None] = {}
    for config in _serving(n_rows, rank, shipped(itemsize, architecture)):
        found[config] = None
        if config.num_stages > 2:
            found[replace(config, num_stages=config.num_stages - 1)] = None
        if config.block_n < 128:
            found[replace(config, num_warps=12 - config.num_warps)] = None
    return tuple(found)


def _serving(n_rows: int, rank: int, configs: tuple[ProjectConfig, ...]) -> Iterator[ProjectConfig]:
    seen: Counter[int] = Counter()
    for config in sorted(configs, key=lambda config: config.block_w):
        if config.block_n > 16 and config.block_n >= 2 * n_rows:
            continue
        if config.streamed:
            yield config
        elif rank <= config.block_w and seen[config.block_n] < 2:
            seen[config.block_n] += 1
            yield config


def columns_per_program(tiles: int, d: int, config: ProjectConfig, processors: int) -> int:
    """Columns of y that one program writes: all of them, unless so few tiles of rows leave processors idle.

    Programs that share a tile each read its rows and all of U, and write a slice of the columns: U's way through one
    multiprocessor is what a short decode step waits for, and half of it, the second product's, is thus divided. Some 55
    multiprocessors take all that an H200's L2 cache gives, so that slices fill no more than half of the processors.
    """
    step = config.block_w if config.streamed else config.block_k
    slices = min(-(-d // step), max(1, processors // 2 // tiles))
    return -(-d // (slices * step)) * step


def rows_per_split(n_rows: int, programs: int, config: BasisConfig, processors: int) -> int:
    """Rows that one program sums for dL/dU, where `programs` tiles of U are summed: two programs a processor."""
    rows = max(-(-n_rows * programs // (2 * processors)), MIN_ROWS_PER_SPLIT)
    return -(-rows // config.block_n) * config.block_n
