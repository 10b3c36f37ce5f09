"""The numbers of the explorer: energies, how subspaces and layers lie to one another, gradients by token, scores."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd.comparison import SiteComparison
from spd.errors import InputError
from spd.explorer.token_gradients import TokenGradients
from spd.files import read_json
from spd.subspace import Basis, Subspace, choose_rank

FORMAT = 1
PARTS = ("prompt", "completion", "S")


@dataclass(frozen=True)
class Pair:
    """Two subspaces, site by site; `refused` says why they cannot be compared, where they cannot."""

    a: str
    b: str
    sites: tuple[SiteComparison, ...]
    refused: str

    def of_side(self, side: str) -> list[SiteComparison]:
        return [site for site in self.sites if site.side == side]


@dataclass(frozen=True)
class Score:
    """What one arm scores on one test: accuracy in %, or NLL in nats a token.

    `difference` is from the base model, positive where better, and `p` of a paired test where the file has outcomes.
    """

    value: float
    interval: tuple[float, float]
    n: int
    metric: str
    difference: float | None
    p: float | None


@dataclass(frozen=True)
class Transfer:
    """Scores by what an arm was trained for: `scores[arm, trained for][test]`."""

    tests: list[str]
    scores: dict[tuple[str, str | None], dict[str, Score]]


def read_subspaces(folders: Sequence[str | Path]) -> dict[str, Subspace]:
    """Subspaces by the shortest ends of their folders' names that tell them apart.

    Raises:
        InputError: a folder is given twice, or holds no subspace.
    """
    parts = [Path(folder).resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise InputError(f"subspaces: a folder is named twice in {', '.join(map(str, folders))}")
    shown = [each[:-1] if each[-1] == "subspace" and len(each) > 2 else each for each in parts]
    shown = shown if len(set(shown)) == len(shown) else parts
    count = 1
    while len({each[-count:] for each in shown}) < len(shown):
        count += 1
    return {
        "/".join(name[-count:]): Subspace.from_pretrained(folder) for name, folder in zip(shown, folders, strict=True)
    }


def pairs(subspaces: Mapping[str, Subspace]) -> list[Pair]:
    """Every two of the subspaces: seconds to minutes where there are many wide layers."""
    found = []
    for a, b in combinations(subspaces, 2):
        try:
            found.append(Pair(a, b, subspaces[a].compare(subspaces[b]).sites, ""))
        except InputError as refusal:
            found.append(Pair(a, b, (), str(refusal)))
    return found


def sites(subspace: Subspace) -> list[tuple[str, int]]:
    """All K in the order of the layers, then all V."""
    return [(side, layer) for side in "kv" for layer in subspace.layers]


def between_layers(subspace: Subspace) -> Tensor:
    """Overlap of every two sites of one subspace, in the order of `sites`; NaN where widths differ.

    tr(P Q) / min(r, s), from the projectors: many layers cost one matrix product each, not one for every pair.
    """
    bases = [subspace.side(side)[layer] for side, layer in sites(subspace)]
    overlap = torch.full((len(bases), len(bases)), math.nan, dtype=torch.float64)
    for width in {basis.width for basis in bases}:
        of_width = [index for index, basis in enumerate(bases) if basis.width == width]
        projectors = torch.stack([(bases[i].basis @ bases[i].basis.T).flatten() for i in of_width])
        ranks = torch.tensor([bases[i].rank for i in of_width], dtype=torch.float64)
        traces = (projectors @ projectors.T).double() / torch.minimum(ranks[:, None], ranks[None, :])
        overlap[torch.tensor(of_width)[:, None], torch.tensor(of_width)[None, :]] = traces.clamp(0.0, 1.0)
    return overlap


def cumulative_energy(basis: Basis) -> Tensor:
    """Share of the squared singular values in the first 1, 2, ..., d directions."""
    squares = basis.singular_values.double().square()
    return squares.cumsum(0) / squares.sum()


def shares(tokens: Sequence[TokenGradients], side: str) -> dict[str, Any]:
    """Where the squared norm of the gradients lies, every example counting as much as its gradient is large.

    Returns:
        For each part of the text, its `tokens` and its `share` of the squared norm; and `half`, the least share of the
        tokens that holds half of it.
    """
    squares: dict[str, list[float]] = {part: [] for part in PARTS}
    for each in tokens:
        for position, norm in enumerate(each.total(side)):
            squares[each.part(position)].append(norm * norm)
    values = sorted((value for part in squares.values() for value in part), reverse=True)
    whole = math.fsum(values) or 1.0
    reached, count = 0.0, 0
    while reached < 0.5 * whole and count < len(values):
        reached, count = reached + values[count], count + 1
    parts = {part: {"tokens": len(of), "share": math.fsum(of) / whole} for part, of in squares.items()}
    return {"parts": parts, "half": count / max(1, len(values))}


def read_metrics(path: str | Path) -> Transfer:
    """The scores in a run's `metrics.json`, a reproduction's `results.json`, or the folder of either.

    Raises:
        InputError: there is no such file, or it is neither.
    """
    path = Path(path)
    if os.path.isdir(path):
        found = [path / name for name in ("metrics.json", "results.json") if (path / name).is_file()]
        if not found:
            raise InputError(f"metrics: {path} holds neither metrics.json nor results.json")
        path = found[0]
    elif not os.path.isfile(path):
        raise InputError(f"metrics: expected a file or a run folder, there is no {path}")
    return transfer(read_json(path), str(path))


def transfer(content: Any, named: str = "metrics") -> Transfer:
    """`read_metrics` of what is read already."""
    try:
        if isinstance(content, Mapping):
            return _from_results(content)
        return _from_metrics(content)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise InputError(f"{named}: expected a run's metrics or a reproduction's results ({error!r})") from None


def _from_metrics(rows: Sequence[Mapping[str, Any]]) -> Transfer:
    scores: dict[tuple[str, str | None], dict[str, Score]] = {}
    base = {row["task"]: row for row in rows if row["capability"] is None and row["arm"] == "base"}
    for row in rows:
        if row.get("nll") is not None:
            metric, value, interval = "nll", row["nll"], row["nll_interval_95"]
        elif row["accuracy"] is None:
            continue
        else:
            metric, value, interval = "accuracy", 100 * row["accuracy"], [100 * end for end in row["interval_95"]]
        against = base.get(row["task"])
        difference = None
        if against is not None and row["arm"] != "base":
            difference = against["nll"] - value if metric == "nll" else value - 100 * against["accuracy"]
        n = row["nll_n"] if metric == "nll" else row["n"]
        score = Score(value, (interval[0], interval[1]), n, metric, difference, None)
        scores.setdefault((row["arm"], row["capability"]), {})[row["task"]] = score
    if not scores:
        raise ValueError("no score in it")
    return Transfer(list(dict.fromkeys(row["task"] for row in rows)), scores)


def _from_results(content: Mapping[str, Any]) -> Transfer:
    from spd.reproduce.summary import Outcomes, better_by, paired_p

    outcomes = {
        (cell["arm"], cell["capability"], cell["test"]): Outcomes.read(cell["outcomes"]) for cell in content["cells"]
    }
    scores: dict[tuple[str, str | None], dict[str, Score]] = {}
    for (arm, capability, test), of in outcomes.items():
        if ":" in arm:  # settings of an arm have their own tables in the report of the reproduction
            continue
        base = outcomes.get(("base", None, test)) if arm != "base" else None
        difference, p = (better_by(of, base), paired_p(of, base)) if base else (None, None)
        score = Score(of.value, of.interval, of.n, of.metric, difference, p)
        scores.setdefault((arm, capability), {})[test] = score
    if not scores:
        raise ValueError("no score in it")
    return Transfer(list(dict.fromkeys(test for row in scores.values() for test in row)), scores)


def explore_json(
    subspaces: Mapping[str, Subspace],
    *,
    tokens: Sequence[TokenGradients] | None = None,
    metrics: Transfer | None = None,
    compared: Sequence[Pair] | None = None,
) -> dict[str, Any]:
    """Everything that the page shows, as plain JSON values; arguments as of `explore`."""
    check(subspaces)
    compared = pairs(subspaces) if compared is None else compared
    found: dict[str, Any] = {
        "format": FORMAT,
        "subspaces": {name: _subspace_data(subspace) for name, subspace in subspaces.items()},
        "between_subspaces": [
            {"a": pair.a, "b": pair.b, "refused": pair.refused, "sites": [each.to_dict() for each in pair.sites]}
            for pair in compared
        ],
    }
    if tokens:
        found["tokens"] = {
            "shares": {side: shares(tokens, side) for side in "kv"},
            "examples": [
                {
                    "index": each.index,
                    "tokens": [each.text[start:end] for start, end in each.offsets],
                    "in_s": each.counted,
                    "norms": {f"{side}.{layer}": _rounded(norms) for (side, layer), norms in each.norms.items()},
                }
                for each in tokens
            ],
        }
    if metrics:
        found["transfer"] = [
            {"arm": arm, "trained_for": capability, "test": test} | vars(score)
            for (arm, capability), row in metrics.scores.items()
            for test, score in row.items()
        ]
    return found


def _subspace_data(subspace: Subspace) -> dict[str, Any]:
    overlap = between_layers(subspace)
    return {
        "provenance": subspace.provenance,
        "sites": [
            {"layer": layer, "side": side} | _site_data(subspace.side(side)[layer], subspace.derived is None)
            for layer in subspace.layers
            for side in "kv"
        ],
        "between_layers": {
            "sites": [f"{side}.{layer}" for side, layer in sites(subspace)],
            "overlap": [[None if math.isnan(x) else round(x, 6) for x in row] for row in overlap.tolist()],
        },
    }


def _site_data(basis: Basis, spectrum_known: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"width": basis.width, "rank": basis.rank}
    if spectrum_known:
        found["energy"] = basis.energy()
        found["rank_95"] = choose_rank("energy:0.95", basis.singular_values)
        found["singular_values"] = _rounded(basis.singular_values.tolist())
    return found


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def check(subspaces: Mapping[str, Subspace]) -> None:
    if not isinstance(subspaces, Mapping) or not subspaces:
        raise InputError(f"subspaces: expected a mapping of names to at least one subspace, got {subspaces!r:.80}")
    for name, subspace in subspaces.items():
        if not isinstance(name, str) or not isinstance(subspace, Subspace):
            raise InputError(f"subspaces: expected names and subspaces, got {name!r:.80}: {type(subspace).__name__}")
