"""Whether a measured row meets a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.case import OURS, Target
from spd_kernels.roofline import Machine


@dataclass(frozen=True)
class Verdict:
    """What was reached, and whether that is enough; None where it was not measured."""

    value: float | None
    met: bool | None

    @property
    def text(self) -> str:
        return {None: "not measured", True: "met", False: "MISSED"}[self.met]


def median(row: Mapping[str, Any], contender: str, variant: str) -> float | None:
    """Seconds a call of a contender, or None."""
    timing = row.get("seconds", {}).get(variant, {}).get(contender)
    return None if timing is None else float(timing["median"])


def reached(target: Target, row: Mapping[str, Any], machine: Machine | None) -> float | None:
    """The number that a target compares with its limit."""
    if target.kind == "launches":
        found = row.get("launches", {}).get(OURS)
        return None if found is None else float(found)
    ours = median(row, OURS, target.variant)
    if ours is None:
        return None
    if target.kind == "bandwidth":
        return None if machine is None else row["bytes"] / ours / machine.bytes_per_second
    other = median(row, target.against, target.variant)
    if other is None:
        return None
    return other / ours if target.kind == "faster" else ours / other


def judge(target: Target, row: Mapping[str, Any], machine: Machine | None) -> Verdict:
    value = reached(target, row, machine)
    if value is None:
        return Verdict(None, None)
    at_most = target.kind in ("time", "launches")
    return Verdict(value, value <= target.limit if at_most else value >= target.limit)
