"""The figures: nothing overlaps, nothing is lost, and the ends of a scale can be drawn."""

import pytest
import torch

from spd.arms import DEFAULT_ARMS as ARMS
from spd.plots import PANELS_A_ROW, accuracy_bars, spectra, spectra_figure
from spd.stats import wilson_interval
from spd.subspace import Basis, Subspace


def made_subspace(layers, d=1024):
    basis = Basis(torch.eye(d)[:, : d // 2], torch.logspace(0, -6, d, dtype=torch.float64))
    return Subspace(dict.fromkeys(range(layers), basis), dict.fromkeys(range(layers), basis))


@pytest.mark.parametrize("layers", [1, 2, 4, 6, 28])
def test_every_layer_has_its_panel_and_room_for_its_legend(layers):
    figure = spectra_figure(made_subspace(layers))
    figure.draw_without_rendering()
    assert [axis.get_title(loc="left") for axis in figure.axes] == [f"layer {layer}" for layer in range(layers)]
    assert {axis.get_subplotspec().get_gridspec().ncols for axis in figure.axes} == {min(layers, PANELS_A_ROW)}
    legends = [axis.get_legend().get_window_extent() for axis in figure.axes]
    for number, legend in enumerate(legends):
        assert not any(legend.overlaps(other) for other in legends[:number])
        assert not any(legend.overlaps(axis.get_window_extent()) for axis in figure.axes)
        assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width
    assert sum(bool(axis.get_xlabel()) for axis in figure.axes) == min(layers, PANELS_A_ROW)


def test_a_figure_is_svg_text():
    svg = spectra(made_subspace(2, d=8))
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    assert "K: rank 4 of 8" in svg


@pytest.mark.parametrize("correct", [0, 1, 99, 100])
def test_bars_at_the_ends_of_the_scale(correct):
    scores = [
        {
            "capability": None if arm == "base" else "gsm8k",
            "arm": arm,
            "task": "gsm8k",
            "accuracy": correct / 100,
            "interval_95": list(wilson_interval(correct, 100)),
        }
        for arm in ARMS
    ]
    assert accuracy_bars(scores).startswith("<svg")
    for score in scores:  # as an earlier version of wilson_interval wrote them: off by a rounding
        score["interval_95"] = [correct / 100 + 1e-12, correct / 100 - 1e-12]
    assert accuracy_bars(scores).startswith("<svg")
