"""A subspace for each sequence of a batch: `spd.Router`.

Every site keeps the bases of all subspaces in one bank and projects the whole batch in one launch; which basis a
sequence gets is a tensor that `use` overwrites.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from spd.errors import InputError, near
from spd.files import sha256
from spd.intervention.target import Target, find_targets
from spd.sites import Projection, Site
from spd.subspace import Subspace
from spd_kernels import project_routed, stack_subspaces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spd.generation import Generation

_OUTSIDE = (
    "router: a forward pass outside `with router.use([...])`, which says what each sequence gets; "
    "None leaves a sequence alone, router.use(None) all of them"
)


@dataclass(frozen=True)
class Decision:
    """What was chosen for a prompt, and why. `dataclasses.asdict` gives plain JSON values.

    Args:
        prompt: the prompt.
        name: the subspace, or None to leave the prompt alone.
        scores: what every name scored; empty if what chose does not score.
        by: what chose.
    """

    prompt: str
    name: str | None
    scores: dict[str, float] = field(default_factory=dict)
    by: str = ""


@runtime_checkable
class Chooser(Protocol):
    """Chooses for many prompts at once, and says why. It may run the model: the router leaves it alone meanwhile."""

    def decide(self, prompts: Sequence[str]) -> list[Decision]: ...


class Router:
    """Subspaces by name, one of which, or none, is used for each sequence of a batch.

        with spd.attach(model, router), router.use(["math", None, "code"]):
            model.generate(...)  # of three prompts

    Attributes:
        names: the subspaces' names.
        decisions: all that `choose` decided, in order.

    Args:
        subspaces: by name, all of one model; layers and ranks may differ. A subspace that lacks a layer leaves it
            alone.
        choose: what `choose` and `generate` ask: a function from a prompt to a name or None, or a `Chooser` such as
            `spd.NearestCentroid`.

    Raises:
        InputError: no subspace, or something that is not one.
    """

    def __init__(
        self, subspaces: Mapping[str, Subspace], choose: Callable[[str], str | None] | Chooser | None = None
    ) -> None:
        if not isinstance(subspaces, Mapping) or not subspaces:
            raise InputError(f"subspaces: expected at least one subspace by name, got {subspaces!r}")
        for name, subspace in subspaces.items():
            if not isinstance(name, str) or not name:
                raise InputError(f"subspaces: expected names, got {name!r}")
            if not isinstance(subspace, Subspace):
                raise InputError(f"subspaces: expected a Subspace as {name!r}, got a {type(subspace).__name__}")
        if not (choose is None or isinstance(choose, Chooser) or callable(choose)):
            raise InputError(f"choose: expected a function of a prompt or a Chooser, got a {type(choose).__name__}")
        strange = [name for name in getattr(choose, "names", ()) if name not in subspaces]
        if strange:
            raise InputError(f"choose: it has {', '.join(map(repr, strange))} among the names, the router has not")
        self.subspaces = dict(subspaces)
        self.names = tuple(self.subspaces)
        self.decisions: list[Decision] = []
        self._choose = choose
        self._lanes: list[_Lane] = []
        self._in_use: list[int] | None = None
        self._busy = threading.Lock()

    @contextmanager
    def use(self, routes: Sequence[str | None] | str | None) -> Iterator[None]:
        """Inside the block, sequence i of every batch gets the subspace `routes[i]`; None leaves it alone.

        A batch of n times as many rows has n neighbouring rows a route, as beams and `num_return_sequences` make them.
        What is set is the router's state and holds for every thread: one block at a time, others are refused.

        Args:
            routes: a name or None for each sequence, or one for all.

        Raises:
            InputError: an unknown name, a router that is attached to no model, or another block in place. A forward
                pass raises it where the batch is not a multiple of the routes, and outside a block.
        """
        positions = self._positions(routes)
        if not self._lanes:
            raise InputError("router: use: it is attached to no model; spd.attach(model, router) comes first")
        if not self._busy.acquire(blocking=False):
            raise InputError("router: use: another block is in place; a router has one at a time, in all threads")
        try:
            self._in_use = positions
            for lane in self._lanes:
                lane.set(positions)
            yield
        finally:
            for lane in self._lanes:
                lane.set(None)
            self._in_use = None
            self._busy.release()

    def choose(self, prompts: Sequence[str]) -> list[Decision]:
        """Ask what was passed as `choose`, and add its decisions to `decisions`.

        Raises:
            InputError: there is nothing to ask, or it names a subspace that the router does not have.
        """
        prompts = list(prompts)
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise InputError(f"prompts: expected strings, got {type(prompt).__name__} at index {index}")
        if isinstance(self._choose, Chooser):
            with self.use(None) if self._lanes else nullcontext():
                decisions = self._choose.decide(prompts)
        elif self._choose is not None:
            by = getattr(self._choose, "__qualname__", type(self._choose).__name__)
            decisions = [Decision(prompt, self._choose(prompt), by=by) for prompt in prompts]
        else:
            raise InputError("router: choose: nothing to choose with; make the router with choose=...")
        self._positions([decision.name for decision in decisions], empty=True)
        self.decisions += decisions
        return decisions

    def generate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        *,
        routes: Sequence[str | None] | str | None = None,
        tag: str = "",
        **settings: Any,
    ) -> list[Generation]:
        """`spd.generate` with a subspace for each prompt, on a model that the router is attached to.

        Args:
            model, tokenizer, prompts, tag, settings: as `spd.generate` takes them.
            routes: a name or None for each prompt, or a name for all; None asks `choose`.

        Raises:
            InputError: as `use`, `choose` and `spd.generate` do, or not one route a prompt.
        """
        from spd.generation import generate

        prompts = list(prompts)
        if routes is None:
            chosen = [decision.name for decision in self.choose(prompts)]
        else:
            chosen = [routes] * len(prompts) if isinstance(routes, str) else list(routes)
        if len(chosen) != len(prompts):
            raise InputError(f"routes: expected one for each of {len(prompts)} prompts, got {len(chosen)}")
        self._positions(chosen, empty=True)
        return generate(
            model,
            tokenizer,
            prompts,
            tag=f"{tag} routes {sha256(json.dumps([name and self._hashes[name] for name in chosen]))}".lstrip(),
            around=lambda batch: self.use([chosen[index] for index in batch]),
            **settings,
        )

    def described(self) -> dict[str, Any]:
        """Its subspaces, and inside `use` the routes, as plain data."""
        names = (*self.names, None)
        routes = {} if self._in_use is None else {"routes": [names[place] for place in self._in_use]}
        return {"subspaces": self._hashes, **routes}

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {name: subspace.sha256 for name, subspace in self.subspaces.items()}

    def _positions(self, routes: Sequence[str | None] | str | None, empty: bool = False) -> list[int]:
        """The names' places among `names`, -1 for None."""
        routes = [routes] if routes is None or isinstance(routes, str) else list(routes)
        if not routes and not empty:
            raise InputError("routes: expected a name or None for each sequence, got none")
        for index, name in enumerate(routes):
            if name is not None and name not in self.names:
                meant = near(name, self.names) if isinstance(name, str) else ""
                raise InputError(f"routes[{index}]: expected one of {list(self.names)} or None, got {name!r}{meant}")
        return [-1 if name is None else self.names.index(name) for name in routes]


