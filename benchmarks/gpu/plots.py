"""Two figures of results.json: the roofline with every case on it, and every case's share of its bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.case import COMPILED, OURS
from benchmarks.gpu.report import unquotable
from benchmarks.gpu.results import Results, element_type
from benchmarks.gpu.targets import median
from spd.files import atomic_file
from spd_kernels.roofline import Machine, Work

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOFLINE, SHARES = "roofline.png", "shares.png"
INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
COLOURS = ("#1d4ed8", "#d97706", "#059669", "#be185d", "#7c3aed", "#0e7490")
KIND_COLOURS = {OURS: "#1d4ed8", "baseline": "#9aa5b1", COMPILED: "#e3b36b"}


def write(folder: Path, results: Results) -> None:
    """Draw what there is; nothing without rows or without the device's rates."""
    rows, machine = results.data.get("cases", []), results.machine
    if not rows or machine is None:
        return
    for name, figure in ((ROOFLINE, roofline(rows, machine)), (SHARES, shares(rows, machine))):
        _caption(figure, results.data)
        with atomic_file(folder / name) as path:
            figure.savefig(path, format="png", dpi=140)


def roofline(rows: Sequence[Mapping[str, Any]], machine: Machine) -> Figure:
    """FLOPs a second against FLOPs a byte: ours filled, the plain formula hollow, a line between the two."""
    figure = _figure(9.0, 5.6)
    axis = figure.subplots()
    kinds = {element_type(row["dtype"]) for row in rows}
    if torch.bfloat16 in kinds:
        kinds -= {torch.float16}  # whose line would lie on the other's
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    lowest, highest = (pick(Work(row["bytes"], row["flops"]).intensity for row in rows) for pick in (min, max))
    ridges = [machine.flops_per_second[dtype] / machine.bytes_per_second for dtype in kinds]
    ends = min(lowest, *ridges) / 3, 3 * max(highest, *ridges)
    for dtype in kinds:
        peak = machine.flops_per_second[dtype]
        ridge = peak / machine.bytes_per_second
        axis.plot(
            [ends[0], ridge, ends[1]],
            [ends[0] * machine.bytes_per_second, peak, peak],
            color=MUTED,
            linewidth=1.2,
            zorder=1,
        )
        name = str(dtype).removeprefix("torch.")
        text = f"{name}: {peak / 1e12:.3g} TFLOP/s"
        axis.annotate(text, (ends[1], peak), ha="right", va="bottom", color=MUTED, fontsize=8)
    foot = ends[0] * 1.2
    axis.annotate(
        f"{machine.bytes_per_second / 1e12:.3g} TB/s",
        (foot, foot * machine.bytes_per_second),
        xytext=(4, -12),
        textcoords="offset points",
        color=MUTED,
        fontsize=8,
    )
    for row in rows:
        colour = COLOURS[operations.index(row["operation"]) % len(COLOURS)]
        work = Work(row["bytes"], row["flops"])
        variant = "graph" if row["decode"] else "calls"
        rates = []
        for name, face in ((OURS, colour), (row["baseline"], "white")):
            if (seconds := median(row, name, variant)) is not None:
                rates.append(work.flops / seconds)
                marker = "s" if row["decode"] else "o"
                axis.plot(work.intensity, rates[-1], marker, color=colour, markerfacecolor=face, zorder=3)
        axis.plot([work.intensity] * len(rates), rates, color=colour, linewidth=0.8, alpha=0.5, zorder=2)
    for number, operation in enumerate(operations):
        axis.plot([], [], "o", color=COLOURS[number % len(COLOURS)], label=operation)
    axis.plot([], [], "s", color=MUTED, label="few rows, in a CUDA graph")
    axis.plot([], [], "o", color=MUTED, markerfacecolor="white", label="the plain formula")
    axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte that must move", ylabel="FLOPs a second")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.set_title(f"Roofline: {machine.name}, its two rates measured", loc="left", color=INK)
    _quiet(axis)
    return figure


def shares(rows: Sequence[Mapping[str, Any]], machine: Machine) -> Figure:
    """One group of bars a case: the share of the bound that ours, the plain formula and the compiled one reach."""
    figure = _figure(9.0, 1.2 + 0.42 * len(rows))
    axis = figure.subplots()
    for place, row in enumerate(rows):
        variant = "graph" if row["decode"] else "calls"
        work, dtype = Work(row["bytes"], row["flops"]), element_type(row["dtype"])
        bars = {OURS: OURS, "baseline": row["baseline"], COMPILED: COMPILED}
        for offset, (kind, name) in zip((-0.27, 0.0, 0.27), bars.items(), strict=True):
            seconds = median(row, name, variant) or (median(row, name, "calls") if kind == COMPILED else None)
            if seconds is None:
                continue
            share = 100 * machine.share(work, dtype, seconds)
            axis.barh(place + offset, share, height=0.25, color=KIND_COLOURS[kind])
            if kind == OURS:
                axis.annotate(
                    f"{share:.0f} %",
                    (share, place + offset),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
    axis.set_yticks(range(len(rows)), [f"{row['operation']}: {row['case']}" for row in rows], fontsize=7)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.axvline(100, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
    axis.set_xlabel("share of the bound, %")
    for kind, label in ((OURS, OURS), ("baseline", "the plain formula"), (COMPILED, "torch.compile, max-autotune")):
        axis.barh([0], [0], color=KIND_COLOURS[kind], label=label)
    figure.legend(frameon=False, fontsize=8, loc="outside lower right", ncols=3)
    figure.suptitle(f"Share of the bound on {machine.name}; few rows in a CUDA graph", x=0.01, ha="left", color=INK)
    _quiet(axis)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _quiet(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)


def _caption(figure: Figure, data: Mapping[str, Any]) -> None:
    """What forbids quoting the figure, if anything does."""
    warnings = ["Rehearsal on a CPU: times mean nothing."] if data["rehearsal"] else []
    warnings += [reason] if (reason := unquotable(data)) else []
    if warnings:
        figure.text(0.5, 0.5, "\n".join(warnings), ha="center", va="center", fontsize=16, color="#b91c1c", alpha=0.35)
