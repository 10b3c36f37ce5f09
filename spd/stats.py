"""The intervals behind accuracies and means, and the tests behind differences."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054
# Student's t at 97.5 % for 1, 2, ... degrees of freedom; beyond, Z_95 + 2.4 / freedom is right to 0.01.
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)


def wilson_interval(correct: float, n: int, z: float = Z_95) -> tuple[float, float]:
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


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """sum(a) / sum(b) over two independent pairs or more, and the ends of its 95 % interval.

    Linearised: R + (a_i - R b_i) / mean(b) is averaged over i as if R were known (Cochran 1977, section 6.3). With
    equal b it is the interval of a mean.
    """
    ratio = math.fsum(numerators) / math.fsum(denominators)
    scale = statistics.fmean(denominators)
    return mean_interval([ratio + (a - ratio * b) / scale for a, b in zip(numerators, denominators, strict=True)])


def paired_test(differences: Sequence[Sequence[int]]) -> float:
    """Two-sided p that an arm and the base answer equally well, by flipping the signs of whole questions, exactly.

    The statistic is T = sum_q s_q, where s_q is the sum of one question's differences over seeds. Under the null each
    s_q is as likely as -s_q; seeds of a question share the sign, because they are not independent. p = P(|T| >= |T
    observed|), from the distribution of sum_q +-s_q by convolution. With one seed it is McNemar's exact test.

    Args:
        differences: for every question, over seeds, arm right minus base right: -1, 0 or 1.
    """
    sums = [sum(each) for each in differences]
    spans = Counter(abs(each) for each in sums if each)  # how many questions moved by so much
    distribution = np.ones(1)  # of T, on -span, -span + 2, ..., span
    for step, count in spans.items():
        flips = np.array([binomial / 2**count for binomial in _binomials(count)])
        spread = np.zeros(step * count + 1)
        spread[::step] = flips
        distribution = np.convolve(distribution, spread)
    span = len(distribution) - 1
    reached = np.abs(2 * np.arange(span + 1) - span) >= abs(sum(sums))
    return min(1.0, float(distribution[reached].sum()))


def paired_mean_test(differences: Sequence[float]) -> float:
    """Two-sided p of the paired t-test that differences (one for each independent text, two or more) have mean zero.

    Student's distribution with n - 1 degrees of freedom in its finite form (Abramowitz and Stegun 26.7.3 and 26.7.4),
    right to about 1e-13.
    """
    spread = statistics.stdev(differences)
    mean = statistics.fmean(differences)
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    freedom = len(differences) - 1
    angle = math.atan(mean / spread * math.sqrt(len(differences) / freedom))
    sine, cosine = math.sin(abs(angle)), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    series = 0.0
    for k in range(2 + odd, freedom + 1, 2):
        series += term
        term *= (k - 1) / k * cosine * cosine
    inside = 2 / math.pi * (abs(angle) + sine * series) if odd else sine * series
    return min(1.0, max(0.0, 1.0 - inside))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p (1979): those below alpha may be called so, with alpha for any error among all of them."""
    adjusted, reached = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda each: ps[each])):
        reached = max(reached, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = reached
    return adjusted


def _binomials(n: int) -> list[int]:
    """n choose 0, ..., n choose n."""
    row = [1]
    for k in range(n):
        row.append(row[-1] * (n - k) // (k + 1))
    return row
