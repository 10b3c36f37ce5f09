"""What is to be done at one layer and side; how is the business of the modes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from spd.errors import InputError
from spd.sites import Projection, Site
from spd.subspace import Subspace

if TYPE_CHECKING:
    from spd.intervention.router import Router

Form = Literal["hook", "fold", "latent_v", "latent"]
LatentMode = Literal["latent_v", "latent"]


@dataclass(frozen=True, eq=False)
class Target:
    """Project this layer's K or V onto the columns of `basis` (d, r)."""

    layer: int
    side: str
    projection: Projection
    basis: Tensor
    attention: nn.Module


@dataclass(frozen=True, eq=False)
class Intervention:
    """What was asked of `attach`, and the mode that does it."""

    mode: Form
    subspace: Subspace | Router
    sides: str
    a: float
    b: float

    def described(self) -> dict[str, Any]:
        """What changes results, as plain data. The modes differ in rounding alone."""
        own = self.subspace
        what = {"subspace": self._sha256} if isinstance(own, Subspace) else own.described()
        return {**what, "sides": self.sides, "a": float(self.a), "b": float(self.b)}

    @cached_property
    def _sha256(self) -> str:
        assert isinstance(self.subspace, Subspace)
        return self.subspace.sha256


def find_targets(sites: dict[int, Site], subspace: Subspace, sides: str) -> list[Target]:
    """What a subspace changes in a model; raises InputError where the two do not go together."""
    targets = []
    for layer in subspace.layers:
        if layer not in sites:
            raise InputError(f"subspace: it has layer {layer}, but the model's layers with K and V are {list(sites)}")
        site = sites[layer]
        for side in sides:
            projection, basis = site.side(side), subspace.side(side)[layer].basis
            if basis.shape[0] != projection.width:
                raise InputError(
                    f"subspace: {side.upper()} of layer {layer} has d = {basis.shape[0]}, "
                    f"but {projection.path} gives {projection.width} features"
                )
            if hasattr(projection.module, "base_layer"):
                raise InputError(
                    f"model: {projection.path} carries an adapter ({type(projection.module).__name__}), whose output "
                    "an intervention on the base layer would miss; merge or unload the adapter first"
                )
            targets.append(Target(layer, side, projection, basis, site.attention))
    return targets
