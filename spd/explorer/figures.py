"""The figures of the explorer: few layers have a panel each, many are lines or rows of one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spd.explorer.numbers import Pair, between_layers, cumulative_energy, sites
from spd.plots import GRID, INK, MUTED, blank_figure, plain_label
from spd.subspace import Basis, Subspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 4
"""Layers that get a panel each; more share one."""
MOST_PAIRS = 6
"""Whose principal angles are drawn; all are in the JSON."""
COLOURS = ("#1d4ed8", "#c2570c", "#0f766e", "#be185d", "#7c3aed", "#4d7c0f")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (7, 2)), (0, (2, 1)))
WIDTH = 10.6
"""Of a whole figure, in inches: the width of the page."""
FLOOR = 1e-8


def figures(subspaces: Mapping[str, Subspace], compared: Sequence[Pair]) -> dict[str, Figure]:
    """Every figure that these subspaces and their pairs give, by name."""
    drawn: dict[str, Figure] = {}
    calibrated = {name: subspace for name, subspace in subspaces.items() if subspace.derived is None}
    if calibrated:
        drawn |= {"spectra": spectra_figure(calibrated), "energy": energy_figure(calibrated)}
    comparable = [pair for pair in compared if not pair.refused]
    if comparable:
        drawn["overlap"] = overlap_figure(comparable)
        drawn["angles"] = angles_figure(comparable[:MOST_PAIRS])
    drawn["layers"] = layers_figure(subspaces)
    return drawn


def spectra_figure(subspaces: Mapping[str, Subspace]) -> Figure:
    """Singular values relative to the first, with the rank cut."""

    def curve(basis: Basis) -> np.ndarray:
        values = basis.singular_values.double().numpy()
        return np.maximum(values / values.max(), FLOOR)

    figure, axes = _curves(subspaces, curve, "singular value / first")
    lowest = min(float(line.get_ydata().min()) for axis in axes for line in axis.lines)
    for axis in axes:
        axis.set_yscale("log")
        axis.set_ylim(0.7 * lowest, 1.5)
    return figure


def energy_figure(subspaces: Mapping[str, Subspace]) -> Figure:
    """Cumulative share of the squared singular values, with the rank cut and 95 %."""
    figure, axes = _curves(subspaces, lambda basis: 100 * cumulative_energy(basis).numpy(), "energy, %")
    for axis in axes:
        axis.axhline(95, color=MUTED, lw=0.9, ls=(0, (1, 2)))
        axis.annotate(
            "95 %", (1, 95), xycoords=("axes fraction", "data"), ha="right", va="top", fontsize=7.5, color=MUTED
        )
        axis.set_ylim(0, 103)
    return figure


def _curves(subspaces: Mapping[str, Subspace], curve: Any, label: str) -> tuple[Figure, list[Any]]:
    """One line a basis over the index of its directions; a dot where the rank cuts it."""
    layers = sorted({layer for subspace in subspaces.values() for layer in subspace.layers})
    if len(layers) <= FEW:
        return _curves_by_layer(subspaces, layers, curve, label)
    return _curves_by_depth(subspaces, layers, curve, label)


def _curves_by_layer(
    subspaces: Mapping[str, Subspace], layers: list[int], curve: Any, label: str
) -> tuple[Figure, list[Any]]:
    """A panel a side and layer, a colour a subspace."""
    from matplotlib.lines import Line2D

    panels = [(side, layer) for layer in layers for side in "kv"]
    figure, axes = _panels(len(panels), 2.3, columns=4)
    for axis, (side, layer) in zip(axes, panels, strict=True):
        for number, subspace in enumerate(subspaces.values()):
            if layer in subspace.layers:
                style = {"color": COLOURS[number % len(COLOURS)], "ls": DASHES[number % len(DASHES)]}
                _line(axis, subspace.side(side)[layer], curve, **style)
        _title(axis, f"{side.upper()}, layer {layer}")
    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], ls=DASHES[i % len(DASHES)], label=plain_label(name))
        for i, name in enumerate(subspaces)
    ]
    handles.append(Line2D([], [], color=INK, ls="none", marker="o", markersize=4, label="rank cut"))
    figure.legend(handles=handles, frameon=False, fontsize=8.5, ncols=len(handles), loc="outside upper left")
    _edge_labels(axes, "direction", label, columns=4)
    return figure, axes


def _curves_by_depth(
    subspaces: Mapping[str, Subspace], layers: list[int], curve: Any, label: str
) -> tuple[Figure, list[Any]]:
    """A panel a side and subspace, a shade a layer."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    panels = [(name, side) for name in subspaces for side in "kv"]
    figure, axes = _panels(len(panels), 2.6, columns=2)
    shade = ScalarMappable(Normalize(layers[0], layers[-1]), _depths())
    for axis, (name, side) in zip(axes, panels, strict=True):
        for layer, basis in sorted(subspaces[name].side(side).items()):
            _line(axis, basis, curve, color=shade.to_rgba(np.array([layer]))[0], lw=1.1)
        _title(axis, f"{plain_label(name)}: {side.upper()}" if len(subspaces) > 1 else side.upper())
    bar = figure.colorbar(shade, ax=axes, shrink=0.8, aspect=30, pad=0.01)
    bar.set_label("layer; dots: rank cut")
    bar.outline.set_visible(False)
    _edge_labels(axes, "direction", label, columns=2)
    return figure, axes


