"""The figures of the report, as SVG text to put into a page (or saved as files by the command line)."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import cycle
from typing import TYPE_CHECKING, Any, ParamSpec

from spd.errors import InputError
from spd.shown import visible
from spd.subspace import Subspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
PANELS_A_ROW = 4
INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
SIDE_COLOUR = {"k": "#2563eb", "v": "#d97706"}
ARM_COLOUR = {"base": "#9aa5b1", "projected": "#7c9fd6", "self-training": "#e3b36b", "ssd": "#b7791f", "spd": "#1d4ed8"}
OTHER_COLOURS = ("#0f766e", "#be185d", "#7c3aed", "#4d7c0f", "#b91c1c", "#0369a1", "#a16207", "#475569")
"""Of arms with options, in the order in which they come."""


P = ParamSpec("P")


def _as_svg(draw: Callable[P, Figure]) -> Callable[P, str]:
    @wraps(draw)
    def svg(*args: P.args, **kwargs: P.kwargs) -> str:
        return svg_text(draw(*args, **kwargs))

    return svg


def svg_text(figure: Figure) -> str:
    """A figure as an `svg` element to put into a page, without a control in any of its labels."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return visible(text[text.index("<svg") :])


def blank_figure(width: float, height: float, panels: int = 1, *, sharey: bool = True) -> tuple[Figure, list[Any]]:
    """`panels` axes, at most PANELS_A_ROW side by side; `width` and `height` are one panel's, in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {
        "font.size": 9,
        "font.family": "sans-serif",
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "svg.fonttype": "none",
        "svg.hashsalt": "spd",
    }
    columns = min(panels, PANELS_A_ROW)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flat)
    for empty in axes[panels:]:
        empty.remove()
    axes = axes[:panels]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def plain_label(name: str) -> str:
    """A name as matplotlib shows it as it is, at a length that a legend can hold."""
    name = "".join(each if each.isprintable() else "�" for each in name).replace("$", r"\$")
    return name if len(name) <= 28 else f"{name[:13]}…{name[-14:]}"


def spectra_figure(subspace: Subspace) -> Figure:
    """Singular values relative to the first, one panel a layer, with the rank cut and the energy it keeps."""
    if subspace.derived:
        raise InputError(f"plot: this subspace was made by {subspace.derived} and has no spectra; plot its parents")
    layers = subspace.layers
    figure, axes = blank_figure(3.4 if len(layers) < PANELS_A_ROW else 2.8, 2.8, len(layers))
    for axis, layer in zip(axes, layers, strict=True):
        for side in "kv":
            basis = subspace.side(side)[layer]
            relative = (basis.singular_values / basis.singular_values.max()).clamp(min=1e-12)
            label = f"{side.upper()}: rank {basis.rank} of {basis.width}, {100 * basis.energy():.1f} % energy"
            axis.semilogy(range(1, basis.width + 1), relative, color=SIDE_COLOUR[side], linewidth=1.6, label=label)
            axis.axvline(basis.rank, color=SIDE_COLOUR[side], linewidth=0.9, linestyle=(0, (3, 3)))
        axis.set_title(f"layer {layer}", loc="left", fontsize=9.5, fontweight="bold", pad=30)
        axis.legend(  # above the panel: inside, a spectrum can run anywhere
            frameon=False, fontsize=8, handlelength=1.2, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0
        )
    for axis in axes[-PANELS_A_ROW:]:
        axis.set_xlabel("index")
    for axis in axes[::PANELS_A_ROW]:
        axis.set_ylabel("singular value / first")
    return figure


spectra = _as_svg(spectra_figure)


def arm_colours(arms: Iterable[str]) -> dict[str, str]:
    """A colour for each arm: its own where it has one."""
    others = cycle(OTHER_COLOURS)
    return {arm: ARM_COLOUR.get(arm) or next(others) for arm in arms}


@_as_svg
def training_loss(losses: dict[str, list[dict[str, float]]]) -> Figure:
    figure, (axis,) = blank_figure(3.4, 2.6)
    colours = arm_colours(losses)
    for name, entries in losses.items():
        steps, values = [entry["step"] for entry in entries], [entry["loss"] for entry in entries]
        axis.plot(steps, values, color=colours[name], linewidth=1.6, label=plain_label(name))
    axis.set_title("training loss", loc="left", fontsize=9.5, fontweight="bold")
    axis.set_xlabel("step")
    axis.legend(frameon=False, fontsize=8)
    return figure


def accuracy_groups(metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Capabilities and tests to draw: each capability tested on itself, else on every task that accuracy judges."""
    capabilities = list(dict.fromkeys(score["capability"] for score in metrics if score["capability"]))
    tests = list(dict.fromkeys(score["task"] for score in metrics))
    judged = [test for test in tests if not any("nll" in score for score in metrics if score["task"] == test)]
    return [(name, test) for name in capabilities for test in judged if name == test or name not in tests]


@_as_svg
def accuracy_bars(metrics: list[dict[str, Any]]) -> Figure:
    """Accuracy with its 95 % interval, by the groups of `accuracy_groups`."""
    groups = accuracy_groups(metrics)
    arms = list(dict.fromkeys(score["arm"] for score in metrics))
    colours, step = arm_colours(arms), 0.8 / len(arms)
    figure, (axis,) = blank_figure(min(2.0 + (0.9 + 0.25 * len(arms)) * len(groups), 12), 2.8)
    for position, (capability, test) in enumerate(groups):
        for offset, arm in enumerate(arms):
            score = next(
                s for s in metrics if s["arm"] == arm and s["task"] == test and s["capability"] in (None, capability)
            )
            if score["accuracy"] is None:
                continue
            low, high = score["interval_95"]
            accuracy = 100 * score["accuracy"]
            x = position + (offset - (len(arms) - 1) / 2) * step
            axis.bar(
                x, accuracy, width=0.9 * step, color=colours[arm], label=plain_label(arm) if position == 0 else None
            )
            whiskers = [[max(0.0, accuracy - 100 * low)], [max(0.0, 100 * high - accuracy)]]
            axis.errorbar(x, accuracy, whiskers, color=INK, linewidth=0.9, capsize=2)
    names = [test if capability == test else f"{capability}, on {test}" for capability, test in groups]
    axis.set_xticks(range(len(groups)), list(map(plain_label, names)))
    axis.set_ylabel("accuracy, %")
    axis.set_ylim(0, 100)
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="upper left", bbox_to_anchor=(0, 1.16))
    return figure
