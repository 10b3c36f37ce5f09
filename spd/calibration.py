"""Phase 1: the subspaces in which correctness is decided, from the gradients at K and V (arXiv 2605.22675, section 3).

For each example L_i = -(1/|S|) sum_{t in S} log p(z_t | z_<t). The rows of G are dL_i/dK_t (and dL_i/dV_t) at all
real token positions t of all examples; U is the first r right singular vectors of G with its column mean removed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from spd.errors import InputError
from spd.example import Example
from spd.intervention import refuse_if_attached
from spd.likelihood import logits_at, padded
from spd.model_state import frozen, input_device, position_limit
from spd.progress import bar
from spd.provenance import config_hash, model_name, versions, weights_fingerprint
from spd.record import example_hashes, examples_hash
from spd.sites import Site, choose_layers, depth, find_sites
from spd.spans import EncodedExample, encode_examples
from spd.subspace import Basis, Subspace, check_rank, choose_rank
from spd_kernels import GradientCovariance, tap

INITIAL_FP16_SCALE = 2.0**12


def calibrate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    layers: Literal["paper", "middle", "last", "all"] | str | Sequence[int] = "paper",
    rank: Literal["half"] | str | int = "half",
    loss: Literal["spans", "full"] | str = "spans",
    center: bool = True,
    batch_size: int = 8,
    max_length: int = 256,
    progress: bool = True,
) -> Subspace:
    """Take the top singular directions of the correctness gradients at K and V.

    Gradients are summed up as they come: memory is one batch's activations and O(d^2) per layer and side, whatever
    the number of examples. Batch size, padding side and order of the examples change the result by rounding only.
    No parameter, gradient or mode of the model is left changed.

    Args:
        model: a causal language model of transformers.
        tokenizer: its fast tokenizer.
        examples: labelled examples; those whose spans leave no token within `max_length` are counted and left out.
        layers: "paper" (n // 2 and n - 1), "middle" or "last" (either of the two), "all", or layer indices.
        rank: "half" (d // 2), "full" (d), "energy:p" (the least with p of the squared singular values), or a number.
        loss: "spans" (the tokens of the examples' spans) or "full" (every token).
        center: remove the column mean of G, as published.
        batch_size: examples in one forward and backward pass.
        max_length: tokens after which a text is cut.
        progress: show a progress bar.

    Raises:
        InputError: unusable arguments, no example with a surviving span, or a NaN or infinite gradient (the message
            names the layer and the example).
    """
    _check_settings(rank, loss, batch_size, max_length)
    refuse_if_attached(model, "calibrate")
    sites = find_sites(model)
    chosen = [sites[layer] for layer in choose_layers(sites, layers, depth(model))]
    if not examples:
        raise InputError("examples: expected at least one calibration example, got none")
    max_length = min(max_length, position_limit(model) or max_length)
    encoded = encode_examples(tokenizer, examples, max_length=max_length, full=loss == "full")
    what = "token to predict" if loss == "full" else "span"
    kept = [example for example in encoded if example.targets]
    lost = [example.index for example in encoded if not example.targets]
    if not kept:
        raise InputError(
            f"examples: none of the {len(encoded)} has a surviving {what} within max_length = {max_length}"
        )
    cut, straddling = sum(example.cut for example in encoded), sum(example.straddling for example in kept)
    for count, message in (
        (len(lost), f"of {len(encoded)} examples have no surviving {what}: {lost}"),
        (cut, f"spans reach beyond max_length = {max_length} tokens and were cut"),
        (straddling, "tokens reach over the edge of their span and count as a whole"),
    ):
        if count:
            warnings.warn(f"calibrate: {count} {message}", stacklevel=2)

    kept.sort(key=lambda example: (len(example.tokens), example.index))
    batches = [kept[start : start + batch_size] for start in range(0, len(kept), batch_size)]
    totals: dict[tuple[int, str], GradientCovariance] = {}
    scale = INITIAL_FP16_SCALE if any(p.dtype == torch.float16 for p in model.parameters()) else 1.0
    shown = bar(total=len(kept), label="calibrate", unit="examples", show=progress)
    with frozen(model), torch.inference_mode(False), torch.enable_grad(), shown:
        for batch in batches:
            scale = _add_batch(model, chosen, batch, totals, scale)
            shown.update(len(batch))

    bases: dict[str, dict[int, Basis]] = {"k": {}, "v": {}}
    for site in chosen:
        for side in "kv":
            name = f"{side.upper()} of layer {site.layer}"
            bases[side][site.layer] = _basis(name, totals.get((site.layer, side)), rank, center)
    provenance = {
        "model": model_name(model),
        "model_class": type(model).__name__,
        "config_sha256": config_hash(model),
        "weights": weights_fingerprint(model),
        "examples_sha256": examples_hash(examples),
        "example_sha256": example_hashes(examples),
        "examples": len(kept),
        "examples_without_span": lost,
        "target_tokens": sum(len(example.targets) for example in kept),
        "straddling_tokens": straddling,
        "spans_cut": cut,
        "rows": totals[chosen[0].layer, "k"].count,
        "settings": {
            "layers": layers if isinstance(layers, str) else list(layers),
            "rank": rank,
            "loss": loss,
            "center": center,
            "max_length": max_length,
        },
        "versions": versions(),
    }
    return Subspace(bases["k"], bases["v"], provenance)


def _add_batch(
    model: nn.Module,
    sites: list[Site],
    batch: list[EncodedExample],
    totals: dict[tuple[int, str], GradientCovariance],
    scale: float,
) -> float:
    """Add one batch's gradient rows to `totals`; returns the loss scale that worked.

    A half-precision backward pass runs on a scaled loss, because gradients at K underflow float16. If the scaled
    gradients overflow instead, the batch is taken again at a smaller scale; nothing of the failed pass is kept.
    """
    tokens, real = padded([example.tokens for example in batch], input_device(model))
    while True:
        rows = {(site.layer, side): _BatchRows(scale) for site in sites for side in "kv"}
        with _tapped(sites, rows, real):
            (_loss(model, batch, tokens, real) * scale).backward()
        broken = [(layer, side, row) for (layer, side), r in rows.items() for row in r.broken_examples()]
        if not broken:
            for key, fresh in rows.items():
                if fresh.covariance is not None and key in totals:
                    totals[key].merge(fresh.covariance)
                elif fresh.covariance is not None:
                    totals[key] = fresh.covariance
            return scale
        if scale <= 1.0:
            layer, side, row = broken[0]
            raise InputError(
                f"examples: the gradient at {side.upper()} of layer {layer} is NaN or infinite "
                f"for example {batch[row].index} ({len({b[2] for b in broken})} examples in its batch are affected)"
            )
        scale /= 4.0


class _BatchRows:
    """The accumulator behind one tap for one batch: unscales, adds up, and remembers which examples broke."""

    def __init__(self, scale: float) -> None:
        self.covariance: GradientCovariance | None = None
        self.scale = scale
        self.finite: Tensor | None = None

    def update(self, g: Tensor, mask: Tensor | None = None) -> None:
        assert mask is not None
        mask = mask.to(g.device)
        self.covariance = GradientCovariance(g.shape[-1], g.device)
        self.finite = (g.isfinite().all(dim=-1) | ~mask).all(dim=-1)  # (B,)
        self.covariance.update(g if self.scale == 1.0 else g.float() / self.scale, mask)

    def broken_examples(self) -> list[int]:
        return [] if self.finite is None else (~self.finite).nonzero().flatten().tolist()


@contextmanager
def _tapped(sites: list[Site], rows: dict[tuple[int, str], _BatchRows], real: Tensor) -> Iterator[None]:
    """Forward hooks that tap K and V; nothing below the lowest site is part of the graph."""

    def hook_for(site: Site, sides: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            for side in sides:
                projection = site.side(side)
                tapped = tap(projection.read(output), rows[site.layer, side], real)
                output = projection.write(output, tapped)
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


def _loss(model: nn.Module, batch: list[EncodedExample], tokens: Tensor, real: Tensor) -> Tensor:
    """sum_i L_i over the batch: a sum, so that an example's gradient does not depend on its neighbours."""
    device = tokens.device
    rows = torch.tensor([row for row, example in enumerate(batch) for _ in example.targets], device=device)
    targets = torch.tensor([t for example in batch for t in example.targets], device=device)
    weights = torch.tensor([1.0 / len(example.targets) for example in batch for _ in example.targets], device=device)

    positions, column = torch.unique(targets - 1, return_inverse=True)
    logits = logits_at(model, tokens, real, positions)
    logits = logits[rows.to(logits.device), column.to(logits.device)].float()  # (|S|, vocabulary)
    losses = cross_entropy(logits, tokens[rows, targets].to(logits.device), reduction="none")
    return (losses * weights.to(losses.device)).sum()


def _basis(name: str, total: GradientCovariance | None, rank: str | int, center: bool) -> Basis:
    if total is None:
        raise InputError(f"model: no gradient reaches {name}; its layer is not part of the forward pass")
    if center:
        singular_values, vectors = total.eigh()
    else:
        mean = total.mean()
        squares, vectors = torch.linalg.eigh(total.covariance() + total.count * torch.outer(mean, mean))
        singular_values, vectors = squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    if not singular_values[0] > 0:
        raise InputError(f"examples: every gradient at {name} is zero; the loss does not depend on it")
    r = choose_rank(rank, singular_values)
    numerical_rank = int((singular_values > 1e-8 * singular_values[0]).sum())
    if numerical_rank < r and rank != "full":
        warnings.warn(
            f"calibrate: {name} has gradient rows of rank {numerical_rank} only, so the last {r - numerical_rank} of "
            f"{r} directions are arbitrary; use more examples or a smaller rank",
            stacklevel=3,
        )
    return Basis(vectors[:, :r].float().contiguous().cpu(), singular_values.double().contiguous().cpu())


def _check_settings(rank: object, loss: object, batch_size: object, max_length: object) -> None:
    check_rank(rank)
    if loss not in ("spans", "full"):
        raise InputError(f'loss: expected "spans" or "full", got {loss!r}')
    for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name}: expected an integer of at least {least}, got {value!r}")