def _line(axis: Any, basis: Basis, curve: Any, color: Any, **style: Any) -> None:
    values = curve(basis)
    axis.plot(np.arange(1, len(values) + 1), values, color=color, **({"lw": 1.6} | style))
    axis.plot(basis.rank, values[basis.rank - 1], "o", color=color, markersize=4, zorder=3, mec="white", mew=0.5)


def overlap_figure(compared: Sequence[Pair]) -> Figure:
    """Overlap of every pair, layer by layer, from orthogonal (white) to one inside the other."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    layers = sorted({each.layer for pair in compared for each in pair.sites})
    figure, axes = _panels(2, 0.85 + 0.34 * len(compared), columns=2)
    scale = Normalize(0, 100)
    for axis, side in zip(axes, "kv", strict=True):
        values = np.full((len(compared), len(layers)), math.nan)
        for row, pair in enumerate(compared):
            for each in pair.of_side(side):
                values[row, layers.index(each.layer)] = 100 * each.overlap
        _grid(axis, values, scale, numbers=len(layers) <= 8)
        _ticks(axis.set_xticks, [str(layer) for layer in layers])
        axis.set_yticks(range(len(compared)), [_pair_name(pair) for pair in compared] if side == "k" else [])
        axis.set_xlabel("layer")
        _title(axis, side.upper())
    bar = figure.colorbar(ScalarMappable(scale, _heat()), ax=axes, aspect=12, pad=0.01, ticks=(0, 50, 100))
    bar.set_label("overlap, %")
    bar.outline.set_visible(False)
    return figure


def angles_figure(compared: Sequence[Pair]) -> Figure:
    """Principal angles of every pair: a row a layer, ascending from left to right."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    panels = [(pair, side) for pair in compared for side in "kv"]
    most = max(len(pair.of_side("k")) for pair in compared)
    figure, axes = _panels(len(panels), 0.8 + (0.26 if most <= FEW else 0.075) * most, columns=2)
    shade = ScalarMappable(Normalize(0, 90), _heat().reversed())
    for axis, (pair, side) in zip(axes, panels, strict=True):
        found = pair.of_side(side)
        values = np.full((len(found), max(len(each.angles) for each in found)), math.nan)
        for row, each in enumerate(found):
            values[row, : len(each.angles)] = each.angles
        _grid(axis, values, shade.norm, colours=shade.cmap, lines=False)
        axis.set_xticks(
            np.linspace(0, values.shape[1] - 1, 3).round(), np.linspace(1, values.shape[1], 3).round().astype(int)
        )
        _ticks(axis.set_yticks, [str(each.layer) for each in found])
        _title(axis, f"{side.upper()}: {_pair_name(pair)}")
    _edge_labels(axes, "angle, ascending", "layer", columns=2)
    bar = figure.colorbar(shade, ax=axes, aspect=12 if len(panels) == 2 else 25, pad=0.01, ticks=(0, 45, 90))
    bar.set_label("degrees")
    bar.outline.set_visible(False)
    return figure


