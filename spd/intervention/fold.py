"""Mode `fold`: multiply the projection into the weights, W <- a W + b U Uᵀ W and bias alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spd.intervention.target import Target
from spd.sites import Projection


class Fold:
    """Folds in float64 and casts once; keeps the original weights to put them back."""

    mode: Literal["fold"] = "fold"

    def __init__(self, targets: Sequence[Target], a: float, b: float) -> None:
        self._originals: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for each in targets:
                for parameter in _parameters(each.projection):
                    self._keep(parameter)
                    with torch.no_grad():
                        fold_into(parameter, each.projection, each.basis, a, b)
        except BaseException:
            self.remove()
            raise

    @torch.no_grad()
    def remove(self) -> None:
        for parameter, original in self._originals:
            parameter.copy_(original)
        self._originals.clear()

    def _keep(self, parameter: nn.Parameter) -> None:
        if not any(parameter is kept for kept, _ in self._originals):
            self._originals.append((parameter, parameter.detach().clone()))


def why_not_fold(model: nn.Module, target: Target) -> str | None:
    """The reason, naming the module, why its weights cannot be rewritten; None if they can."""
    projection = target.projection
    kind = type(projection.module)
    if kind not in (nn.Linear, Conv1D):
        return f"{projection.path} is a {kind.__name__}, whose weights cannot be rewritten"
    for parameter in _parameters(projection):
        if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
            return f"{projection.path} holds a {type(parameter.data).__name__}, whose weights cannot be rewritten"
        if parameter.is_meta:
            return f"{projection.path} is offloaded (its weight is on the meta device)"
        if not parameter.is_floating_point():
            return f"{projection.path} is quantised ({parameter.dtype})"
        owners = [
            f"{path}.{name}"
            for path, module in model.named_modules()
            for name, other in module.named_parameters(recurse=False)
            if other is parameter
        ]
        if len(owners) > 1:
            return f"{projection.path} shares its weight ({', '.join(owners)})"
    return None


def _parameters(projection: Projection) -> list[nn.Parameter]:
    bias = projection.module.bias
    return [projection.weight] if bias is None else [projection.weight, bias]  # type: ignore[list-item]


def fold_into(tensor: Tensor, projection: Projection, basis: Tensor, a: float, b: float) -> None:
    """Project K or V in place, in a weight or a bias of the projection's module; in float64, cast once."""
    # (features, ...) view of the weight: a Conv1D keeps its features last
    rows = tensor if projection.features_first or tensor.ndim == 1 else tensor.T
    old = rows[projection.columns].double()
    u = basis.to(old)
    rows[projection.columns] = (a * old + b * (u @ (u.T @ old))).to(tensor.dtype)
