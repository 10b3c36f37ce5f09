"""How far apart two subspaces lie: principal angles at every layer and side, beside what chance would give."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from spd.algebra import principal_angles

if TYPE_CHECKING:
    from spd.subspace import Basis


@dataclass(frozen=True)
class SiteComparison:
    """Two bases at one layer and side.

    Args:
        layer, side: where; the side is "k" or "v".
        width: d.
        ranks: of the one and of the other.
        angles: the min(ranks) principal angles in degrees, ascending.
    """

    layer: int
    side: str
    width: int
    ranks: tuple[int, int]
    angles: tuple[float, ...]

    @property
    def site(self) -> str:
        return f"layer {self.layer} {self.side.upper()}"

    @property
    def distance(self) -> float:
        """Grassmann distance sqrt(sum theta^2) in radians: a metric between spaces of one rank.

        Between different ranks it is the distance to the nearest space that one contains or is contained in, 0 for
        nested ones.
        """
        return math.sqrt(sum(math.radians(angle) ** 2 for angle in self.angles))

    @property
    def overlap(self) -> float:
        """Mean squared cosine of the angles: 1 where one contains the other, 0 where they are orthogonal."""
        return fmean(math.cos(math.radians(angle)) ** 2 for angle in self.angles)

    @property
    def by_chance(self) -> float:
        """The mean of `overlap` for independent, uniformly distributed spaces of these ranks: max(r_a, r_b) / d."""
        return max(self.ranks) / self.width

    def to_dict(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "side": self.side,
            "width": self.width,
            "ranks": list(self.ranks),
            "angles": list(self.angles),
            "distance": self.distance,
            "overlap": self.overlap,
            "by_chance": self.by_chance,
        }


@dataclass(frozen=True)
class Comparison:
    """Two subspaces, site by site in the order of the layers, K before V; and the means over the sites."""

    sites: tuple[SiteComparison, ...]

    @property
    def angle(self) -> float:
        """Mean over the sites of their mean principal angle, in degrees."""
        return fmean(fmean(site.angles) for site in self.sites)

    @property
    def distance(self) -> float:
        return fmean(site.distance for site in self.sites)

    @property
    def overlap(self) -> float:
        return fmean(site.overlap for site in self.sites)

    @property
    def by_chance(self) -> float:
        return fmean(site.by_chance for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        means = {name: getattr(self, name) for name in ("angle", "distance", "overlap", "by_chance")}
        return {"mean": means, "sites": [site.to_dict() for site in self.sites]}


def compare_bases(layer: int, side: str, a: Basis, b: Basis) -> SiteComparison:
    """Compare two bases of one width."""
    angles = principal_angles(a.basis, b.basis).rad2deg().tolist()
    return SiteComparison(layer, side, a.width, (a.rank, b.rank), tuple(angles))
