"""What the product computes by another road, written down plainly."""

import math


def mcnemar(b: int, c: int) -> float:
    """Two-sided p of McNemar's exact test: b pairs changed one way and c the other, by fair coins.

    min(1, 2 P(X <= min(b, c))), X binomial with n = b + c and 1/2.
    """
    n = b + c
    tail = sum(math.comb(n, k) for k in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2**n)
