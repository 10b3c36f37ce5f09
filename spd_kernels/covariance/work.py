"""What an update must move and multiply."""

from __future__ import annotations

from spd_kernels.roofline import Work


def covariance_work(n_rows: int, d: int, itemsize: int, sites: int = 1) -> Work:
    """Rows read once, the fp64 mean and triangle read and written once; a triangle of products."""
    triangle = d * (d + 1) / 2
    return Work(n_rows * d * itemsize + 2 * 8 * (triangle + d), 2 * n_rows * triangle) * sites