def layers_figure(subspaces: Mapping[str, Subspace]) -> Figure:
    """Overlap of every two sites of one subspace: K of all layers, then V."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    columns = min(3, max(2, len(subspaces)))
    figure, axes = _panels(len(subspaces), WIDTH / columns - (0.2 if columns == 3 else 1.0), columns=columns)
    scale = Normalize(0, 100)
    for axis, (name, subspace) in zip(axes, subspaces.items(), strict=True):
        labels = [f"{side.upper()}{layer}" for side, layer in sites(subspace)]
        _grid(axis, 100 * between_layers(subspace).numpy(), scale, numbers=len(labels) <= 8)
        axis.set_aspect("equal")
        _ticks(axis.set_xticks, labels)
        _ticks(axis.set_yticks, labels)
        if len(labels) > 8:
            middle = len(subspace.layers) - 0.5
            axis.axhline(middle, color=INK, lw=0.8)
            axis.axvline(middle, color=INK, lw=0.8)
        _title(axis, plain_label(name))
    bar = figure.colorbar(ScalarMappable(scale, _heat()), ax=axes, aspect=25, pad=0.02, shrink=0.7, ticks=(0, 50, 100))
    bar.set_label("overlap, %")
    bar.outline.set_visible(False)
    return figure


def _panels(count: int, height: float, columns: int) -> tuple[Figure, list[Any]]:
    """Axes in rows of `columns`; together they are as wide as the page."""
    figure, _ = blank_figure(1, 1)  # for its looks
    figure.clear()
    rows = math.ceil(count / columns)
    figure.set_size_inches(WIDTH * min(columns, count) / columns + (count < columns), height * rows + 0.25)
    axes = list(figure.subplots(rows, min(columns, count), squeeze=False).flat)
    for empty in axes[count:]:
        empty.remove()
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes[:count]


def _grid(
    axis: Any, values: np.ndarray, scale: Any, *, numbers: bool = False, colours: Any = None, lines: bool = True
) -> None:
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.imshow(values, norm=scale, cmap=colours or _heat(), aspect="auto", interpolation="nearest")
    if lines and max(values.shape) <= 16:
        for position in range(1, values.shape[1]):
            axis.axvline(position - 0.5, color="white", lw=1.2)
        for position in range(1, values.shape[0]):
            axis.axhline(position - 0.5, color="white", lw=1.2)
    if numbers:
        for (row, column), value in np.ndenumerate(values):
            dark = np.isfinite(value) and scale(value) > 0.55
            text = f"{value:.0f}" if np.isfinite(value) else "–"
            axis.text(column, row, text, ha="center", va="center", fontsize=8.5, color="white" if dark else INK)


def _ticks(place: Any, labels: Sequence[str]) -> None:
    step = math.ceil(len(labels) / 16)
    place(range(0, len(labels), step), labels[::step], fontsize=8)


def _edge_labels(axes: Sequence[Any], below: str, left: str, columns: int) -> None:
    for axis in axes[-columns:]:
        axis.set_xlabel(below)
    for axis in axes[::columns]:
        axis.set_ylabel(left)


def _pair_name(pair: Pair) -> str:
    return f"{plain_label(pair.a)} · {plain_label(pair.b)}"


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=9.5, fontweight="bold")


def _heat() -> Any:
    """White to deep blue, of steadily falling lightness, so that it reads in grey."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("heat", ["#f7f8fa", "#bcd0f0", "#6b94dc", "#2556b8", "#12275c"])


def _depths() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("depths", ["#f2b872", "#c2570c", "#8b3a62", "#3b3a8f", "#12275c"])