class Routed:
    """The hooks of a router on a model."""

    def __init__(
        self, router: Router, model: nn.Module, sites: dict[int, Site], sides: str, a: float, b: float
    ) -> None:
        found: dict[tuple[int, str], dict[int, Target]] = {}
        for place, (name, subspace) in enumerate(router.subspaces.items()):
            try:
                subspace.check_model(model)
                for target in find_targets(sites, subspace, sides):
                    found.setdefault((target.layer, target.side), {})[place] = target
            except InputError as error:
                raise InputError(f"router: {name!r}: {error}") from None
        lanes: dict[tuple[int, ...], _Lane] = {}
        self.modules: list[nn.Module] = []
        self._router = router
        self._handles = []
        for each in found.values():
            projection = next(iter(each.values())).projection
            lane = lanes.setdefault(tuple(each), _Lane(tuple(each)))
            hook = RouteOutput(projection, [target.basis for target in each.values()], lane, a, b)
            self._handles.append(projection.module.register_forward_hook(hook))
            self.modules.append(projection.module)
        self._lanes = list(lanes.values())
        router._lanes += self._lanes

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._router._lanes = [lane for lane in self._router._lanes if lane not in self._lanes]


class RouteOutput:
    """A forward hook. The bank follows the activations' dtype and device, one copy for each that is met."""

    def __init__(self, projection: Projection, bases: Sequence[Tensor], lane: _Lane, a: float, b: float) -> None:
        self._projection = projection
        self._bank, ranks = stack_subspaces(bases)
        self._ranks = None if bool((ranks == self._bank.shape[2]).all()) else ranks
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor | None]] = {}
        self._lane = lane
        self._a, self._b = a, b
        weight = projection.weight
        if weight.is_floating_point() and not weight.is_meta:  # at once, so that a compiler need not trace how
            self.bank(weight)
            lane.add(weight.device)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        index = self._lane.index(output.device)
        x, count = self._projection.read(output), index.shape[0]
        if x.dim() != 3 or x.shape[0] % count:
            raise InputError(
                f"router: expected a batch whose rows are a multiple of the {count} routes in use, got activations of "
                f"shape {tuple(x.shape)} (sequences, tokens, features) from {self._projection.path}"
            )
        bank, ranks = self.bank(x)
        # The rows of one route are neighbours: they count as one sequence.
        rows = x.unflatten(0, (count, x.shape[0] // count))
        y = project_routed(rows, bank, index, a=self._a, b=self._b, ranks=ranks)
        return self._projection.write(output, y.flatten(0, 1))

    def bank(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """The bank (S, d, r) and its ranks (S,) on the device of `like`, the bank in its dtype."""
        key = like.device, like.dtype
        if key not in self._copies:
            with torch.inference_mode(False):  # training may come after
                ranks = None if self._ranks is None else self._ranks.to(like.device)
                self._copies[key] = self._bank.to(*key), ranks
        return self._copies[key]


class _Lane:
    """The index (R,) of R sequences into the banks of some subspaces, shared by all sites that have such a bank.

    There is a buffer for each device and R. It is overwritten, never replaced, so that a captured graph that reads it
    follows the next `use`.
    """

    def __init__(self, members: tuple[int, ...]) -> None:
        self._places = {member: place for place, member in enumerate(members)}
        self._devices = {torch.device("cpu")}
        self._buffers: dict[tuple[torch.device, int], Tensor] = {}
        self._current: dict[torch.device, Tensor] | None = None

    def add(self, device: torch.device) -> None:
        self._devices.add(device)

    @torch.inference_mode(False)
    def set(self, routes: Sequence[int] | None) -> None:
        if routes is None:
            self._current = None
            return
        index = torch.tensor([self._places.get(route, -1) for route in routes])
        self._current = {device: self._buffer(device, index) for device in self._devices}

    def _buffer(self, device: torch.device, index: Tensor) -> Tensor:
        key = device, index.shape[0]
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(index, device=device)
        return self._buffers[key].copy_(index)

    def index(self, device: torch.device) -> Tensor:
        if self._current is None:
            raise InputError(_OUTSIDE)
        if device not in self._current:  # an offloaded module runs elsewhere than its weight lies
            self._current[device] = self._current[torch.device("cpu")].to(device)
        return self._current[device]
