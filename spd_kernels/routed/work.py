"""The bound of the routed projection."""

from __future__ import annotations

from collections.abc import Sequence

from spd_kernels.roofline import Work


def routed_work(rows: Sequence[int], index: Sequence[int], ranks: Sequence[int], d: int, itemsize: int) -> Work:
    """Sequence b has rows[b] rows and goes through subspace index[b], of rank ranks[index[b]]; -1 leaves it alone.

    x is read and y written once, and each subspace that occurs is read once. A row left alone is moved, not multiplied.
    The indices are not counted: 8 bytes a sequence, or packed a row, against 2 d itemsize.
    """
    moved = 2.0 * sum(rows) * d * itemsize
    bases = sum(ranks[s] for s in set(index) if s >= 0) * d * itemsize
    flops = sum(4.0 * n * d * ranks[s] for n, s in zip(rows, index, strict=True) if s >= 0)
    return Work(moved + bases, flops)
