"""Retrieval and perplexity of a model as it stands, with whatever is attached to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Cache, DynamicCache

from spd.long_context.haystack import Haystack
from spd.model_state import frozen, input_device
from spd.stats import mean_interval, wilson_interval

CHUNK = 1024
"""Tokens taken in at once, so that activations and logits do not grow with the context."""
DEPTHS = 4
"""Stretches of the context that retrieval is counted by."""


def retrieval(model: nn.Module, haystacks: Iterable[Haystack]) -> dict[str, Any]:
    """How many needles come back word for word under greedy decoding.

    A haystack is taken in once; each of its needles is asked for by itself behind a copy of that cache.

    Returns:
        `correct` of `n`, `accuracy` and its `interval_95`; `by_depth`: the two counts in each stretch; `verdicts`: a
        string a haystack, 1 for every needle that came back and 0 for every other, in their order.
    """
    right, asked = [0] * DEPTHS, [0] * DEPTHS
    verdicts = []
    with frozen(model), torch.inference_mode():
        for haystack in haystacks:
            cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
            for _ in _logits(model, haystack.tokens, cache, keep=1):
                pass
            verdict = ""
            for needle in haystack.needles:
                depth = min(DEPTHS - 1, int(DEPTHS * needle.depth))
                tokens = needle.question + needle.answer
                logits = torch.cat(list(_logits(model, tokens[:-1], deepcopy(cache), keep=len(needle.answer))), dim=0)
                # Greedy decoding writes the answer if every token of it is the likeliest behind those before.
                found = logits[-len(needle.answer) :].argmax(-1).tolist() == needle.answer
                verdict += str(int(found))
                right[depth] += found
                asked[depth] += 1
            verdicts.append(verdict)
    correct, n = sum(right), sum(asked)
    return {
        "correct": correct,
        "n": n,
        "accuracy": correct / n,
        "interval_95": list(wilson_interval(correct, n)),
        "by_depth": [{"correct": c, "n": k} for c, k in zip(right, asked, strict=True)],
        "verdicts": verdicts,
    }


def token_losses(model: nn.Module, windows: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """-log p of every token of a window but the first, (tokens - 1,) float64, window by window."""
    with frozen(model), torch.inference_mode():
        for window in windows:
            cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
            targets = torch.tensor(window[1:])
            losses, start = [], 0
            for logits in _logits(model, window[:-1], cache):
                expected = targets[start : start + len(logits)].to(logits.device)
                losses.append(cross_entropy(logits.float(), expected, reduction="none").double().cpu())
                start += len(logits)
            yield torch.cat(losses)


def perplexity(model: nn.Module, windows: Iterable[Sequence[int]]) -> dict[str, Any]:
    """Mean loss over the second half of each window, where every token has half a window before it; and by position.

    Returns:
        `windows`: the mean loss of each one's second half, in nats; `perplexity` and its 95 % `interval_95` over the
        windows; `by_position`: mean loss between one power of two and the next.
    """
    halves, buckets = [], dict[int, list[Tensor]]()
    for losses in token_losses(model, windows):
        halves.append(float(losses[len(losses) // 2 :].mean()))
        end = 64
        start = 0
        while start < len(losses):
            buckets.setdefault(end, []).append(losses[start:end])
            start, end = end, 2 * end
    middle, low, high = mean_interval(halves)
    return {
        "windows": halves,
        "perplexity": math.exp(middle),
        "interval_95": [math.exp(low), math.exp(high)],
        "by_position": [{"end": end, "loss": float(torch.cat(parts).mean())} for end, parts in buckets.items()],
    }


def _logits(model: Any, tokens: Sequence[int], cache: Cache, keep: int = 0) -> Iterator[Tensor]:
    """Take tokens into the cache chunk by chunk; logits (tokens, vocabulary) of each, of its last `keep` if not 0."""
    ids = torch.tensor([list(tokens)], device=input_device(model))
    for start in range(0, ids.shape[1], CHUNK):
        chunk = ids[:, start : start + CHUNK]
        yield model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[0]
