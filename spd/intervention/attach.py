"""Projecting K and V of a model: `spd.attach`.

Four forms of the same intervention K <- a K + b K U_K U_Kᵀ (and V alike). `hook` computes it on the outputs of k_proj
and v_proj and is the reference; `fold` multiplies it into their weights, W <- a W + b U Uᵀ W, and costs nothing. It is
exact but for one rounding of the folded weights to their dtype.
`latent_v` and `latent` project as the hook does and cache V, or both, as the r numbers a token that are left of them.
A `Router` does as the hook does, with a subspace for each sequence.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any, Literal, Protocol, Self, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from spd.errors import InputError
from spd.intervention.fold import Fold, why_not_fold
from spd.intervention.hook import Hook, ProjectOutput
from spd.intervention.latent_probe import install_latent
from spd.intervention.planner import plan
from spd.intervention.router import Routed, RouteOutput, Router
from spd.intervention.target import Form, Intervention, LatentMode, Target, find_targets
from spd.sites import find_sites
from spd.subspace import Subspace

Mode = Literal["auto"] | Form
MODES = ("auto", *get_args(Form))


class _Installed(Protocol):
    def remove(self) -> None: ...


_ATTACHED: WeakKeyDictionary[nn.Module, Intervention] = WeakKeyDictionary()
"""The modules under an intervention, and which. Weak, so that a forgotten handle keeps no model alive."""


class Attachment:
    """An intervention in place. A context manager, and a handle: `.remove()` puts the model back, any number of times.

    Attributes:
        mode: the form in use: "hook", "fold", "latent_v" or "latent".
    """

    def __init__(self, modules: list[nn.Module], intervention: Intervention, installed: _Installed) -> None:
        self.mode: Form = intervention.mode
        self._modules = modules
        self._installed: _Installed | None = installed
        if self.mode != "fold":
            torch.compiler.reset()  # a model that was compiled before does not look whether it has hooks now
        for module in modules:
            _ATTACHED[module] = intervention
            for hook in module._forward_hooks.values():
                if isinstance(hook, ProjectOutput):
                    hook.part_of = intervention

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
    subspace: Subspace | Router,
    *,
    mode: Mode | str = "auto",
    sides: Literal["kv", "k", "v"] | str = "kv",
    a: float = 0.0,
    b: float = 1.0,
    context: int | None = None,
    batch: int | None = None,
) -> Attachment:
    """Replace K and V at the subspace's layers by a K + b K U_K U_Kᵀ and a V + b V U_V U_Vᵀ.

    (a, b) = (0, 1) projects, (1, -1) erases, (1 - s, s) blends. The intervention holds until `.remove()` or the end
    of the `with` block; then every weight is what it was, bit for bit. Weights that are changed while folded (by
    training or by loading) are lost when it ends.

    Args:
        model: a causal language model of transformers.
        subspace: a subspace calibrated on a model of the same configuration, or a router over some. Under a router
            every forward pass stands in a `with router.use(...)`, and the mode is "hook".
        mode: "fold" (no cost while running; exact but for one rounding of the folded weights to their dtype), "hook"
            (the reference), or "auto": fold where it can be done, else hook. "latent_v" projects as the hook does and
            keeps V as latents in the cache that generation makes, "latent" K and V; both need a = 0, b = 1 and a cache
            that starts empty.
        sides: which of K and V.
        a: weight of the unprojected activation.
        b: weight of the projection.
        context: with mode "auto": tokens a sequence that will be cached. The mode is then the first of `spd.plan` that
            this model and these arguments allow, latent modes included.
        batch: with a context: sequences decoded together; None is 1.

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
    if context is None and batch is not None:
        raise InputError(f"batch: expected a context beside it, got batch = {batch!r} alone")
    if context is not None and mode != "auto":
        raise InputError(f'context: expected mode "auto", which chooses by it, got mode {mode!r}')
    refuse_if_attached(model, "attach")
    if isinstance(subspace, Router):
        return _attach_router(model, subspace, mode, sides, a, b, context)
    if context is not None:
        return _attach_planned(model, subspace, sides, a, b, context, 1 if batch is None else batch)
    subspace.check_model(model)
    targets = find_targets(find_sites(model), subspace, sides)

    if mode in ("latent_v", "latent"):
        return _attach_latent(model, mode, subspace, targets, sides, a, b)
    wanted = () if mode == "hook" else targets
    obstacle = next(filter(None, (why_not_fold(model, each) for each in wanted)), None)
    if mode == "fold" and obstacle:
        raise InputError(f'mode "fold" cannot be used here: {obstacle}; mode "hook" can')
    form = Hook if mode == "hook" or obstacle else Fold
    intervention = Intervention(form.mode, subspace, sides, a, b)
    return Attachment([each.projection.module for each in targets], intervention, form(targets, a, b))


