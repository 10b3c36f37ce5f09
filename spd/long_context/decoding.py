"""Bytes of the cache and seconds of a token, mode beside mode at one context length.

The cache is filled without a prefill: a short one makes its layers, and what they hold is repeated up to the length.
Times do not depend on what the numbers are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from spd.errors import InputError
from spd.intervention import attach
from spd.intervention.latent_cache import cache_bytes
from spd.model_state import frozen, input_device, position_limit
from spd.profile import forget_peak, peak_bytes
from spd.subspace import Subspace

UNPROJECTED, STATIC = "unprojected", "static"
MODES = (UNPROJECTED, STATIC, "fold", "hook", "latent_v", "latent")
# The first token is not timed: growing buffers are copied when they meet it.
WARM_UP = 1
_PREFIX = 32


def measure(
    model: nn.Module,
    subspace: Subspace,
    context: int,
    *,
    modes: Sequence[str] = MODES,
    rounds: int = 5,
    tokens: int = 8,
    batch: int = 1,
    step: Callable[[str], object] = lambda mode: None,
) -> dict[str, dict[str, Any]]:
    """Decode the last `tokens` of `context` tokens in every mode once a round, in turn.

    Args:
        model: a causal language model of transformers.
        subspace: what is projected onto; its layers are those whose cache changes.
        context: tokens in the cache when the last one has been decoded.
        modes: names out of `MODES`. "static" is the model as it is over a cache of a fixed length.
        rounds: how often each mode is timed; the order turns round by round.
        tokens: decoded tokens that are timed together.
        batch: sequences.
        step: is told the mode when one measurement is done.

    Returns:
        For every mode: `bytes` of all keys and values, `bytes_by_layer`, `seconds` of a token in every round, and
        `peak_bytes` of the process (a GPU: of its memory) while decoding; or `refused`, the reason.

    Raises:
        InputError: an unknown mode, or a context that is too short or beyond the model's positions.
    """
    for mode in modes:
        if mode not in MODES:
            raise InputError(f"modes: expected names out of {', '.join(MODES)}, got {mode!r}")
    for name, value in (("rounds", rounds), ("tokens", tokens), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name}: expected a positive number, got {value}")
    check_context(model, context, least=least_context(tokens))
    found: dict[str, dict[str, Any]] = {mode: {"seconds": []} for mode in modes}
    with frozen(model), torch.inference_mode():
        for number in range(rounds):
            for mode in modes if number % 2 == 0 else reversed(modes):
                if "refused" not in found[mode]:
                    try:
                        _one(model, subspace, mode, context, tokens, batch, found[mode])
                    except InputError as error:
                        found[mode] = {"refused": str(error)}
                step(mode)
    return found


def least_context(tokens: int) -> int:
    """The shortest context whose last `tokens` can be timed."""
    return _PREFIX + WARM_UP + tokens


def check_context(model: nn.Module, context: int, *, least: int) -> None:
    """Raise InputError unless the model has so many positions, and the context at least so many tokens."""
    limit = position_limit(model)
    if limit is not None and context > limit:
        raise InputError(
            f"context: expected at most {limit} tokens, which is all the model has positions for, got {context}"
        )
    if context < least:
        raise InputError(f"context: expected at least {least} tokens, got {context}")


def filled_cache(model: Any, context: int, *, batch: int = 1, room: int = 0, static: bool = False) -> Cache:
    """A cache of `context` tokens as the model makes it in its present state, with made-up content.

    Args:
        model: the model, with whatever is attached.
        context: tokens held.
        batch: sequences.
        room: further tokens that a static cache has room for.
        static: of a fixed length.
    """
    config = model.config
    cache = StaticCache(config=config, max_cache_len=context + room) if static else DynamicCache(config=config)
    vocabulary = config.get_text_config().vocab_size
    prefix = torch.arange(batch * _PREFIX, device=input_device(model)).view(batch, -1) * 7919 % vocabulary
    _forward(model, prefix, cache)
    if all(isinstance(layer, (DynamicLayer, StaticLayer)) and not layer.is_sliding for layer in cache.layers):
        for layer in cache.layers:
            _fill(layer, context)
    else:  # windows and states keep what only a prefill gives them
        while int(cache.get_seq_length()) < context:
            _forward(model, prefix[:, : context - int(cache.get_seq_length())], cache)
    return cache


def _one(
    model: Any, subspace: Subspace, mode: str, context: int, tokens: int, batch: int, found: dict[str, Any]
) -> None:
    unprojected = mode in (UNPROJECTED, STATIC)
    with nullcontext() if unprojected else attach(model, subspace, mode=mode):
        steps = WARM_UP + tokens
        cache = filled_cache(model, context - steps, batch=batch, room=steps, static=mode == STATIC)
        device = input_device(model)
        token = torch.ones((batch, 1), dtype=torch.long, device=device)
        forget_peak(device)
        for _ in range(WARM_UP):
            _forward(model, token, cache)
        found["seconds"].append(_seconds(lambda: _forward(model, token, cache), tokens, device))
        by_layer = cache_bytes(cache)
        peak = peak_bytes(device)
    found["bytes_by_layer"] = list(by_layer.values())
    found["bytes"] = sum(by_layer.values())
    found["peak_bytes"] = peak if peak is None else max(peak, found.get("peak_bytes") or 0)


def _forward(model: Any, tokens: Tensor, cache: Cache) -> None:
    model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _fill(layer: Any, context: int) -> None:
    """Repeat the layer's first tokens up to `context`. Angles of positions that no token had stay zero."""
    fixed = isinstance(layer, StaticLayer)
    for name in ("keys", "values"):
        held = getattr(layer, name)
        if fixed:
            prefix = held[:, :, :_PREFIX].clone()
            for start in range(0, context, _PREFIX):
                held[:, :, start : min(start + _PREFIX, context)] = prefix[:, :, : context - start]
        else:
            setattr(layer, name, held.repeat(1, 1, -(-context // _PREFIX), 1)[:, :, :context].contiguous())
    if fixed:
        layer.cumulative_length.fill_(context)
    if getattr(layer, "positions", None) is not None:
        held = layer.positions
        positions = torch.arange(context, dtype=held.dtype, device=held.device)[None, None, :, None]
        layer.positions = positions.expand(held.shape[0], -1, -1, -1).contiguous()


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Of one call, over so many in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats
