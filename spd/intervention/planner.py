"""Which mode of `spd.attach` decodes fastest: `spd.plan`.

The cost of one decode step is added up from the model's own shapes and the machine's constants (see machine.py):
every weight is read once; a dense cache layer is copied to take a token, as transformers' growing cache does, and
attention runs over it; a latent layer grows in place and attention runs over latents; whatever is not folded also
multiplies with U twice. Assumed: a cache that grows, no padding, transformers' `sdpa` attention, every expert read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from spd.errors import InputError
from spd.intervention import machine as machines
from spd.intervention.fold import why_not_fold
from spd.intervention.latent_cache import GROWTH, LEAST_GROWTH
from spd.intervention.latent_probe import refuse_unfit
from spd.intervention.machine import Amount, Machine
from spd.intervention.target import Form, Target, find_targets
from spd.model_state import input_device, position_limit
from spd.provenance import model_name
from spd.sites import Site, depth, find_sites
from spd.subspace import Subspace

Limit = Literal["memory", "arithmetic", "overhead"]

# Modes whose times differ by less are a tie, which the smaller cache wins: no prediction is better than that.
TIE = 0.03


@dataclass(frozen=True)
class Cost:
    """Seconds of a decode step by what they are spent on, and the bytes that it moves."""

    memory: float = 0.0
    arithmetic: float = 0.0
    overhead: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.memory + other.memory,
            self.arithmetic + other.arithmetic,
            self.overhead + other.overhead,
            self.bytes + other.bytes,
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(self.memory * times, self.arithmetic * times, self.overhead * times, self.bytes * times)

    def seconds(self, overlaps: bool) -> float:
        device = self.memory + self.arithmetic
        return max(device, self.overhead) if overlaps else device + self.overhead

    @property
    def limit(self) -> Limit:
        """What most of the time goes to."""
        shares: dict[Limit, float] = {
            "memory": self.memory,
            "arithmetic": self.arithmetic,
            "overhead": self.overhead,
        }
        return max(shares, key=shares.__getitem__)


@dataclass(frozen=True)
class Layer:
    """One layer's attention. A rank of None: the side is not in the subspace, or the layer is not.

    Attributes:
        window: of tokens that it attends to and caches; None is all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rank_k: int | None = None
    rank_v: int | None = None
    window: int | None = None

    @property
    def width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def attached(self) -> bool:
        return self.rank_k is not None


@dataclass(frozen=True)
class Shape:
    """What the cost of a model depends on.

    Attributes:
        layers: with K and V that can be reached.
        depth: of the model, all layers counted.
        weight_bytes: all parameters.
        read_bytes: parameters that a step reads: all but an embedding that is only looked up.
        folded_bytes: the weights of k_proj and v_proj that mode "fold" keeps a copy of.
        itemsize: bytes of an element of weights, activations and cache.
    """

    layers: tuple[Layer, ...]
    depth: int
    weight_bytes: int
    read_bytes: int
    folded_bytes: int
    itemsize: int


@dataclass(frozen=True)
class Prediction:
    """One mode.

    Attributes:
        possible: whether `attach` can use it on this model; if not, `why` says what is in the way.
        seconds: of one decode step, which gives every sequence of the batch one token.
        cache_bytes: of K and V of all layers, for the whole batch.
        weight_bytes: of the model, with what the mode keeps beside it: original weights or bases.
        moved_bytes: that a step reads and writes.
        limit: what most of the time goes to: "memory", "arithmetic" or "overhead" (the host calling operations).
        fits: whether weights and cache fit the device's memory; None where its size is not known.
        why: one sentence.
    """

    mode: Form
    possible: bool
    seconds: float
    cache_bytes: int
    weight_bytes: int
    moved_bytes: int
    limit: Limit
    fits: bool | None
    why: str


