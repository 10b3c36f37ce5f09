"""Reading a subspace's spectra: ranks and energies as rows of a table, singular values as a line of text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from spd.subspace import Subspace, choose_rank

_BLOCKS = "▁▂▃▄▅▆▇█"
_DECADES = 4.0


@dataclass(frozen=True, eq=False)
class SiteRow:
    """One layer and side: width d, rank kept, share of the squared singular values, rank that would keep 95 %.

    The last three are None for a derived subspace, whose singular values are not known.
    """

    site: str
    width: int
    rank: int
    energy: float | None
    rank_95: int | None
    singular_values: Tensor | None


def site_rows(subspace: Subspace) -> list[SiteRow]:
    rows = []
    for layer in subspace.layers:
        for side in "kv":
            basis = subspace.side(side)[layer]
            site = f"layer {layer} {side.upper()}"
            if subspace.derived:
                rows.append(SiteRow(site, basis.width, basis.rank, None, None, None))
                continue
            rank_95 = choose_rank("energy:0.95", basis.singular_values)
            rows.append(SiteRow(site, basis.width, basis.rank, basis.energy(), rank_95, basis.singular_values))
    return rows


def sparkline(singular_values: Tensor, columns: int = 32) -> str:
    """Singular values as block characters over four decades, sampled evenly if there are more than `columns`."""
    count = min(columns, singular_values.numel())
    picked = [
        float(singular_values[round(i * (singular_values.numel() - 1) / max(1, count - 1))]) for i in range(count)
    ]
    levels = [1 + math.log10(max(value / max(picked), 1e-30)) / _DECADES for value in picked]
    return "".join(_BLOCKS[min(7, max(0, round(7 * level)))] for level in levels)
