"""The correctness gradients at K and V: the rows of one batch, and their sums over all batches.

For each example L_i = -(1/|S|) sum_{t in S} log p(z_t | z_<t); its rows are dL_i/dK_t and dL_i/dV_t at all its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spd import distributed
from spd.errors import InputError
from spd.likelihood import padded
from spd.model_state import checkpointed, input_device
from spd.sites import Site
from spd.spans import EncodedExample
from spd_kernels import GradientCovariance, tap, update_many
from spd_kernels.covariance.api import all_reduce_many
from spd_kernels.tap.api import Accumulator

INITIAL_FP16_SCALE = 2.0**12

Place = tuple[int, str]
"""A layer, and its side: "k" or "v"."""


@dataclass(frozen=True)
class BatchRows:
    """The gradients (B, T, d) of one batch by place, times `scale`, each with which of its rows count (B, T)."""

    seen: dict[Place, list[tuple[Tensor, Tensor]]]
    scale: float


class GradientSums:
    """Number, mean and centred sum of squares of the rows at every site, in O(d^2) each, however many examples come.

    Args:
        model: frozen, in evaluation mode; the caller has gradients on.
        sites: where to look.
        sharded: the model's passes are made by all processes together, as `distributed.is_sharded` says.
        gradient_checkpointing: keep of every layer its input alone, and compute the rest again on the way back.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], *, sharded: bool = False, gradient_checkpointing: bool = False
    ) -> None:
        self.model = model
        self.sites = sites
        self.sharded = sharded
        self.gradient_checkpointing = gradient_checkpointing
        self.scale = initial_scale(model)
        self.totals: dict[Place, GradientCovariance] = {}

    def rows_of(self, batch: Sequence[EncodedExample], *, counted: bool = True) -> BatchRows:
        """One batch's rows, of which none has been added to the sums yet; with `counted=False` none ever will be.

        A half-precision backward pass runs on a scaled loss, because gradients at K underflow float16. If the scaled
        gradients overflow instead, the batch is taken again at a smaller scale, as are all later ones.

        Raises:
            InputError: a gradient is NaN or infinite; names the layer and the example.
        """
        while True:
            rows = self.forward_backward(batch, counted)
            self._make_room(rows)
            broken = _broken(rows, batch)
            # All make a sharded model's passes together, so they make another one together.
            found = [each for each in (distributed.gather(broken) if self.sharded else [broken]) if each]
            if not found:
                return rows
            if self.scale <= 1.0:
                raise InputError(found[0])
            self.scale /= 4.0

    def forward_backward(self, batch: Sequence[EncodedExample], counted: bool = True) -> BatchRows:
        """The rows as one pass over the batch has them, sound or not. What is done depends on no tensor's values."""
        tokens, real = padded([example.tokens for example in batch], input_device(self.model))
        taps = {(site.layer, side): _Tap() for site in self.sites for side in "kv"}
        saving = checkpointed(self.model, training=False) if self.gradient_checkpointing else nullcontext()
        with saving, tapped(self.sites, taps, real & counted):
            (correctness_loss(self.model, batch, tokens, real) * self.scale).backward()
        return BatchRows({place: each.seen for place, each in taps.items()}, self.scale)

    def add(self, rows: BatchRows) -> None:
        """Add a batch's rows to the sums, and let go of them."""
        self._make_room(rows)
        seen = [(place, g, mask) for place, each in rows.seen.items() for g, mask in each]
        rows.seen.clear()
        if rows.scale == 1.0:
            update_many([self.totals[place] for place, _, _ in seen], [g for _, g, _ in seen], [m for _, _, m in seen])
            return
        for place, g, mask in seen:
            self.totals[place].update(g.float() / rows.scale, mask)

    def _make_room(self, rows: BatchRows) -> None:
        """The sums that these rows go to: while the batch can still be taken again, in case memory runs out here."""
        for place, seen in rows.seen.items():
            if seen and place not in self.totals:
                self.totals[place] = GradientCovariance(seen[0][0].shape[-1], seen[0][0].device)

    def all_reduce(self) -> None:
        """Afterwards every process has the sums of all. All must call it, also those that saw no row."""
        device, totals = input_device(self.model), {}
        for site in self.sites:
            for place in ((site.layer, "k"), (site.layer, "v")):
                own = self.totals.pop(place, None)
                totals[place] = GradientCovariance(site.width, device)
                if own is not None:
                    totals[place].merge(own)
        self.totals = totals
        if distributed.size() > 1:
            all_reduce_many(list(totals.values()))


