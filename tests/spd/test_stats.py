"""Exact tests and intervals against known values and against plain enumeration."""

import itertools
import math
import random

import pytest
from oracles import mcnemar

from spd.stats import holm, mean_interval, paired_mean_test, paired_test, ratio_interval


@pytest.mark.parametrize(
    ("b", "c", "p"),  # scipy 1.17.1: stats.binomtest(b, b + c).pvalue
    [(1, 5, 0.21875), (10, 3, 0.09228515625), (6, 6, 1.0), (0, 1, 1.0), (0, 0, 1.0), (40, 70, 0.005447429511444476)],
)
def test_the_oracle(b, c, p):
    assert mcnemar(b, c) == mcnemar(c, b) == pytest.approx(p, rel=1e-12)


def test_one_seed_is_mcnemar():
    rng = random.Random(0)
    for n in (1, 2, 7, 60, 1500):
        differences = [[rng.choice((-1, 0, 0, 1))] for _ in range(n)]
        gained, lost = sum(d == [1] for d in differences), sum(d == [-1] for d in differences)
        assert paired_test(differences) == pytest.approx(mcnemar(gained, lost), rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_several_seeds_are_flipped_together(seed):
    rng = random.Random(seed)
    differences = [[rng.choice((-1, 0, 1)) for _ in range(3)] for _ in range(9)]
    sums = [sum(each) for each in differences]
    flipped = [sum(s * x for s, x in zip(sums, signs, strict=True)) for signs in itertools.product((-1, 1), repeat=9)]
    p = sum(abs(each) >= abs(sum(sums)) for each in flipped) / len(flipped)
    assert paired_test(differences) == pytest.approx(p, rel=1e-12)


def test_known_sign_flip_p():
    """scipy 1.17.1: stats.permutation_test((d,), np.sum, permutation_type="samples"), all 256 flips."""
    assert paired_test([[1, 1, 1], [-1], [1, 1], [0], [2], [-2], [1], [3]]) == pytest.approx(0.234375, rel=1e-12)


def test_copies_of_a_seed_are_no_more_evidence():
    """The control: taken as questions of their own, the same three seeds would look like a discovery."""
    differences = [[1, 1, 1]] * 5 + [[-1, -1, -1]]
    assert paired_test(differences) == pytest.approx(mcnemar(5, 1))
    assert paired_test([[each] for question in differences for each in question]) < 0.01 < mcnemar(5, 1)


def test_nothing_changed():
    assert paired_test([[0], [0, 0], [1, -1]]) == 1.0
    assert paired_test([]) == 1.0


@pytest.mark.parametrize(
    (
        "differences",
        "p",
    ),  # scipy 1.17.1: stats.ttest_1samp(differences, 0).pvalue; 1, 2, 3, 4 and 49 degrees of freedom
    [
        ([0.1, 0.4], 0.34404173924526144),
        ([0.1, 0.4, -0.05], 0.37445675782877574),
        ([0.3, -0.1, 0.5, 0.2], 0.16967992890125821),
        ([0.3, -0.1, 0.5, 0.2, 0.05], 0.13872017516352905),
        ([math.sin(i) + 0.2 for i in range(50)], 0.04991411877527195),
    ],
)
def test_paired_mean_test(differences, p):
    assert paired_mean_test(differences) == pytest.approx(p, rel=1e-10)
    assert paired_mean_test([-each for each in differences]) == pytest.approx(p, rel=1e-10)


def test_paired_mean_test_at_its_ends():
    assert paired_mean_test([0.0, 0.0, 0.0]) == 1.0
    assert paired_mean_test([0.5, 0.5, 0.5]) == 0.0
    assert paired_mean_test([-0.5, 0.5]) == 1.0


@pytest.mark.parametrize("n", [2, 3, 6, 19, 40])
def test_the_mean_test_and_the_interval_agree(n):
    """p is 5 % where the interval's end is zero, up to the interval's two digits of t."""
    rng = random.Random(n)
    values = [rng.gauss(0, 1) for _ in range(n)]
    _, low, _ = mean_interval(values)
    assert paired_mean_test([value - low for value in values]) == pytest.approx(0.05, abs=1e-3)


def test_holm():
    """Worked by hand: 4 * 0.005, 3 * 0.01, 2 * 0.03, then not below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_ratio_of_sums():
    assert ratio_interval([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == pytest.approx(mean_interval([0.5, 1.0, 1.5]))
    ratio, low, high = ratio_interval([1.0, 9.0], [1.0, 3.0])
    assert ratio == pytest.approx(10 / 4) and low < ratio < high
    assert ratio_interval([1.0, 3.0, 2.0], [2.0, 6.0, 4.0]) == pytest.approx((0.5, 0.5, 0.5))


def test_the_ratio_interval_covers():
    rng = random.Random(1)
    hits = 0
    for _ in range(400):
        lengths = [rng.randint(5, 40) for _ in range(40)]
        _, low, high = ratio_interval([sum(rng.expovariate(1) for _ in range(n)) for n in lengths], lengths)
        hits += low <= 1.0 <= high
    assert 0.91 <= hits / 400 <= 0.98
