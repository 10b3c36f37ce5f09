"""The memory benchmark at a tiny shape: calibration's is flat, that of all rows is not, and the count is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import memory

TIMES = 128  # batches: 16384 rows of 4 KiB


@pytest.mark.slow
def test_calibration_is_flat_and_keeping_all_rows_is_not(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    ours, kept = (memory.in_a_process(method, "tiny", (2, TIMES)) for method in memory.METHODS)
    assert [each["rows"] for each in ours] == [each["rows"] for each in kept] == [256, 128 * TIMES]
    every_row = 128 * TIMES * memory.computed(memory.SHAPES["tiny"], 1, 8, 4)["row"]
    assert kept[1]["bytes"] - kept[0]["bytes"] > 0.9 * every_row
    assert ours[1]["bytes"] - ours[0]["bytes"] < 0.2 * every_row
    assert ours[1]["first"] == pytest.approx(kept[1]["first"], rel=1e-3)  # both did the work


def test_what_is_computed_is_what_the_parts_take():
    shape = memory.SHAPES["tiny"]
    plain = memory.computed(shape, 4, 64, 63)
    with_checkpoints = memory.computed(shape, 4, 64, 63, gradient_checkpointing=True)
    model = memory.model_of(shape)
    assert plain["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    assert plain["row"] == 4 * 256 * 4
    assert plain["sums"] == 4 * 8 * (256 * 256 + 256 + 1)
    assert with_checkpoints["pass"] < plain["pass"]
    assert memory.computed(shape, 8, 64, 63)["pass"] == pytest.approx(2 * plain["pass"], rel=0.05)


def test_bytes_are_counted_while_they_are_referred_to():
    """By hand: what is made lives until it is dropped, a view costs nothing, weights are not counted."""
    layer = torch.nn.Linear(16, 16, bias=False)
    with memory.Alive(layer) as alive, torch.no_grad():
        x = torch.ones(8, 16)
        y = layer(x)
        view = y[2:]
        assert alive.now == 2 * 8 * 16 * 4
        del x
        assert alive.now == 8 * 16 * 4
        del y
        assert alive.now == 8 * 16 * 4
        del view
    assert (alive.now, alive.most) == (0, 2 * 8 * 16 * 4)


def test_the_figure_and_the_tables(tmp_path):
    part = {"weights": 2**30, "pass": 2**20, "sums": 2**20, "row": 2**10}
    found = {method: [{"rows": 2.0**n, "bytes": 2.0**20} for n in (8, 10)] for method in memory.METHODS}
    memory.draw(tmp_path / "memory.png", {"shape": "tiny", "measured": found, "whole": {"plain": part}}, "a machine")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    whole, measured = memory.whole_table(part, part), memory.measured_table("tiny", found, part)
    assert (whole.row_count, measured.row_count) == (3, 2)
    assert "keep all rows, without the SVD" in [column.header for column in whole.columns]
    assert "keep all rows, with the SVD, MiB" in [column.header for column in measured.columns]
