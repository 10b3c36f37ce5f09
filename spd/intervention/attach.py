"""Projecting K and V of a model: `spd.attach`.

Two forms of the same intervention K <- a K + b K U_K U_Kᵀ (and V alike). `hook` computes it on the outputs of k_proj
and v_proj and is the reference; `fold` multiplies it into their weights, W <- a W + b U Uᵀ W, and costs nothing.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Literal, Protocol, Self
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from spd.errors import InputError
from spd.intervention.fold import Fold, why_not_fold
from spd.intervention.hook import Hook
from spd.intervention.target import Target
from spd.sites import Site, find_sites
from spd.subspace import Subspace

Mode = Literal["auto", "hook", "fold"]
MODES = ("auto", "hook", "fold")


class _Installed(Protocol):
    def remove(self) -> None: ...


_ATTACHED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""The modules under an intervention, and its mode. Weak, so that a forgotten handle keeps no model alive."""


class Attachment:
    """An intervention in place. A context manager, and a handle: `.remove()` puts the model back, any number of times.

    Attributes:
        mode: the form in use, "hook" or "fold".
    """

    def __init__(self, modules: list[nn.Module], mode: Literal["hook", "fold"], installed: _Installed) -> None:
        self.mode: Literal["hook", "fold"] = mode
        self._modules = modules
        self._installed: _Installed | None = installed
        _ATTACHED.update((module, mode) for module in modules)

    def remove(self) -> None:
        if self._installed is not None:
            self._installed.remove()
            self._installed = None
            for module in self._modules:
                _ATTACHED.pop(module, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def attach(
    model: nn.Module,
    subspace: Subspace,
    *,
    mode: Mode | str = "auto",
    sides: Literal["kv", "k", "v"] | str = "kv",
    a: float = 0.0,
    b: float = 1.0,
) -> Attachment:
    """Replace K and V at the subspace's layers by a K + b K U_K U_Kᵀ and a V + b V U_V U_Vᵀ.

    (a, b) = (0, 1) projects, (1, -1) erases, (1 - s, s) blends. The intervention holds until `.remove()` or the end
    of the `with` block; then every weight is what it was, bit for bit. Weights that are changed while folded (by
    training or by loading) are lost when it ends.

    Args:
        model: a causal language model of transformers.
        subspace: a subspace calibrated on a model of the same configuration.
        mode: "fold" (exact, no cost while running), "hook" (the reference), or "auto": fold where it can be done,
            else hook.
        sides: which of K and V.
        a: weight of the unprojected activation.
        b: weight of the projection.

    Raises:
        InputError: the subspace belongs to another model, the mode cannot be used on it (the message says why and
            what can), the model already carries an intervention, or a projected module carries a LoRA adapter.
    """
    if mode not in MODES:
        raise InputError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if sides not in ("kv", "k", "v"):
        raise InputError(f'sides: expected "kv", "k" or "v", got {sides!r}')
    for name, value in (("a", a), ("b", b)):
        if isinstance(value, Tensor) or not math.isfinite(value):
            raise InputError(f"{name}: expected a finite number, got {value!r}")
    refuse_if_attached(model, "attach")
    subspace.check_model(model)
    targets = _targets(find_sites(model), subspace, sides)

    wanted = () if mode == "hook" else targets
    obstacle = next(filter(None, (why_not_fold(model, each) for each in wanted)), None)
    if mode == "fold" and obstacle:
        raise InputError(f'mode "fold" cannot be used here: {obstacle}; mode "hook" can')
    form = Hook if mode == "hook" or obstacle else Fold
    return Attachment([each.projection.module for each in targets], form.mode, form(targets, a, b))


def refuse_if_attached(model: nn.Module, caller: str) -> None:
    """Raise InputError if an intervention is in place on `model`."""
    mode = next((_ATTACHED[module] for module in model.modules() if module in _ATTACHED), None)
    if mode is not None:
        raise InputError(f"{caller}: the model carries an intervention already (mode {mode!r}); remove it first")


def _targets(sites: dict[int, Site], subspace: Subspace, sides: str) -> list[Target]:
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
            targets.append(Target(layer, side, projection, basis))
    return targets
