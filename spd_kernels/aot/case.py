"""One kernel in one configuration, as its launcher would specialise it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from spd_kernels.launch import Architecture

DTYPES = ("bf16", "fp16", "fp32", "tf32")  # tf32: fp32 operands whose products TF32 is allowed for
SIXTEEN_BIT = ("bf16", "fp16")
# Every operation with kernels; each has a module `cases` with `cases(architecture, dtypes, *, every=False)`.
OPERATIONS = ("project", "routed", "covariance", "rope", "latent_attention")


@dataclass(frozen=True)
class Case:
    """A kernel, its compile-time constants, and what is known of its arguments for contiguous, aligned operands.

    Arguments are pointers to `dtype` where their name ends in `_ptr`, else 32-bit integers, unless `types` says
    otherwise ("*i64", "*u8", "fp32", ...). Pointers and integers are multiples of 16, save those in `unaligned`.
    """

    kernel: str  # "module:function" within spd_kernels
    dtype: str  # of DTYPES
    configuration: str  # what the table calls it; with kernel and dtype it names the case
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    tall: bool = False  # a product with at least 64 rows, which Hopper's and Blackwell's matrix units take whole
    matrix: bool = True  # has a tile product, so that 16-bit operands must reach the tensor cores
    types: Mapping[str, str] = field(default_factory=dict)
    ones: frozenset[str] = frozenset()  # strides that are 1, which the launcher's call makes constants
    unaligned: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return self.kernel.partition(":")[2]

    @property
    def element(self) -> str:
        return "fp32" if self.dtype == "tf32" else self.dtype

    @property
    def precision(self) -> str:
        """What the launcher passes as PRECISION."""
        return "tf32" if self.dtype == "tf32" else "ieee"

    def function(self) -> Any:
        """The jitted kernel."""
        module, _, function = self.kernel.partition(":")
        return getattr(import_module(f"spd_kernels.{module}"), function)


def cases(
    architecture: Architecture,
    dtypes: Sequence[str] = DTYPES,
    *,
    operations: Sequence[str] = OPERATIONS,
    every: bool = False,
) -> Iterator[Case]:
    """What all operations' launchers launch on an architecture; `every` adds the variants that the table leaves out."""
    for operation in operations:
        yield from import_module(f"spd_kernels.{operation}.cases").cases(architecture, dtypes, every=every)
