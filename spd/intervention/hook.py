"""Mode `hook`: project what k_proj and v_proj return, as it is returned. Works on any engine that calls the modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spd.intervention.target import Intervention, Target
from spd_kernels import project


class Hook:
    mode: Literal["hook"] = "hook"

    def __init__(self, targets: Sequence[Target], a: float, b: float) -> None:
        self._handles = [each.projection.module.register_forward_hook(ProjectOutput(each, a, b)) for each in targets]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class ProjectOutput:
    """A forward hook. The basis follows the activations' dtype and device, one copy for each that is met.

    Attributes:
        part_of: what it is a part of, for copies of the model, which have it too.
    """

    part_of: Intervention | None = None

    def __init__(self, target: Target, a: float, b: float) -> None:
        self._projection = target.projection
        self._basis = target.basis
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._a, self._b = a, b

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        activation = self._projection.read(output)
        return self._projection.write(output, project(activation, self.basis(activation), a=self._a, b=self._b))

    def basis(self, like: Tensor) -> Tensor:
        """U (d, r) on the device and in the dtype of `like`."""
        key = like.device, like.dtype
        if key not in self._copies:
            with torch.inference_mode(False):  # training may come after
                self._copies[key] = self._basis.to(*key)
        return self._copies[key]
