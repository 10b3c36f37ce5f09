"""The bound of the projected, normed and rotated keys."""

from __future__ import annotations

from spd_kernels.roofline import Work


def rope_work(
    n_rows: int,
    d: int,
    rank: int,
    head_dim: int,
    itemsize: int,
    *,
    angle_rows: int | None = None,
    angles: int | None = None,
    angle_itemsize: int | None = None,
    norm: bool = False,
) -> Work:
    """k read and y (or its place in the cache) written once, U, two tables of angles and the norm's weight read once.

    The tables have `angle_rows` rows (fewer than n_rows where sequences share theirs; None: as many) of `angles`
    numbers (head_dim // 2 where memory holds one a pair; None: head_dim). Norm and rotation are not counted as FLOPs:
    they take some 10 an element, against 4 rank of the products.
    """
    table = (n_rows if angle_rows is None else angle_rows) * (head_dim if angles is None else angles)
    moved = (2.0 * n_rows * d + d * rank + norm * head_dim) * itemsize
    return Work(moved + 2.0 * table * (itemsize if angle_itemsize is None else angle_itemsize), 4.0 * n_rows * d * rank)
