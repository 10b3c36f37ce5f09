"""The intervals behind accuracies and means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Z_95 = 1.959963984540054
# Student's t at 97.5 % for 1, 2, ... degrees of freedom; beyond, Z_95 + 2.4 / freedom is right to 0.01.
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)


def wilson_interval(correct: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927); z = 1.96 gives 95 %.

    The bound at an end of the scale is that end itself, where the formula would leave the rounding of its last step.
    """
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == n else centre + half
    return low, high


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of two values or more, and the ends of its 95 % interval by Student's t."""
    freedom = len(values) - 1
    t = T_95[freedom - 1] if freedom <= len(T_95) else Z_95 + 2.4 / freedom
    middle = statistics.fmean(values)
    half = t * statistics.stdev(values) / len(values) ** 0.5
    return middle, middle - half, middle + half
