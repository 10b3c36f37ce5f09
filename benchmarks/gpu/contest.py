"""The stage that times: every contender of every case in turn, first without torch.compile, then with it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.case import COMPILED, Case, Contender, Inputs, in_turn
from benchmarks.gpu.measure import Rig, Truth, rotating, time_limit
from benchmarks.gpu.results import Results
from benchmarks.timing import Call, compare

# Autotuning of one formula may take this long; what is not done by then is not a contender.
COMPILE_SECONDS, LEAST_COMPILE_SECONDS = 60.0, 5.0


def run(rig: Rig, cases: Sequence[Case], results: Results, seconds: float) -> None:
    """Time the cases until the time is used up; every row is saved once it is there.

    First all of them without torch.compile, the operations in turn; then with it, the most important ones first.
    """
    end = time.monotonic() + seconds
    results.machine = rig.machine()
    results.data["cases"] = []
    left_out = []
    for case in in_turn(cases):
        if time.monotonic() > end:
            left_out.append(case.name)
        else:
            _put(results, rig, case, None)
    for case in (case for case in cases if case.compiled):
        left = end - time.monotonic()
        if left < LEAST_COMPILE_SECONDS:
            left_out.append(f"{case.name}, compiled")
        else:
            _put(results, rig, case, min(left, COMPILE_SECONDS))
    results["not_timed"] = left_out


def _put(results: Results, rig: Rig, case: Case, compile_seconds: float | None) -> None:
    start = time.monotonic()
    row = race(rig, case, compile_seconds)
    if compile_seconds is None or "case" not in row["notes"]:  # else what is there without it stays
        results.put_case(row)
    compiled = ", with torch.compile" if compile_seconds is not None else ""
    failed = f"; {row['notes']['case']}" if "case" in row["notes"] else ""
    print(f"  {case.name}{compiled}: {time.monotonic() - start:.1f} s{failed}", flush=True)


def race(rig: Rig, case: Case, compile_seconds: float | None = None) -> dict[str, Any]:
    """One row of the results: the case, every contender's times, the launches, the error, and notes on what failed.

    With `compile_seconds`, torch.compile of the plain formula is one more contender, if it is ready by then.
    """
    row: dict[str, Any] = {
        "operation": case.operation,
        "case": case.label,
        "dtype": str(case.dtype),
        "bytes": case.work.bytes,
        "flops": case.work.flops,
        "decode": case.decode,
        "baseline": case.baseline,
        "targets": [asdict(target) for target in case.targets],
        "seconds": {},
        "launches": {},
        "notes": {},
    }
    try:
        with torch.no_grad():
            _fill(rig, case, compile_seconds, row)
    except Exception as error:  # out of memory, say: the other cases go on
        row["notes"]["case"] = first_line(error)
    if rig.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _fill(rig: Rig, case: Case, compile_seconds: float | None, row: dict[str, Any]) -> None:
    sets = rig.sets(case, rig.copies(case))
    row["input_sets"] = len(sets)
    contenders = dict(case.contenders)
    if compile_seconds is not None:
        contenders[COMPILED] = rig.compile(contenders[case.baseline], decode=case.decode)
    usable = {
        name: contender
        for name, contender in contenders.items()
        if _succeeds(contender, sets[0], name, row["notes"], compile_seconds if name == COMPILED else None)
    }
    if case.checked in usable:
        truth = Truth(case, sets[0])
        row["error"], row["allowed_error"] = truth.error(usable[case.checked]), truth.allowed
        del truth
    row["seconds"]["calls"] = _times(rig, {name: rotating(usable[name], sets) for name in usable}, 1)
    if case.decode:
        _decode(rig, usable, sets, row)


def _decode(rig: Rig, contenders: dict[str, Contender], sets: Sequence[Inputs], row: dict[str, Any]) -> None:
    """Launches a call, and the time of a call in a graph of one call on every set."""
    graphs: dict[str, Call] = {}
    for name, contender in contenders.items():
        if name == COMPILED:
            row["notes"][f"{name}, graph"] = "its calls already replay Inductor's own CUDA graph"
            continue
        try:
            graphs[name] = rig.capture(contender, sets)
        except Exception as error:  # whatever a contender raises while it is captured
            row["notes"][f"{name}, graph"] = first_line(error)
            continue
        try:
            row["launches"][name] = rig.launches(contender, sets[0])
        except Exception as error:
            row["notes"][f"{name}, launches"] = first_line(error)
    row["seconds"]["graph"] = _times(rig, graphs, len(sets))


def _times(rig: Rig, calls: dict[str, Call], inner: int) -> dict[str, dict[str, float]]:
    """Seconds of each, of calls that stand for `inner` calls."""
    if not calls:
        return {}
    found = compare(calls, rounds=rig.rounds, at_least=rig.at_least, warmup=rig.warmup, clock=rig.clock)
    return {name: asdict(timing * (1 / inner)) for name, timing in found.timings.items()}


def _succeeds(contender: Contender, inputs: Inputs, name: str, notes: dict[str, str], seconds: float | None) -> bool:
    """Whether a first call, which compiles what there is to compile, comes to an end."""
    try:
        with contextlib.nullcontext() if seconds is None else time_limit(seconds):
            contender(*inputs)
    except Exception as error:  # a contender that fails is a line in the report, not the end of the run
        notes[name] = first_line(error)
        return False
    return True


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
