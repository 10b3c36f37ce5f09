"""Timing contenders against each other: in turn, round by round, so that a drift of the machine hits all alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from spd.provenance import versions


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


@dataclass(frozen=True)
class Comparison:
    """Timings of all contenders, and each one's time relative to the first (median of the ratios round by round)."""

    timings: dict[str, Timing]
    ratios: dict[str, Timing]


def compare(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int = 20, at_least: float = 2e-3, warmup: int = 3
) -> Comparison:
    """Time every contender once a round, each call repeated until it takes `at_least` seconds."""
    repeats = {}
    for name, call in contenders.items():
        for _ in range(warmup):
            call()
        once = _seconds(call, 1)
        repeats[name] = max(1, round(at_least / max(once, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            seconds[name].append(_seconds(contenders[name], repeats[name]))
    first = seconds[names[0]]
    return Comparison(
        {name: Timing.of(values) for name, values in seconds.items()},
        {name: Timing.of([a / b for a, b in zip(values, first, strict=True)]) for name, values in seconds.items()},
    )


def machine() -> dict[str, object]:
    """What a figure has to be read with."""
    return {
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "processor": _processor(),
        "versions": versions(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
