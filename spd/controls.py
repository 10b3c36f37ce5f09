"""Subspaces and examples that the method should beat: what the paper does not compare itself with.

Every subspace here has the layers, ranks and model identity of the one it stands beside, and says in its provenance,
under `control`, how it was made. The gradient subspace of shuffled labels is `calibrate` on `shuffled_labels`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spd.errors import InputError
from spd.example import Example
from spd.files import sha256
from spd.intervention import refuse_if_attached
from spd.likelihood import logits_at, padded
from spd.model_state import frozen, input_device, position_limit
from spd.progress import bar
from spd.sites import Site, find_sites
from spd.spans import encode_examples
from spd.subspace import Basis, Subspace
from spd_kernels import GradientCovariance

Span = tuple[int, int]


def random_subspace(like: Subspace, seed: int) -> Subspace:
    """Uniformly distributed subspaces of the same ranks, each site's drawn by itself.

    U is the Q of a Gaussian (d, r) matrix. There is no spectrum: the singular values are ones, and `energy` is r / d.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(layer: int, side: str, basis: Basis) -> Basis:
        gaussian = torch.randn(basis.width, basis.rank, dtype=torch.float64, generator=generator)
        ones = torch.ones(basis.width, dtype=torch.float64)
        return Basis(torch.linalg.qr(gaussian).Q.float().contiguous(), ones)

    return _beside(like, draw, {"kind": "random", "seed": seed})


def bottom_subspace(full: Subspace, like: Subspace) -> Subspace:
    """The last r right singular directions of the gradients: those in which correctness is decided least.

    Columns and singular values go from the smallest up, so that `energy` is still the share these directions hold. At
    r > d/2 they share at least 2r - d directions with the first r. Directions that no gradient reaches (fewer rows than
    d) are among the last, in arbitrary order.

    Args:
        full: calibrated on the same model with rank = d ("full").
        like: whose layers and ranks to take.

    Raises:
        InputError: `full` does not hold all d directions at a layer of `like`, or is of another model.
    """
    if full.provenance.get("config_sha256") != like.provenance.get("config_sha256"):
        raise InputError("full: expected a subspace of the same model as like, but their configurations differ")

    def last(layer: int, side: str, basis: Basis) -> Basis:
        found = full.side(side).get(layer)
        if found is None or found.width != basis.width or found.rank < found.width:
            held = "nothing" if found is None else f"{found.rank} of {found.width}"
            raise InputError(
                f"full: expected all {basis.width} directions of {side.upper()} at layer {layer}, it holds {held}; "
                'calibrate with rank "full"'
            )
        return Basis(found.basis.flip(1)[:, : basis.rank].contiguous(), found.singular_values.flip(0))

    return _beside(like, last, {"kind": "bottom"})


def activation_subspace(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    like: Subspace,
    *,
    batch_size: int = 8,
    max_length: int = 256,
    progress: bool = True,
) -> Subspace:
    """The principal directions of K and V themselves: where they vary most, whether or not it decides anything.

    The rows are K and V at the very positions whose gradients `calibrate` takes from these examples: all real tokens of
    those that keep a span within `max_length`. Their mean is removed.

    Args:
        model: the model `like` was calibrated on, without an intervention.
        tokenizer: its fast tokenizer.
        examples: those `like` was calibrated on.
        like: whose layers and ranks to take.
        batch_size: examples in one forward pass.
        max_length: tokens after which a text is cut.
        progress: show a progress bar.

    Raises:
        InputError: another model, an intervention on it, or no example that keeps a span.
    """
    refuse_if_attached(model, "activation_subspace")
    like.check_model(model)
    sites = find_sites(model)
    missing = [layer for layer in like.layers if layer not in sites]
    if missing:
        raise InputError(f"like: it has layers {missing}, but the model's layers with K and V are {list(sites)}")
    max_length = min(max_length, position_limit(model) or max_length)
    full = like.provenance.get("settings", {}).get("loss") == "full"
    encoded = [each for each in encode_examples(tokenizer, examples, max_length=max_length, full=full) if each.targets]
    if not encoded:
        raise InputError(f"examples: none of the {len(examples)} has a surviving span within max_length = {max_length}")
    encoded.sort(key=lambda each: (len(each.tokens), each.index))

    rows: dict[tuple[int, str], GradientCovariance] = {}
    shown = bar(total=len(encoded), label="activations", unit="examples", show=progress)
    with frozen(model), torch.no_grad(), shown:
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            tokens, real = padded([each.tokens for each in batch], input_device(model))
            with _observed([sites[layer] for layer in like.layers], rows, real):
                logits_at(model, tokens, real, torch.zeros(1, dtype=torch.long, device=tokens.device))
            shown.update(len(batch))

    def principal(layer: int, side: str, basis: Basis) -> Basis:
        singular_values, vectors = rows[layer, side].eigh()
        return Basis(vectors[:, : basis.rank].float().contiguous().cpu(), singular_values.contiguous().cpu())

    digest = sha256(json.dumps([[each.prompt, each.completion, each.spans] for each in examples]))
    count = rows[like.layers[0], "k"].count
    made = {"kind": "activations", "examples_sha256": digest, "rows": count, "max_length": max_length}
    return _beside(like, principal, made)