@dataclass(frozen=True)
class Plan:
    """All modes, best first; those that are not possible are the last.

    Attributes:
        model: the model's name.
        context, batch: cached tokens a sequence, and sequences.
        device: whose constants were used, and their `dtype`.
        measured: whether the constants were measured there; if not, they are the rates in
            spd_kernels.roofline.H200.
        memory_bytes: of the device, None if not known.
        predictions: by rank.
    """

    model: str
    context: int
    batch: int
    device: str
    dtype: str
    measured: bool
    memory_bytes: int | None
    predictions: tuple[Prediction, ...]

    @property
    def best(self) -> Prediction:
        return self.predictions[0]

    @property
    def mode(self) -> Form:
        return self.best.mode

    def __getitem__(self, mode: str) -> Prediction:
        return next(each for each in self.predictions if each.mode == mode)

    @property
    def explanation(self) -> str:
        """The choice in one sentence."""
        best = self.best
        parts = [f"{best.mode}: {best.why}", f"{time_text(best.seconds)} a step, bound by {best.limit}"]
        rival = next((each for each in self.predictions[1:] if each.possible), None)
        if rival is not None and rival.fits == best.fits and rival.seconds < best.seconds:
            parts[-1] += f", within {100 * TIE:.0f} % of {rival.mode}, whose cache is larger"
        elif rival is not None:
            parts[-1] += f", next to {time_text(rival.seconds)} under {rival.mode}"
        if best.fits is False:
            parts.append(
                f"it does not fit: {size_text(best.weight_bytes + best.cache_bytes)} of weights and cache, and the "
                f"device has {size_text(self.memory_bytes or 0)}"
            )
        if not self.measured:
            parts.append(f"by the rates of {self.device}, not measured here")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"mode": self.mode, "explanation": self.explanation}


def plan(
    model: nn.Module,
    subspace: Subspace,
    *,
    context: int,
    batch: int = 1,
    device: torch.device | str | None = None,
    machine: Machine | None = None,
    progress: bool = True,
) -> Plan:
    """Rank the modes of `attach` by the predicted time of a decode step over `context` cached tokens.

    The mode with the least time is first; among those within 3 % of it, the one with the smallest cache. A mode whose
    weights and cache exceed the device's memory comes after those that fit. The model is not run.

    Args:
        model: a causal language model of transformers.
        subspace: a subspace calibrated on a model of the same configuration.
        context: tokens a sequence in the cache.
        batch: sequences decoded together.
        device: to plan for; None is the model's. One that is not there is planned for by
            the rates in spd_kernels.roofline.H200.
        machine: constants to use in place of the measured ones of `device` (see machine.py).
        progress: show a progress bar if the machine has to be measured, which takes some seconds once.

    Raises:
        InputError: context or batch is not a positive integer, the context exceeds the model's positions, the device
            is neither CPU nor CUDA, or the subspace belongs to another model.
    """
    for name, value in (("context", context), ("batch", batch)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name}: expected a whole number from 1, got {value!r}")
    limit = position_limit(model)
    if limit is not None and context > limit:
        raise InputError(f"context: the model has {limit} positions, got {context}")
    subspace.check_model(model)
    targets = find_targets(find_sites(model), subspace, "kv")
    target_device = machines.resolve(input_device(model) if device is None else device)
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    if machine is None:
        machine = machines.load(target_device, dtype, progress=progress)
    memory = machines.memory_bytes(target_device)
    obstacles = {mode: _obstacle(model, mode, targets) for mode in machines.FORMS}
    predictions = predict(shape_of(model, subspace, dtype), machine, context, batch, memory, obstacles)
    return Plan(
        model=model_name(model),
        context=context,
        batch=batch,
        device=machine.name,
        dtype=machine.dtype,
        measured=machine.measured,
        memory_bytes=memory,
        predictions=tuple(predictions),
    )


def predict(
    shape: Shape,
    machine: Machine,
    context: int,
    batch: int,
    memory: int | None = None,
    obstacles: dict[Form, str | None] | None = None,
) -> list[Prediction]:
    """The ranking for shapes alone. `obstacles` says by mode why it is not possible."""
    costs = {mode: step_cost(shape, machine, mode, context, batch) for mode in machines.FORMS}
    seconds = {mode: cost.seconds(machine.overlaps) for mode, cost in costs.items()}
    found = []
    for mode, cost in costs.items():
        cache, weights = cache_bytes(shape, mode, context, batch), _weight_bytes(shape, mode)
        obstacle = (obstacles or {}).get(mode)
        found.append(
            Prediction(
                mode=mode,
                possible=obstacle is None,
                seconds=seconds[mode],
                cache_bytes=cache,
                weight_bytes=weights,
                moved_bytes=round(cost.bytes),
                limit=_limit(cost, machine),
                fits=None if memory is None else weights + cache <= memory,
                why=obstacle or _why(shape, mode, costs, seconds),
            )
        )
    return _ranked(found)


