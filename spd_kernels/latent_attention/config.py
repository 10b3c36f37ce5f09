"""Frozen choices of the attention over latents.

None was timed on a GPU: the arithmetic is in csrc_notes/latent_attention.md, what each configuration compiles to in
csrc_notes/aot.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spd_kernels.launch import Architecture

# On the CPU latent keys are expanded this many bytes at a time: they are written, normed, rotated and multiplied while
# they are in the second-level cache or near it.
CHUNK_BYTES = 2 * 2**20

# Query rows of a program, the least that tl.dot takes: 4 key heads of 4 query heads each fill it in decoding.
BLOCK_H = 16

# Programs for every multiprocessor: of those with 4 warps two are resident at once, and one loads while the other
# multiplies; of those with 8 warps the second begins where the first ends.
PROGRAMS_PER_PROCESSOR = 2


@dataclass(frozen=True, slots=True)
class LatentAttentionConfig:
    block_t: int  # tokens of a tile
    block_v: int  # latents of V that one program sums; further ones are other programs', which repeat the scores
    block_f: int  # latent keys: rotated pairs of a head at a time; dense keys: coordinates of a head
    block_r: int  # latent keys: rank block, and step over the rank if streamed
    num_warps: int
    num_stages: int
    streamed: bool = False  # any rank, a tile of latents being read again for every key head; else up to block_r


@dataclass(frozen=True, slots=True)
class CombineConfig:
    block_s: int  # splits at a time
    block_d: int  # coordinates of the output of one program
    block_r: int  # latents at a time
    num_warps: int
    num_stages: int


COMBINE = CombineConfig(block_s=32, block_d=64, block_r=64, num_warps=4, num_stages=2)

# In every table, by increasing blocks: the first one that holds the ranks serves, else the last.
# Dense keys are read at the memory's rate: 64 tokens of 128 coordinates are 16 KiB, and stages keep them coming.
DENSE_16 = (
    LatentAttentionConfig(64, 64, 128, 64, num_warps=4, num_stages=3),
    LatentAttentionConfig(64, 256, 128, 64, num_warps=4, num_stages=2),
)
DENSE_16_SM_90 = (
    DENSE_16[0],
    LatentAttentionConfig(64, 256, 128, 64, num_warps=8, num_stages=3),
    LatentAttentionConfig(64, 512, 128, 64, num_warps=8, num_stages=2),
)
# Rows of U_K are read once a tile by every program: the taller the tile, the less they weigh.
LATENT_16_SM_90 = (
    LatentAttentionConfig(128, 64, 32, 64, num_warps=8, num_stages=3),
    LatentAttentionConfig(128, 128, 32, 64, num_warps=8, num_stages=2, streamed=True),
)
# Elsewhere taller or wider tiles spill.
LATENT_16 = (
    LatentAttentionConfig(64, 64, 16, 64, num_warps=4, num_stages=2),
    LatentAttentionConfig(64, 128, 16, 32, num_warps=4, num_stages=2, streamed=True),
)
# gfx942 holds masks in scalar registers, of which a second stage would take more than there are.
LATENT_16_GFX942 = (LatentAttentionConfig(32, 64, 16, 32, num_warps=4, num_stages=1, streamed=True),)
# 32-bit: without TF32 the products run on the ordinary units with their operands in registers, hence small tiles; on
# each architecture those of a few that do not spill.
DENSE_32 = (LatentAttentionConfig(32, 64, 32, 32, num_warps=4, num_stages=2),)
DENSE_32_SM_80 = (LatentAttentionConfig(32, 64, 32, 32, num_warps=8, num_stages=2),)
LATENT_32 = (LatentAttentionConfig(32, 32, 16, 16, num_warps=4, num_stages=1, streamed=True),)
LATENT_32_SM_90 = (LatentAttentionConfig(32, 32, 16, 32, num_warps=8, num_stages=1, streamed=True),)
LATENT_32_GFX942 = (LatentAttentionConfig(32, 64, 16, 32, num_warps=4, num_stages=1, streamed=True),)


def choose(rank_k: int | None, rank_v: int, itemsize: int, architecture: Architecture) -> LatentAttentionConfig:
    """The configuration for these ranks; rank_k None: dense keys."""
    table = _table(rank_k is not None, itemsize, architecture)
    for config in table[:-1]:
        if rank_v <= config.block_v and (rank_k is None or rank_k <= config.block_r):
            return config
    return table[-1]


def shipped(itemsize: int, architecture: Architecture) -> Iterator[tuple[bool, LatentAttentionConfig]]:
    """Every configuration that `choose` can return, and whether it is for latent keys."""
    for latent in (False, True):
        for config in _table(latent, itemsize, architecture):
            yield latent, config


def candidates(rank_k: int | None, itemsize: int, architecture: Architecture) -> tuple[LatentAttentionConfig, ...]:
    """What is worth timing on a device for this rank of keys, the shipped ones first; all compile without a spill."""
    latent = rank_k is not None
    table = _table(latent, itemsize, architecture)
    if itemsize == 2:
        table += _MORE_16.get((latent, architecture), ())
    return tuple(config for config in table if rank_k is None or config.streamed or rank_k <= config.block_r)


def _table(latent: bool, itemsize: int, architecture: Architecture) -> tuple[LatentAttentionConfig, ...]:
    if itemsize == 2:
        if not latent:
            return DENSE_16_SM_90 if architecture == "sm_90" else DENSE_16
        return {"sm_90": LATENT_16_SM_90, "gfx942": LATENT_16_GFX942}.get(architecture, LATENT_16)
    if not latent:
        return DENSE_32_SM_80 if architecture == "sm_80" else DENSE_32
    return {"sm_90": LATENT_32_SM_90, "gfx942": LATENT_32_GFX942}.get(architecture, LATENT_32)


_MORE_16: dict[tuple[bool, Architecture], tuple[LatentAttentionConfig, ...]] = {
    (False, "sm_90"): (
        LatentAttentionConfig(64, 64, 128, 64, num_warps=4, num_stages=4),
        LatentAttentionConfig(128, 64, 128, 64, num_warps=4, num_stages=2),
        LatentAttentionConfig(128, 64, 128, 64, num_warps=8, num_stages=3),
        DENSE_16[1],
    ),
    (True, "sm_90"): (
        LatentAttentionConfig(128, 64, 32, 64, num_warps=8, num_stages=2),
        LatentAttentionConfig(64, 128, 32, 64, num_warps=8, num_stages=2, streamed=True),
        LATENT_16[1],
    ),
}


def rows_per_program(group_rows: int) -> int:
    """Query rows of a program: those of as many key heads as fit the block, or a full block."""
    return BLOCK_H // group_rows * group_rows if group_rows <= BLOCK_H else BLOCK_H


def splits_for(tokens: int, programs: int, config: LatentAttentionConfig, processors: int) -> int:
    """Splits of the tokens: enough programs for every multiprocessor, none without a tile. Known before any length."""
    tiles = -(-tokens // config.block_t)
    return min(tiles, max(1, PROGRAMS_PER_PROCESSOR * processors // programs))
