"""One self-contained page about subspaces: no script, nothing from elsewhere, everything escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from spd.comparison import SiteComparison
from spd.explorer import figures
from spd.explorer.numbers import PARTS, Pair, Transfer, check, pairs, shares
from spd.explorer.token_gradients import TokenGradients
from spd.files import atomic_file
from spd.plots import svg_text
from spd.record import without_hash_lists
from spd.report import page_environment
from spd.span_preview import characters
from spd.spectrum import site_rows
from spd.stats import holm
from spd.subspace import Subspace

EXAMPLES = 6
"""With their text on the page; the shares count all."""
LEVELS = 9
DPI = 160
ALPHA = 0.05
LEAST_SCALE = {"accuracy": 10.0, "nll": 0.05}
"""Full colour of a difference at the least, so that noise does not glare."""
PART_NAMES = {"prompt": "the prompt", "completion": "the completion outside S", "S": "S, what the loss is taken over"}


@dataclass(frozen=True)
class Piece:
    """Characters of one token and how strongly they are coloured (0 to LEVELS), or of text that no token stands for."""

    text: str
    level: int
    counted: bool
    hint: str


def explore(
    subspaces: Mapping[str, Subspace],
    *,
    tokens: Sequence[TokenGradients] | None = None,
    metrics: Transfer | None = None,
    compared: Sequence[Pair] | None = None,
    tokens_of: str = "",
    title: str = "Subspaces",
) -> str:
    """The page, as HTML.

    Args:
        subspaces: one or more, by the names to show.
        tokens: of `token_gradients`, for the model and examples behind one of them; the first few are shown.
        metrics: of `read_metrics`.
        compared: of `pairs`, where it is there already.
        tokens_of: which examples and model the tokens are of, in words.
        title: of the page.

    Raises:
        InputError: there is no subspace, or it is none.
    """
    check(subspaces)
    environment = page_environment()
    environment.filters["characters"] = characters
    compared = pairs(subspaces) if compared is None else compared
    return environment.get_template("explorer.html").render(
        title=title,
        names=list(subspaces),
        glance=[_glance(name, subspace) for name, subspace in subspaces.items()],
        svg={name: svg_text(figure) for name, figure in figures.figures(subspaces, compared).items()},
        derived={name: subspace.derived for name, subspace in subspaces.items() if subspace.derived},
        compared=[row for pair in compared if not pair.refused for row in _pair_rows(pair)],
        refused=[pair for pair in compared if pair.refused],
        angles_drawn=figures.MOST_PAIRS,
        pairs=sum(not pair.refused for pair in compared),
        few=len({layer for subspace in subspaces.values() for layer in subspace.layers}) <= figures.FEW,
        sites=_sites(subspaces),
        calibrated=[name for name, subspace in subspaces.items() if subspace.derived is None],
        tokens=_tokens(tokens) if tokens else None,
        tokens_of=tokens_of,
        transfer=_transfer(metrics) if metrics else None,
        provenance=_provenance(subspaces),
    )


def write_figures(
    folder: str | Path, subspaces: Mapping[str, Subspace], *, compared: Sequence[Pair] | None = None
) -> list[Path]:
    """Every figure of the page as a PNG file in `folder`."""
    check(subspaces)
    written = []
    for name, figure in figures.figures(subspaces, pairs(subspaces) if compared is None else compared).items():
        path = Path(folder) / f"{name}.png"
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight")
        written.append(path)
    return written


def _glance(name: str, subspace: Subspace) -> dict[str, Any]:
    rows = site_rows(subspace)
    of_side = {side: [row for row in rows if row.site.endswith(side.upper())] for side in "kv"}
    return {
        "name": name,
        "model": subspace.provenance.get("model", "not recorded"),
        "layers": subspace.layers,
        "width": _span([row.width for row in rows]),
        "rank": _span([row.rank for row in rows]),
        "energy": {
            s: _span([round(100 * row.energy, 1) for row in of if row.energy is not None]) for s, of in of_side.items()
        },
        "rank_95": {s: _span([row.rank_95 for row in of if row.rank_95 is not None]) for s, of in of_side.items()},
        "examples": subspace.provenance.get("examples", "–"),
        "target_tokens": subspace.provenance.get("target_tokens", "–"),
    }


def _span(values: Sequence[float]) -> str:
    if not values:
        return "–"
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}–{high}"


def _pair_rows(pair: Pair) -> list[dict[str, Any]]:
    """Side by side of a pair: means over its layers."""

    def row(side: str, found: list[SiteComparison]) -> dict[str, Any]:
        overlaps = [100 * each.overlap for each in found]
        return {
            "pair": pair,
            "side": side.upper(),
            "overlap": fmean(overlaps),
            "range": _span([round(value) for value in overlaps]),
            "chance": 100 * fmean(each.by_chance for each in found),
            "smallest": min(each.angles[0] for each in found),
            "median": fmean(median(each.angles) for each in found),
            "largest": max(each.angles[-1] for each in found),
            "distance": fmean(each.distance for each in found),
        }

    return [row(side, pair.of_side(side)) for side in "kv"]


def _sites(subspaces: Mapping[str, Subspace]) -> list[dict[str, Any]]:
    """A row a layer and side with an entry, or None, for every subspace whose spectra are known."""
    known = {name: subspace for name, subspace in subspaces.items() if subspace.derived is None}
    found = [{row.site: row for row in site_rows(subspace)} for subspace in known.values()]
    layers = sorted({layer for subspace in known.values() for layer in subspace.layers})
    names = [f"layer {layer} {side}" for layer in layers for side in "KV"]
    return [{"site": site, "rows": [of.get(site) for of in found]} for site in names]


def _tokens(tokens: Sequence[TokenGradients]) -> dict[str, Any]:
    whole = {side: shares(tokens, side) for side in "kv"}
    counts = {part: whole["k"]["parts"][part]["tokens"] for part in PARTS}
    return {
        "count": len(tokens),
        "layers": sorted({layer for _, layer in tokens[0].norms}),
        "parts": [
            {
                "name": PART_NAMES[part],
                "tokens": counts[part],
                "of_tokens": counts[part] / sum(counts.values()),
                "share": {side: whole[side]["parts"][part]["share"] for side in "kv"},
            }
            for part in PARTS
        ],
        "half": {side: whole[side]["half"] for side in "kv"},
        "examples": [
            {"index": each.index, "tokens": len(each.offsets), "sides": {side: pieces(each, side) for side in "kv"}}
            for each in tokens[:EXAMPLES]
        ],
        "levels": LEVELS,
    }


def pieces(example: TokenGradients, side: str) -> list[Piece]:
    """The text in pieces whose level is the token's norm over the largest of the example."""
    norms = example.total(side)
    largest = max(norms, default=0.0) or 1.0
    whole = math.fsum(norm * norm for norm in norms) or 1.0
    spans: list[tuple[int, int, list[int]]] = []
    shown = 0
    for position, (start, end) in enumerate(example.offsets):
        if start < end and end <= shown and spans:
            spans[-1][2].append(position)  # another token of a character that is shown already
        elif start < end:
            if start > shown:
                spans.append((shown, start, []))
            spans.append((max(start, shown), end, [position]))
            shown = end
    if shown < len(example.text):
        spans.append((shown, len(example.text), []))
    found = []
    for start, end, positions in spans:
        square = sum(norms[position] ** 2 for position in positions)
        counted = any(position in example.counted for position in positions)
        hint = (
            f"norm {square**0.5:.3g}, {100 * square / whole:.1f} % of the example's squared norm" if positions else ""
        )
        level = min(LEVELS, round(LEVELS * square**0.5 / largest))
        found.append(Piece(example.text[start:end], level, counted, hint))
    return found


