"""Phase 1: the subspaces in which correctness is decided, from the gradients at K and V (arXiv 2605.22675, section 3).

The rows of G are the gradients, as `spd.gradients` has them, of all examples; U is the first r right singular vectors
of G with its column mean removed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from spd import distributed
from spd.determinism import one_thread, warn_if_not_deterministic
from spd.errors import InputError
from spd.example import Example
from spd.gradients import GradientSums
from spd.intervention import refuse_if_attached
from spd.memory import FittingBatches
from spd.model_state import frozen, position_limit
from spd.progress import bar
from spd.provenance import config_hash, model_name, versions, weights_fingerprint
from spd.record import example_hashes, examples_hash
from spd.sites import choose_layers, depth, find_sites
from spd.spans import EncodedExample, encode_examples
from spd.subspace import Basis, Subspace, check_rank, choose_rank
from spd_kernels import GradientCovariance

DETERMINISTIC_BATCH = 8


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
    gradient_checkpointing: bool = False,
    deterministic: bool = False,
    progress: bool = True,
) -> Subspace:
    """Take the top singular directions of the correctness gradients at K and V.

    Gradients are summed up as they come: memory is one batch's activations and O(d^2) per layer and side, whatever
    the number of examples. Batch size, padding side and order of the examples change the result by rounding only.
    A batch that does not fit in memory is halved, with a warning. No parameter, gradient or mode of the model is left
    changed.

    Under torchrun or torch.distributed every process must call this with the same arguments. Each takes its share of
    the batches, the sums are added up over all, and all return the very same subspace, which does not depend on their
    number but for rounding. The model may be sharded by `fully_shard`; then the batch size is not lowered, since the
    processes cannot try a pass again. It may be spread or offloaded by `device_map`. FSDP's older wrapper is refused.

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
        gradient_checkpointing: keep of every layer its input alone and compute it again on the way back: less memory
            for a second forward pass of the layers above the lowest one chosen.
        deterministic: the same bytes on the same machine with as many processes, whatever the batch size and the number
            of threads: 8 examples at a time in one thread, and never fewer. Kept on the CPU in float32; elsewhere a
            warning says that it cannot be.
        progress: show a progress bar.

    Raises:
        InputError: unusable arguments, no example with a surviving span, a NaN or infinite gradient (the message names
            the layer and the example), or no room for even one example, or where deterministic for one batch.
    """
    distributed.join()
    with distributed.failing_together():
        _check_settings(rank, loss, batch_size, max_length)
        refuse_if_attached(model, "calibrate")
        sharded = distributed.is_sharded(model)
        sites = find_sites(model)
        chosen = [sites[layer] for layer in choose_layers(sites, layers, depth(model))]
        max_length = min(max_length, position_limit(model) or max_length)
        encoded = encode_examples(tokenizer, examples, max_length=max_length, full=loss == "full")
        kept = _with_targets(encoded, "token to predict" if loss == "full" else "span", max_length)
    if deterministic:
        batch_size = DETERMINISTIC_BATCH
        if distributed.is_main():
            warn_if_not_deterministic(model, "calibrate")
    threads = one_thread if deterministic else nullcontext
    weights = weights_fingerprint(model)
    settings = {
        "layers": layers if isinstance(layers, str) else list(layers),
        "rank": rank,
        "loss": loss,
        "center": center,
        "max_length": max_length,
    }
    distributed.check_same("examples", examples_hash(examples))
    distributed.check_same("model", weights)
    distributed.check_same("settings", settings | {"batch_size": batch_size, "deterministic": deterministic})

    sums = GradientSums(model, chosen, sharded=sharded, gradient_checkpointing=gradient_checkpointing)
    # A sharded model's processes wait for one another in every pass, and say together what is wrong with a gradient.
    agreeing = nullcontext() if sharded else distributed.failing_together()
    with agreeing, threads(), frozen(model), torch.inference_mode(False), torch.enable_grad():
        _sum_up(sums, kept, batch_size, deterministic, progress)
    sums.all_reduce()
    bases: dict[str, dict[int, Basis]] = {"k": {}, "v": {}}
    with distributed.failing_together(), threads():
        for site in chosen if distributed.is_main() else []:
            for side in "kv":
                name = f"{side.upper()} of layer {site.layer}"
                bases[side][site.layer] = _basis(name, sums.totals[site.layer, side], rank, center)
    bases = distributed.broadcast(bases)
    provenance = {
        "model": model_name(model),
        "model_class": type(model).__name__.removeprefix("FSDP" if sharded else ""),
        "config_sha256": config_hash(model),
        "weights": weights,
        "examples_sha256": examples_hash(examples),
        "example_sha256": example_hashes(examples),
        "examples": len(kept),
        "examples_without_span": [example.index for example in encoded if not example.targets],
        "target_tokens": sum(len(example.targets) for example in kept),
        "straddling_tokens": sum(example.straddling for example in kept),
        "spans_cut": sum(example.cut for example in encoded),
        "rows": sums.totals[chosen[0].layer, "k"].count,
        "settings": settings,
        "versions": versions(),
    }
    return Subspace(bases["k"], bases["v"], provenance)


def _with_targets(encoded: list[EncodedExample], what: str, max_length: int) -> list[EncodedExample]:
    """The examples that have a token in S, the short ones first; says what is lost of the others."""
    if not encoded:
        raise InputError("examples: expected at least one calibration example, got none")
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
        if count and distributed.is_main():
            warnings.warn(f"calibrate: {count} {message}", stacklevel=3)
    return sorted(kept, key=lambda example: (len(example.tokens), example.index))


def _sum_up(sums: GradientSums, kept: list[EncodedExample], batch_size: int, fixed: bool, progress: bool) -> None:
    """Add this process's share of the batches to the sums."""
    processes, rank = distributed.size(), distributed.rank()
    size = min(batch_size, -(-len(kept) // processes))
    batches = [kept[start : start + size] for start in range(0, len(kept), size)]
    own = batches[rank::processes]
    shown = bar(total=sum(map(len, own)), label="calibrate", unit="examples", show=progress and distributed.is_main())
    fitting = FittingBatches(size, caller="calibrate", unit="examples", fixed=fixed)
    with shown:
        for batch in own:
            # Where all processes make a pass together, one of them cannot try it again.
            parts = [sums.rows_of(batch)] if sums.sharded else fitting.run(batch, sums.rows_of)
            for rows in parts:
                sums.add(rows)
            shown.update(len(batch))
        if sums.sharded and len(own) < -(-len(batches) // processes):
            sums.rows_of(kept[:1], counted=False)  # as many passes as the others, since all make them together


def _basis(name: str, total: GradientCovariance, rank: str | int, center: bool) -> Basis:
    if total.count == 0:
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
