"""`GradientCovariance` beside keeping all rows and taking their SVD: seconds and peak memory.

Every measurement is a process of its own, so that its peak memory is its own. Rows arrive in chunks, as they would
from calibration batches; making them is not timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from spd_kernels.covariance.work import covariance_work
from spd_kernels.roofline import Machine

METHODS = ("streaming", "keep and SVD")
CHUNK = 2048
SIZES = [(rows, d) for d in (128, 512, 1024) for rows in (10_000, 100_000)]
QUICK_SIZES = [(10_000, 512)]


def chunks(rows: int, d: int) -> Iterator[Tensor]:
    """Rows with a decaying spectrum in rotated directions."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    scaled = torch.logspace(0, -5, d)[:, None] * rotation
    for start in range(0, rows, CHUNK):
        yield torch.randn(min(CHUNK, rows - start), d, generator=generator) @ scaled


def measure(method: str, rows: int, d: int) -> dict[str, float]:
    """Run one method in this process; seconds, and how far its peak resident memory rose, in bytes."""
    from spd_kernels import GradientCovariance

    for _ in chunks(CHUNK, d):  # warm up what making rows needs, and the linear algebra library
        torch.linalg.svd(torch.randn(64, 64))
    warm = GradientCovariance(16)
    warm.update(torch.randn(64, 16))
    warm.eigh()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of imports and warm-up, is forgotten
    before = _kilobytes("VmRSS")
    seconds = 0.0
    covariance, kept = GradientCovariance(d), []
    for chunk in chunks(rows, d):
        start = time.perf_counter()
        if method == "streaming":
            covariance.update(chunk)
        else:
            kept.append(chunk)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    if method == "streaming":
        singular_values, _ = covariance.eigh()
    else:
        gradients = torch.cat(kept)
        kept.clear()
        gradients -= gradients.mean(0)
        _, singular_values, _ = torch.linalg.svd(gradients, full_matrices=False)
    seconds += time.perf_counter() - start
    peak_bytes = 1024 * (_kilobytes("VmHWM") - before)
    return {"seconds": seconds, "peak_bytes": peak_bytes, "first": float(singular_values[0])}


def _kilobytes(field: str) -> int:
    """A field of Linux's account of this process; getrusage would include what the parent had before the exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field + ":")))


def run(machine: Machine, repeats: int, *, quick: bool) -> tuple[list[Table], list[dict[str, Any]]]:
    """Measure every size, or the quick ones, with both methods in turn; a table for people and rows for JSON.

    The bound is that of fp32 rows and products; the sums are made in fp64, at half the rate or less.
    """
    table = Table(title="Singular directions of N gradient rows: seconds and peak memory", title_justify="left")
    for name in (
        "d",
        "N",
        "streaming s",
        "keep and SVD s",
        "times faster",
        "streaming MB",
        "keep and SVD MB",
        "of the bound",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    results = []
    for rows, d in (size for size in SIZES if not quick or size in QUICK_SIZES):
        found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for _ in range(repeats):
            for method in METHODS:
                found[method].append(_in_a_process(method, rows, d))
        seconds = {m: sorted(f["seconds"] for f in found[m])[len(found[m]) // 2] for m in METHODS}
        peaks = {m: max(f["peak_bytes"] for f in found[m]) for m in METHODS}
        share = machine.share(covariance_work(rows, d, 4), torch.float32, seconds["streaming"])
        faster = seconds[METHODS[1]] / seconds[METHODS[0]]
        megabytes = [f"{peaks[method] / 2**20:.0f}" for method in METHODS]
        times = [f"{seconds[method]:.3f}" for method in METHODS]
        table.add_row(str(d), f"{rows:,}", *times, f"{faster:.1f}", *megabytes, f"{100 * share:.0f} %")
        results.append({"d": d, "rows": rows, "measurements": found, "share_of_bound": share})
    return [table], results


def _in_a_process(method: str, rows: int, d: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.covariance", "--method", method, "--rows", str(rows), "--d", str(d)]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One measurement in this process, as JSON.")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--d", type=int, required=True)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.method, arguments.rows, arguments.d)))
