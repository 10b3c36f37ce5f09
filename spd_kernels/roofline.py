"""The bound model: what an operation must move and multiply, and how long a machine takes at least.

Every operation's `work.py` gives its `Work` as a function of its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes moved through device memory, each input read once and each output written once; multiplications and
    additions of tile products, counted apart (a multiply-add is two)."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Work:
        return Work(self.bytes * times, self.flops * times)

    @property
    def intensity(self) -> float:
        """FLOPs a byte: the abscissa of a roofline plot."""
        return self.flops / self.bytes if self.bytes else float("inf")


@dataclass(frozen=True)
class Machine:
    """Two rates of a device: of a large copy (bytes read plus bytes written, a second), and of a large matrix
    product in each element type (FLOPs a second)."""

    name: str
    bytes_per_second: float
    flops_per_second: Mapping[torch.dtype, float]

    def seconds(self, work: Work, dtype: torch.dtype) -> float:
        """The bound: no implementation runs faster from memory."""
        return max(work.bytes / self.bytes_per_second, work.flops / self.flops_per_second[dtype])

    def limit(self, work: Work, dtype: torch.dtype) -> str:
        """Which rate binds: "memory" or "arithmetic"."""
        arithmetic = work.flops / self.flops_per_second[dtype]
        return "arithmetic" if arithmetic > work.bytes / self.bytes_per_second else "memory"

    def share(self, work: Work, dtype: torch.dtype, seconds: float) -> float:
        """Which part of the bound a measured time reaches; above 1 only where operands stay in a cache."""
        return self.seconds(work, dtype) / seconds


# For arithmetic where there is no such device; a benchmark measures its own. The copy and the 16-bit products were
# measured once, with PyTorch and outside this project's benchmarks; fp32 is the vendor's data sheet.
# csrc_notes/README.md says how.
H200 = Machine(
    "NVIDIA H200 (spd_kernels.roofline)",
    4.3e12,
    {torch.bfloat16: 790e12, torch.float16: 790e12, torch.float32: 67e12},
)
