"""Which tokens of the calibration text carry the gradient that a subspace is taken from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spd.errors import InputError
from spd.example import Example
from spd.gradients import correctness_loss, initial_scale, tapped
from spd.intervention import refuse_if_attached
from spd.likelihood import padded
from spd.model_state import frozen, input_device, position_limit
from spd.progress import bar
from spd.sites import choose_layers, depth, find_sites
from spd.spans import encode_examples

Part = Literal["prompt", "completion"]


@dataclass(frozen=True)
class TokenGradients:
    """One example and how long the gradient is at each of its tokens.

    Args:
        index: the example's position in what was passed.
        text: the whole text, prompt and completion.
        prompt: how many of its characters are the prompt.
        offsets: half-open character interval of every token; empty for a token that stands for no text.
        counted: positions in S.
        norms: (side, layer) -> norm of dL/dK_t or dL/dV_t for every token t, L the example's own loss.
    """

    index: int
    text: str
    prompt: int
    offsets: list[tuple[int, int]]
    counted: list[int]
    norms: dict[tuple[str, int], list[float]]

    def total(self, side: str) -> list[float]:
        """For every token, the norm over all layers together: the root of the sum of squares."""
        layers = [values for (of, _), values in self.norms.items() if of == side]
        return [sum(value * value for value in token) ** 0.5 for token in zip(*layers, strict=True)]

    def part(self, position: int) -> Part | Literal["S"]:
        if position in self.counted:
            return "S"
        return "prompt" if self.offsets[position][0] < self.prompt else "completion"


def token_gradients(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    layers: Literal["paper", "middle", "last", "all"] | str | Sequence[int] = "paper",
    *,
    loss: Literal["spans", "full"] | str = "spans",
    batch_size: int = 8,
    max_length: int = 256,
    progress: bool = True,
) -> list[TokenGradients]:
    """The norms of the rows of G, before its column mean is removed, token by token.

    The gradients are those of `spd.calibrate` with the same arguments. Nothing of the model is left changed. Examples
    without a token in S have no gradient and are left out.

    Args:
        model: a causal language model of transformers.
        tokenizer: its fast tokenizer.
        examples: labelled examples.
        layers, loss, batch_size, max_length: as in `spd.calibrate`.
        progress: show a progress bar.

    Raises:
        InputError: unusable arguments, no example with a token in S, or a gradient that is NaN or infinite.
    """
    if loss not in ("spans", "full"):
        raise InputError(f'loss: expected "spans" or "full", got {loss!r}')
    for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name}: expected an integer of at least {least}, got {value!r}")
    refuse_if_attached(model, "token_gradients")
    sites = find_sites(model)
    chosen = [sites[layer] for layer in choose_layers(sites, layers, depth(model))]
    max_length = min(max_length, position_limit(model) or max_length)
    encoded = encode_examples(tokenizer, examples, max_length=max_length, full=loss == "full")
    kept = sorted((each for each in encoded if each.targets), key=lambda each: len(each.tokens))
    if not kept:
        raise InputError(f"examples: none of the {len(encoded)} has a token in S within max_length = {max_length}")

    found: dict[int, TokenGradients] = {}
    shown = bar(total=len(kept), label="gradients", unit="examples", show=progress)
    with frozen(model), torch.inference_mode(False), torch.enable_grad(), shown:
        for first in range(0, len(kept), batch_size):
            batch = kept[first : first + batch_size]
            tokens, real = padded([each.tokens for each in batch], input_device(model))
            scale = initial_scale(model)
            while True:
                rows: dict[Any, Any] = {(site.layer, side): _Norms() for site in chosen for side in "kv"}
                with tapped(chosen, rows, real):
                    (correctness_loss(model, batch, tokens, real) * scale).backward()
                norms = {(side, layer): each.of(real) / scale for (layer, side), each in rows.items()}
                broken = [key for key, values in norms.items() if not values.isfinite().all()]
                if not broken:
                    break
                if scale <= 1.0:
                    side, layer = broken[0]
                    row = int((~norms[side, layer].isfinite()).any(dim=-1).nonzero()[0])
                    where = f"{side.upper()} of layer {layer}"
                    raise InputError(
                        f"examples: the gradient at {where} is NaN or infinite for example {batch[row].index}"
                    )
                scale /= 4.0  # float16 overflowed; from what is too small it has underflowed before
            for row, each in enumerate(batch):
                example, at = examples[each.index], real[row].cpu()
                read = tokenizer(example.text, return_offsets_mapping=True, truncation=True, max_length=max_length)
                found[each.index] = TokenGradients(
                    each.index,
                    example.text,
                    len(example.prompt),
                    [(start, end) for start, end in read["offset_mapping"]],
                    each.targets,
                    {key: values[row][at].tolist() for key, values in norms.items()},
                )
            shown.update(len(batch))
    return [found[index] for index in sorted(found)]


class _Norms:
    """The accumulator behind one tap: the length of every row."""

    def __init__(self) -> None:
        self.norms: Tensor | None = None

    def update(self, g: Tensor, mask: Tensor | None = None) -> None:
        self.norms = torch.linalg.vector_norm(g.double(), dim=-1).cpu()

    def of(self, real: Tensor) -> Tensor:
        """(B, T); zeros where no gradient came by."""
        if self.norms is None:
            return torch.zeros(real.shape, dtype=torch.float64)
        return self.norms.masked_fill(~real.cpu(), 0.0)
