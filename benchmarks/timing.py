"""Timing contenders against each other: in turn, round by round, so that a drift of the machine hits all alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from spd.provenance import versions
from spd_kernels.roofline import Machine

FEWEST_ROUNDS = 5

Call = Callable[[], object]
Clock = Callable[[Call, int], float]  # seconds a call, over so many calls in a row


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over rounds, and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        if len(seconds) < 2:
            return cls(seconds[0], seconds[0], seconds[0])
        deciles = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(statistics.median(seconds), deciles[0], deciles[-1])

    def __mul__(self, factor: float) -> Timing:
        return Timing(self.median * factor, self.p10 * factor, self.p90 * factor)


@dataclass(frozen=True)
class Comparison:
    """Timings of all contenders, and each one's time relative to the first (median of the ratios round by round)."""

    seconds: dict[str, list[float]]  # of a call, round by round

    @cached_property
    def timings(self) -> dict[str, Timing]:
        return {name: Timing.of(values) for name, values in self.seconds.items()}

    @cached_property
    def ratios(self) -> dict[str, Timing]:
        return {name: self.relative(name, next(iter(self.seconds))) for name in self.seconds}

    def relative(self, name: str, other: str) -> Timing:
        """Time of the one over that of the other in the same round."""
        return Timing.of([a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)])


def wall_clock(call: Call, repeats: int) -> float:
    """For calls that are done when they return."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def compare(
    contenders: Mapping[str, Call],
    *,
    rounds: int = 20,
    at_least: float = 2e-3,
    at_most: float = float("inf"),
    warmup: int = 3,
    clock: Clock = wall_clock,
) -> Comparison:
    """Time every contender once a round, each call repeated until it takes `at_least` seconds.

    After `at_most` seconds of wall-clock time no further round begins, though there are always FEWEST_ROUNDS.
    """
    repeats = {}
    for name, call in contenders.items():
        for _ in range(warmup):
            call()
        repeats[name] = max(1, round(at_least / max(clock(call, 1), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    end = time.monotonic() + at_most
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and time.monotonic() > end:
            break
        for name in names if number % 2 == 0 else reversed(names):
            seconds[name].append(clock(contenders[name], repeats[name]))
    return Comparison(seconds)


def measure_cpu(*, copy_bytes: int = 256 * 2**20, side: int = 2048) -> Machine:
    """This machine's two rates with PyTorch's present number of threads: the bound of the CPU tables."""
    source, target = torch.ones(copy_bytes // 4), torch.empty(copy_bytes // 4)
    p, q = torch.randn(side, side), torch.randn(side, side)
    copy = min(wall_clock(lambda: target.copy_(source), 1) for _ in range(7))
    product = min(wall_clock(lambda: p @ q, 1) for _ in range(5))
    return Machine(processor(), 2 * copy_bytes / copy, {torch.float32: 2 * side**3 / product})


def machine() -> dict[str, object]:
    """What a figure has to be read with."""
    return {
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "processor": processor(),
        "versions": versions(),
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