def shuffled_labels(
    examples: Sequence[Example], seed: int, *, exchange: Literal["completions", "spans"] | str = "completions"
) -> list[Example]:
    """The same prompts, each with the label of another example, so that what is correct no longer follows from it.

    With `exchange="completions"` an example's completion, and the spans in it, become its partner's. A label quoted in
    the prompt (MBPP's asserts) is replaced there as well: the texts of the prompt's spans give way to those of the
    partner's, which begin anew where it has fewer. Reasoning in a completion moves with the answer, and the answer
    still follows from that. With `exchange="spans"` the texts of the completion's spans alone give way, as they do in
    the prompt: the reasoning stays and the answer contradicts it.

    Partners are drawn at random among those with other labels (the texts of the spans, or the completion where there
    are none), so that no example keeps its own, not even a letter that its partner shares.

    Raises:
        InputError: more than half of the examples have one label, some but not all have spans in the prompt (with
            `exchange="spans"`: or in the completion, or none has any), or a span overlaps another or the end of the
            prompt.
    """
    if exchange not in ("completions", "spans"):
        raise InputError(f'exchange: expected "completions" or "spans", got {exchange!r}')
    spans = [_by_part(index, example) for index, example in enumerate(examples)]
    _check_alike("prompt", [in_prompt for in_prompt, _ in spans])
    if exchange == "spans":
        _check_alike("completion", [in_completion for _, in_completion in spans])
        if not any(in_prompt or in_completion for in_prompt, in_completion in spans):
            raise InputError('exchange: "spans" needs examples with spans, these have none')
    labels = [tuple(each.text[start:end] for start, end in each.spans) or (each.completion,) for each in examples]
    shuffled = []
    for index, partner in enumerate(_partners(labels, Random(f"shuffled labels/{seed}"))):
        one, other = examples[index], examples[partner]
        prompt, quoted = _replaced(one.prompt, spans[index][0], other.prompt, spans[partner][0])
        completion, marked = other.completion, spans[partner][1]
        if exchange == "spans":
            completion, marked = _replaced(one.completion, spans[index][1], other.completion, spans[partner][1])
        marked = [(start + len(prompt), end + len(prompt)) for start, end in marked]
        shuffled.append(Example(prompt, completion, quoted + marked))
    return shuffled


def _beside(like: Subspace, make: Callable[[int, str, Basis], Basis], control: dict[str, Any]) -> Subspace:
    """A subspace with what `make` gives for every layer and side of `like`."""
    k = {layer: make(layer, "k", like.k[layer]) for layer in like.layers}
    v = {layer: make(layer, "v", like.v[layer]) for layer in like.layers}
    return Subspace(k, v, like.provenance | {"control": control})


@contextmanager
def _observed(sites: list[Site], rows: dict[tuple[int, str], GradientCovariance], real: Tensor) -> Iterator[None]:
    """Forward hooks that add the real tokens' K and V to `rows`."""

    def hook_for(site: Site, side: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            value = site.side(side).read(output)
            if (site.layer, side) not in rows:
                rows[site.layer, side] = GradientCovariance(value.shape[-1], value.device)
            rows[site.layer, side].update(value, real.to(value.device))

        return hook

    handles = []
    try:
        for site in sites:
            for side in "kv":
                handles.append(site.side(side).module.register_forward_hook(hook_for(site, side)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_part(index: int, example: Example) -> tuple[list[Span], list[Span]]:
    """The spans in the prompt, and those in the completion counted from its start, in order."""
    border = len(example.prompt)
    spans = sorted(example.spans)
    apart = all(end <= start for (_, end), (start, _) in pairwise(spans))
    if not apart or any(start < border < end for start, end in spans):
        raise InputError(f"examples: the spans of example {index} overlap each other or the end of its prompt: {spans}")
    in_prompt = [span for span in spans if span[1] <= border]
    return in_prompt, [(start - border, end - border) for start, end in spans[len(in_prompt) :]]


def _check_alike(part: str, spans: Sequence[list[Span]]) -> None:
    without = [index for index, each in enumerate(spans) if not each]
    if 0 < len(without) < len(spans):
        raise InputError(f"examples: expected spans in every {part} or in none; without: {without[:10]}")


def _partners(labels: Sequence[tuple[str, ...]], rng: Random) -> list[int]:
    """A random permutation that gives no position one of its own label."""
    label, most = Counter(labels).most_common(1)[0] if labels else (("",), 0)
    if 2 * most > len(labels):
        raise InputError(
            f"examples: {most} of {len(labels)} have the label {' '.join(label)!r:.60}, so that not every one can be "
            "given another; at most half may have the same"
        )
    partners = list(range(len(labels)))
    rng.shuffle(partners)
    for one in range(len(labels)):
        if labels[partners[one]] == labels[one]:
            # No label is that of more than half, so there is another with which to exchange partners.
            others = [
                other for other in range(len(labels)) if labels[one] not in (labels[other], labels[partners[other]])
            ]
            other = rng.choice(others)
            partners[one], partners[other] = partners[other], partners[one]
    return partners


def _replaced(text: str, spans: list[Span], other: str, others: list[Span]) -> tuple[str, list[Span]]:
    """`text` with the texts of another's spans in place of its own, and where those are now."""
    made, position, placed = "", 0, []
    for number, (start, end) in enumerate(spans):
        made += text[position:start]
        first, last = others[number % len(others)]
        placed.append((len(made), len(made) + last - first))
        made += other[first:last]
        position = end
    return made + text[position:], placed