def _transfer(metrics: Transfer) -> dict[str, Any]:
    """Rows of cells. A difference is beyond chance if its p, adjusted over the table (Holm 1979), is below 5 %."""
    tested = [score for row in metrics.scores.values() for score in row.values() if score.p is not None]
    adjusted = dict(zip(map(id, tested), holm([score.p for score in tested if score.p is not None]), strict=True))
    largest = dict(LEAST_SCALE)
    for row in metrics.scores.values():
        for score in row.values():
            largest[score.metric] = max(largest[score.metric], abs(score.difference or 0.0))

    def cell(row: Mapping[str, Any], test: str) -> dict[str, Any] | None:
        score = row.get(test)
        if score is None:
            return None
        strength = abs(score.difference or 0.0) / largest[score.metric]
        return {
            "score": score,
            "beyond": adjusted.get(id(score), 1.0) < ALPHA,
            "background": "" if not score.difference else ("better" if score.difference > 0 else "worse"),
            "strength": round(0.75 * strength, 3),
        }

    arms = list(dict.fromkeys(arm for arm, _ in metrics.scores))
    counts = {test: {row[test].n for row in metrics.scores.values() if test in row} for test in metrics.tests}
    return {
        "tests": [{"name": test, "n": min(of) if len(of) == 1 else None} for test, of in counts.items()],
        "paired": bool(tested),
        "rows": [
            {"arm": arm, "trained_for": capability or "", "cells": [cell(row, test) for test in metrics.tests]}
            for (arm, capability), row in sorted(metrics.scores.items(), key=lambda item: arms.index(item[0][0]))
        ],
    }


def _provenance(subspaces: Mapping[str, Subspace]) -> list[dict[str, Any]]:
    """Every key that any of them has, nested ones with a dot, and whether they differ in it."""
    flat = [dict(_flattened(without_hash_lists(subspace.provenance))) for subspace in subspaces.values()]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    rows = []
    for key in keys:
        values = [each.get(key, "–") for each in flat]
        rows.append({"key": key, "values": values, "differ": len(set(values)) > 1})
    return rows


def _flattened(value: Mapping[Any, Any], before: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            found += _flattened(item, f"{before}{key}.")
        elif isinstance(item, (list, tuple)) and any(isinstance(each, Mapping) for each in item):
            found += _flattened(dict(enumerate(item)), f"{before}{key}.")
        elif isinstance(item, (list, tuple)):
            found.append((f"{before}{key}", ", ".join(map(str, item)) or "none"))
        else:
            found.append((f"{before}{key}", str(item)))
    return found