def _attach_router(
    model: nn.Module, router: Router, mode: str, sides: str, a: float, b: float, context: int | None
) -> Attachment:
    if context is not None or mode not in ("auto", "hook"):
        asked = f"mode {mode!r}" if context is None else f"context = {context!r}"
        raise InputError(f'attach: a router has mode "hook" alone, since no weight serves every sequence; got {asked}')
    routed = Routed(router, model, find_sites(model), sides, a, b)
    return Attachment(routed.modules, Intervention("hook", router, sides, a, b), routed)


def _attach_planned(
    model: nn.Module, subspace: Subspace, sides: str, a: float, b: float, context: int, batch: int
) -> Attachment:
    ranked = [each.mode for each in plan(model, subspace, context=context, batch=batch).predictions if each.possible]
    for mode in ranked:
        # The plan knows neither sides nor a and b, and only a trial tells whether latents give the right logits.
        try:
            return attach(model, subspace, mode=mode, sides=sides, a=a, b=b)
        except InputError:
            if mode == ranked[-1]:
                raise
    raise AssertionError("mode hook is always possible")


def _attach_latent(
    model: nn.Module, mode: LatentMode, subspace: Subspace, targets: list[Target], sides: str, a: float, b: float
) -> Attachment:
    if (a, b) != (0.0, 1.0):
        raise InputError(
            f'mode "{mode}": expected a = 0 and b = 1, since what is kept of a token is its projection alone, got '
            f'a = {a:g} and b = {b:g}; modes "fold" and "hook" can be used'
        )
    needed = "kv" if mode == "latent" else "v"
    if not set(needed) <= set(sides):
        raise InputError(f'mode "{mode}": expected sides that include {needed!r}, got {sides!r}')
    installed = install_latent(model, mode, targets)
    intervention = Intervention(mode, subspace, sides, a, b)
    return Attachment([each.projection.module for each in targets], intervention, installed)


def refuse_if_attached(model: nn.Module, caller: str) -> None:
    """Raise InputError if an intervention is in place on `model`."""
    mode = next(filter(None, map(_mode_of, model.modules())), None)
    if mode is not None:
        raise InputError(f"{caller}: the model carries an intervention already (mode {mode!r}); remove it first")


def intervention_on(model: nn.Module) -> dict[str, Any]:
    """What the settings of a result say of the intervention on the model: nothing where there is none."""
    found = next(filter(None, map(_intervention_of, model.modules())), None)
    return {} if found is None else {"intervention": found.described()}


def _intervention_of(module: nn.Module) -> Intervention | None:
    """Found also on a copy of a model, which is in no registry but has the hooks; a router leads no copy."""
    hooks = (hook for hook in module._forward_hooks.values() if isinstance(hook, ProjectOutput))
    return _ATTACHED.get(module) or next((hook.part_of for hook in hooks), None)


def _mode_of(module: nn.Module) -> str | None:
    found = _intervention_of(module)
    hooked = any(isinstance(hook, (ProjectOutput, RouteOutput)) for hook in module._forward_hooks.values())
    return found.mode if found else "hook" if hooked else None
