"""The stage that tunes: every candidate configuration beside the frozen one. It proposes; nothing is changed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Contender, Tuning, in_turn
from benchmarks.gpu.contest import first_line
from benchmarks.gpu.measure import Rig, Truth, rotating
from benchmarks.timing import Call, compare
from spd.files import write_json
from spd_kernels import launch

FILE = "tuning.json"
ROUNDS = 10
# A proposal has to gain more than this, and its 90th percentile has to lie below the frozen choice's median.
WORTH = 0.03
MOST_COMPILERS = 8
REHEARSED = 1  # candidates beside the frozen choice in a rehearsal


def run(rig: Rig, cases: Sequence[Case], folder: Path, seconds: float, only: str) -> None:
    """Try the candidates of all cases until the time is used up; tuning.json grows case by case."""
    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    if rig.device.type == "cuda":
        _compile_in_parallel(folder, seconds / 2, only)
    for case in in_turn(case for case in cases if case.tuning is not None):
        if time.monotonic() > end:
            left_out.append(case.name)
            continue
        try:
            rows.append(tune(rig, case, end))
        except Exception as error:  # out of memory, say: the other cases go on
            left_out.append(f"{case.name} ({first_line(error)})")
            continue
        write_json(folder / FILE, {"cases": rows, "not_tuned": left_out})
        print(f"  {case.name}: {summary(rows[-1])}", flush=True)
    write_json(folder / FILE, {"cases": rows, "not_tuned": left_out})


def configurations(case: Case, device: torch.device) -> tuple[Tuning, list[Any]]:
    """The frozen choice first, then the other candidates."""
    assert case.tuning is not None
    tuning = case.tuning(launch.architecture(device))
    others = [config for config in tuning.candidates if config != tuning.frozen]
    return tuning, [tuning.frozen, *others[: None if device.type == "cuda" else REHEARSED]]


def tune(rig: Rig, case: Case, end: float) -> dict[str, Any]:
    """One row of tuning.json."""
    tuning, configs = configurations(case, rig.device)
    sets = rig.sets(case, rig.copies(case))
    tried: list[dict[str, Any]] = []
    calls: dict[str, Call] = {}
    with torch.no_grad():
        truth = Truth(case, sets[0])
        for number, config in enumerate(configs):
            entry: dict[str, Any] = {"config": asdict(config), "text": repr(config), "frozen": number == 0}
            tried.append(entry)
            if time.monotonic() > end and number > 0:
                entry["note"] = "not tried: out of time"
                continue
            try:
                calls[str(number)] = _ready(rig, case, tuning.launch(config), sets, truth, entry)
            except Exception as error:  # too much shared memory, a compiler's error: this candidate is out
                entry["note"] = first_line(error)
        inner = len(sets) if case.decode else 1
        if "0" in calls:
            rounds = min(ROUNDS, rig.rounds)
            found = compare(calls, rounds=rounds, at_least=rig.at_least / 2, warmup=rig.warmup, clock=rig.clock)
            for name, timing in found.timings.items():
                tried[int(name)]["seconds"] = asdict(timing * (1 / inner))
    del sets, calls, truth
    if rig.device.type == "cuda":
        torch.cuda.empty_cache()
    return {"operation": case.operation, "case": case.label, "tried": tried} | conclusion(tried)


def _ready(
    rig: Rig, case: Case, contender: Contender, sets: Sequence[Any], truth: Truth, entry: dict[str, Any]
) -> Call:
    """A call to time. Right first: a candidate whose result is wrong raises."""
    entry["error"] = truth.error(contender)
    if not entry["error"] <= truth.allowed:  # written so that NaN fails
        raise ArithmeticError(f"wrong result: error {entry['error']:.2e}, allowed {truth.allowed:.2e}")
    return rig.capture(contender, sets) if case.decode else rotating(contender, sets)


def conclusion(tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best of the configurations that ran, and a proposal if it is worth one."""
    ran = [entry for entry in tried if "seconds" in entry]
    frozen = next((entry for entry in ran if entry["frozen"]), None)
    if frozen is None:
        return {"best": None, "gain": None, "proposal": None}
    best = min(ran, key=lambda entry: entry["seconds"]["median"])
    gain = 1 - best["seconds"]["median"] / frozen["seconds"]["median"]
    clear = gain > WORTH and best["seconds"]["p90"] < frozen["seconds"]["median"]
    return {"best": best["text"], "gain": gain, "proposal": best["text"] if clear else None}


def summary(row: dict[str, Any]) -> str:
    ran = sum("seconds" in entry for entry in row["tried"])
    if row["gain"] is None:
        return f"the frozen choice did not run: {row['tried'][0].get('note', '')}"
    verdict = (
        f"proposes {row['proposal']}, {100 * row['gain']:.1f} % faster" if row["proposal"] else "the frozen choice"
    )
    return f"{ran} of {len(row['tried'])} ran; {verdict}"


def _compile_in_parallel(folder: Path, seconds: float, only: str) -> None:
    """Fill Triton's cache from several processes: compiling, not timing, is what takes long."""
    count = max(1, min(MOST_COMPILERS, (os.cpu_count() or 2) // 2))
    command = [sys.executable, "-m", "benchmarks.gpu.child", "compile", str(folder), str(seconds)]
    command += ["--only", only, "--of", str(count)]
    children = [subprocess.Popen([*command, "--share", str(share)]) for share in range(count)]
    end = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    print(f"  candidates compiled by {count} processes", flush=True)


def compile_share(rig: Rig, cases: Sequence[Case], share: int, of: int, seconds: float) -> None:
    """Launch every `of`-th candidate once."""
    end = time.monotonic() + seconds
    for number, (case, tuning, config) in enumerate(_all(rig, cases)):
        if number % of == share and time.monotonic() < end:
            try:
                tuning.launch(config)(*rig.sets(case, 1)[0])
                torch.cuda.synchronize()
            except Exception:  # the tuner meets it again and reports it
                continue


def _all(rig: Rig, cases: Sequence[Case]) -> Iterator[tuple[Case, Tuning, Any]]:
    for case in in_turn(cases):
        if case.tuning is not None:
            tuning, configs = configurations(case, rig.device)
            for config in configs:
                yield case, tuning, config
