"""What the launcher of latent attention can launch, for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from spd_kernels.aot.case import SIXTEEN_BIT, Case
from spd_kernels.latent_attention.config import BLOCK_H, COMBINE, LatentAttentionConfig, shipped
from spd_kernels.launch import Architecture

HEAD_DIM = 128
_TYPES = {"positions_ptr": "*i32", "lengths_ptr": "*i32", "scale": "fp32", "eps": "fp32"}
_TYPES |= {f"{name}_ptr": "*fp32" for name in ("cos", "sin", "max", "sum", "z")}
_ONES = frozenset(f"stride_{axis}" for axis in ("kr", "vr", "ur", "cf"))
# Counts that are small or odd, and the stride of the dense keys' heads, which latent keys do not have.
_UNALIGNED = frozenset(
    ("tokens", "table_rows", "n_rows", "queries", "group_rows", "program_rows", "slices", "stride_pb")
)


def cases(architecture: Architecture, dtypes: Sequence[str], *, every: bool = False) -> Iterator[Case]:
    """Every shipped configuration with left padding; `every` adds norms and lengths."""
    for dtype in dtypes:
        itemsize = 2 if dtype in SIXTEEN_BIT else 4
        for latent, config in shipped(itemsize, architecture):
            yield case(dtype, latent, config)
            if every:
                yield case(dtype, latent, config, norm=latent, lengths=True)
        yield Case(
            "latent_attention.kernel:combine_kernel",
            dtype,
            f"{COMBINE.block_s} x {COMBINE.block_d} x {COMBINE.block_r}",
            {
                "WIDE": False,
                "ALL_SPLITS": 256,
                "BLOCK_S": COMBINE.block_s,
                "BLOCK_D": COMBINE.block_d,
                "BLOCK_R": COMBINE.block_r,
            },
            COMBINE.num_warps,
            COMBINE.num_stages,
            matrix=False,
            types={f"{name}_ptr": "*fp32" for name in ("max", "sum", "z")},
            ones=frozenset({"stride_ur"}),
            unaligned=frozenset({"splits", "n_rows", "group_rows"}),
        )


def case(
    dtype: str,
    latent: bool,
    config: LatentAttentionConfig,
    *,
    norm: bool = False,
    lengths: bool = False,
) -> Case:
    blocks = f"{config.block_t} x {config.block_v} x {config.block_f}"
    name = f"latent keys {blocks} x {config.block_r}" + " streamed" * config.streamed if latent else f"keys {blocks}"
    constants: dict[str, Any] = {
        "HEAD_DIM": HEAD_DIM,
        "LATENT": latent,
        "ROTATED": latent,
        "INTERLEAVED": False,
        "HAS_POSITIONS": True,
        "HAS_LENGTHS": lengths,
        "HAS_NORM": norm,
        "RELATIVE": latent and dtype in SIXTEEN_BIT,
        "RESIDENT": not config.streamed,
        "WIDEN": False,
        "PRECISION": "tf32" if dtype == "tf32" else "ieee",
        "WIDE": False,
        "BLOCK_T": config.block_t,
        "BLOCK_H": BLOCK_H,
        "BLOCK_V": config.block_v,
        "BLOCK_F": config.block_f,
        "BLOCK_R": config.block_r,
    }
    variant = " lengths" * lengths + " norm" * norm
    return Case(
        "latent_attention.kernel:latent_attention_kernel",
        dtype,
        name + variant,
        constants,
        config.num_warps,
        config.num_stages,
        tall=config.block_t >= 64,
        types=_TYPES,
        ones=_ONES,
        unaligned=_UNALIGNED | ({"stride_kh"} if latent else set()),
    )