class _Tap:
    """The accumulator behind one tap: keeps the batch's gradient until it is known to be sound."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def update(self, g: Tensor, mask: Tensor | None = None) -> None:
        assert mask is not None
        self.seen.append((g, mask.to(g.device)))


def _broken(rows: BatchRows, batch: Sequence[EncodedExample]) -> str | None:
    """What to say of gradients that are NaN or infinite, or None; waits for a GPU once."""
    # A sum is as finite as its terms, or less: most batches are cleared by one pass over them and one number each.
    sums = [g.sum(dtype=torch.float32) for seen in rows.seen.values() for g, _ in seen]
    if not sums or torch.stack([each.to(sums[0].device) for each in sums]).isfinite().all():
        return None
    first, examples = "", set()
    for (layer, side), seen in rows.seen.items():
        for g, mask in seen:
            lost = (~(g.isfinite().all(dim=-1) | ~mask).all(dim=-1)).nonzero().flatten().tolist()
            if lost and not first:
                where = f"{side.upper()} of layer {layer}"
                first = f"the gradient at {where} is NaN or infinite for example {batch[lost[0]].index}"
            examples.update(lost)
    return f"examples: {first} ({len(examples)} examples in its batch are affected)" if first else None


def initial_scale(model: nn.Module) -> float:
    """What to multiply the loss by at first."""
    return INITIAL_FP16_SCALE if any(p.dtype == torch.float16 for p in model.parameters()) else 1.0


@contextmanager
def tapped(sites: Sequence[Site], accumulators: Mapping[Place, Accumulator], mask: Tensor) -> Iterator[None]:
    """Forward hooks that tap K and V; nothing below the lowest site is part of the graph."""

    def hook_for(site: Site, sides: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            for side in sides:
                projection = site.side(side)
                seen = tap(projection.read(output), accumulators[site.layer, side], mask)
                output = projection.write(output, seen)
            return output

        return hook

    handles = []
    try:
        for site in sites:
            if site.k.module is site.v.module:
                handles.append(site.k.module.register_forward_hook(hook_for(site, "kv")))
            else:
                handles.append(site.k.module.register_forward_hook(hook_for(site, "k")))
                handles.append(site.v.module.register_forward_hook(hook_for(site, "v")))
        yield
    finally:
        for handle in handles:
            handle.remove()


def correctness_loss(model: nn.Module, batch: Sequence[EncodedExample], tokens: Tensor, real: Tensor) -> Tensor:
    """sum_i L_i over the batch: a sum, so that an example's gradient does not depend on its neighbours."""
    rows = torch.tensor([row for row, example in enumerate(batch) for _ in example.targets], device=tokens.device)
    targets = torch.tensor([t for example in batch for t in example.targets], device=tokens.device)
    weights = torch.tensor([1.0 / len(example.targets) for example in batch for _ in example.targets])
    logits = _logits_at(model, tokens, real, rows, targets - 1).float()  # (|S|, vocabulary)
    losses = cross_entropy(logits, tokens[rows, targets].to(logits.device), reduction="none")
    return (losses * weights.to(losses.device)).sum()


def _logits_at(model: nn.Module, tokens: Tensor, real: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Logits (n, vocabulary) at these places, multiplied out nowhere else where the model has a module for that."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    selected = False

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal selected
        if not args or args[0].ndim != 3 or args[0].shape[:2] != tokens.shape:
            return None
        selected = True
        hidden = args[0]
        return (hidden[rows.to(hidden.device), positions.to(hidden.device)][None], *args[1:])

    handle = head.register_forward_pre_hook(select) if isinstance(head, nn.Module) else None
    try:
        logits = model(input_ids=tokens, attention_mask=real.long(), use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits[0] if selected else logits[rows.to(logits.device), positions.to(logits.device)]