def step_cost(shape: Shape, machine: Machine, mode: Form, context: int, batch: int) -> Cost:
    """One decode step of the whole model: weights, layers, and what a step takes beside them."""
    total = _linear(machine, shape.read_bytes, batch) + Cost(overhead=machine.step)
    # Layers without K and V to reach still have to be called.
    total += Cost(overhead=machine.layer["fold"]) * (shape.depth - len(shape.layers))
    for layer, count in _counted(shape.layers):
        total += layer_cost(layer, machine, mode, context, batch, shape.itemsize) * count
    return total


def layer_cost(layer: Layer, machine: Machine, mode: Form, context: int, batch: int, itemsize: int) -> Cost:
    """What one layer adds: calling it, growing its cache, attention, and the projection."""
    if not layer.attached:
        mode = "fold"
    rank_k, rank_v = _cached_ranks(layer, mode)
    tokens = min(context, layer.window or context)
    amount = Amount.of(batch, layer.heads, layer.kv_heads, layer.head_dim, tokens, rank_k, rank_v, itemsize)
    rates = machine.attention[mode if mode in machine.attention else "dense"]
    cost = Cost(rates.memory(amount), rates.arithmetic(amount), machine.layer[mode], amount.bytes)

    cached = _layer_bytes(layer, mode, context, batch, itemsize)
    share = 1.0  # of the cache, that is copied for one token
    if mode in ("latent_v", "latent"):
        share = 1 / max(LEAST_GROWTH, tokens // GROWTH)
    cost += Cost(memory=machine.append(cached) * share, bytes=2 * cached * share)

    if mode != "fold":
        bases = layer.width * ((layer.rank_k or 0) + (layer.rank_v or 0)) * itemsize
        cost += _linear(machine, 2 * bases, batch)
    return cost


def cache_bytes(shape: Shape, mode: Form, context: int, batch: int) -> int:
    """K and V of all layers."""
    return sum(
        count * _layer_bytes(layer, mode if layer.attached else "fold", context, batch, shape.itemsize)
        for layer, count in _counted(shape.layers)
    )


def shape_of(model: nn.Module, subspace: Subspace, dtype: torch.dtype) -> Shape:
    """The shapes of a model under a subspace."""
    sites = find_sites(model)
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and head.weight is embeddings
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    projections = [sites[layer].side(side).module for layer in subspace.layers for side in "kv"]
    folded = {id(each): each for module in projections for each in module.parameters()}
    return Shape(
        layers=tuple(_layer(model, site, subspace) for site in sites.values()),
        depth=max(depth(model), len(sites)),
        weight_bytes=weights,
        read_bytes=weights if tied else weights - embeddings.numel() * embeddings.element_size(),
        folded_bytes=sum(each.numel() * each.element_size() for each in folded.values()),
        itemsize=dtype.itemsize,
    )


def size_text(size: float) -> str:
    """1536 -> "1.5 KB", in steps of 1000 where the last digit is worth reading."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def time_text(seconds: float) -> str:
    """0.0123 -> "12.3 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _layer(model: nn.Module, site: Site, subspace: Subspace) -> Layer:
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    attention: Any = site.attention
    heads = config.num_attention_heads
    given = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    head_dim = int(given or getattr(config, "head_dim", None) or config.hidden_size // heads)
    kinds = getattr(config, "layer_types", None)
    sliding = not kinds or "sliding" in str(kinds[site.layer])
    window = getattr(attention, "sliding_window", None) if sliding else None
    bases = (subspace.k.get(site.layer), subspace.v.get(site.layer))
    rank_k, rank_v = (None if basis is None else basis.rank for basis in bases)
    return Layer(heads, site.width // head_dim, head_dim, rank_k, rank_v, window)


def _obstacle(model: nn.Module, mode: Form, targets: list[Target]) -> str | None:
    if mode == "fold":
        return next(filter(None, (why_not_fold(model, each) for each in targets)), None)
    if mode == "latent_v" or mode == "latent":
        try:
            refuse_unfit(model, mode, targets)
        except InputError as error:
            return str(error).removeprefix(f'mode "{mode}" cannot be used here: ')
    return None


def _counted(layers: tuple[Layer, ...]) -> Iterator[tuple[Layer, int]]:
    """Layers of one kind once, and how many there are."""
    for layer in dict.fromkeys(layers):
        yield layer, layers.count(layer)


def _cached_ranks(layer: Layer, mode: Form) -> tuple[int | None, int | None]:
    """Numbers a token that K and V take in the cache; None is dense."""
    return layer.rank_k if mode == "latent" else None, layer.rank_v if mode in ("latent_v", "latent") else None


def _layer_bytes(layer: Layer, mode: Form, context: int, batch: int, itemsize: int) -> int:
    numbers = sum(layer.width if rank is None else rank for rank in _cached_ranks(layer, mode))
    return batch * min(context, layer.window or context) * numbers * itemsize


def _weight_bytes(shape: Shape, mode: Form) -> int:
    if mode == "fold":
        return shape.weight_bytes + shape.folded_bytes
    bases = sum(layer.width * ((layer.rank_k or 0) + (layer.rank_v or 0)) for layer in shape.layers)
    return shape.weight_bytes + bases * shape.itemsize


def _linear(machine: Machine, weight_bytes: float, rows: int) -> Cost:
    """Multiplying so many bytes of weights with rows: what one row takes is reading them, the rest is arithmetic."""
    read = machine.linear(1) * weight_bytes
    return Cost(memory=read, arithmetic=max(0.0, machine.linear(rows) * weight_bytes - read), bytes=weight_bytes)


def _limit(cost: Cost, machine: Machine) -> Limit:
    if machine.overlaps and cost.overhead < cost.memory + cost.arithmetic:
        cost = replace(cost, overhead=0.0)
    return cost.limit


def _ranked(found: list[Prediction]) -> list[Prediction]:
    """The choice, then the others by time; what does not fit after what does, what is not possible last."""
    remaining = sorted(found, key=lambda each: (not each.possible, each.fits is False, each.seconds))
    first = remaining[0]
    ties = [
        each
        for each in remaining
        if (each.possible, each.fits) == (first.possible, first.fits) and each.seconds <= (1 + TIE) * first.seconds
    ]
    best = min(ties, key=lambda each: (each.cache_bytes, each.seconds))
    return [best, *(each for each in remaining if each is not best)]


def _why(shape: Shape, mode: Form, costs: dict[Form, Cost], seconds: dict[Form, float]) -> str:
    layers = [layer for layer in shape.layers if layer.attached]
    widths = _range([layer.width for layer in layers])
    if mode == "fold":
        return f"K and V dense, {widths} numbers a token each; the projection is in the weights and takes no time"
    if mode == "hook":
        extra = seconds["hook"] / seconds["fold"] - 1
        return f"the cache of fold, and x U Uᵀ is computed in every step: {_percent(extra)} more time"
    ranks_v = _range([layer.rank_v or 0 for layer in layers])
    ranks_k = _range([layer.rank_k or 0 for layer in layers])
    moved = 1 - costs[mode].bytes / costs["fold"].bytes
    bytes_text = f"{_percent(abs(moved))} {'fewer' if moved >= 0 else 'more'} bytes"
    change = seconds[mode] / seconds["fold"]
    faster = f"{1 / change:.2g} times faster than fold" if change < 1 else f"{change:.2g} times as long as fold"
    if abs(change - 1) < TIE:
        faster = "as fast as fold"
    if mode == "latent_v":
        kept = f"V as {ranks_v} numbers a token in place of {widths}"
        reason = f"the step moves {bytes_text}"
        if change >= 1 + TIE:
            reason += ", but projecting and calling outweigh it at this length"
    else:
        same = ranks_k if ranks_k == ranks_v else f"{ranks_k} and {ranks_v}"
        kept = f"K and V as {same} numbers a token in place of {widths}"
        reason = f"the step moves {bytes_text}"
        if change >= 1 or seconds["latent"] > seconds["latent_v"]:
            reason += ", but every key is expanded from its latent in every step"
    return f"{kept}: {reason}, {faster}"


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0095 or share < 0.0005 else f"{100 * share:.1f} %"
