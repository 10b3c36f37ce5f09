"""What is to be done at one layer and side; how is the business of the modes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spd.sites import Projection


@dataclass(frozen=True, eq=False)
class Target:
    """Project this layer's K or V onto the columns of `basis` (d, r)."""

    layer: int
    side: str
    projection: Projection
    basis: Tensor
