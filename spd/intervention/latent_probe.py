"""Before latents are trusted: which models cannot have them, how a layer makes its keys, a trial against the hook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from spd.errors import InputError
from spd.intervention.hook import Hook
from spd.intervention.key_recipe import KeyRecipe, find_recipe
from spd.intervention.latent import Latent, own_attention_function
from spd.intervention.target import LatentMode, Target
from spd.model_state import frozen, input_device

# A left-padded prompt, a single token, a block as assisted decoding sends it, a single token.
_STEPS = (7, 1, 3, 1)
_PADDING = 3
# Relative difference of logits, and of keys, that rounding explains.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def refuse_unfit(model: nn.Module, mode: LatentMode, targets: Sequence[Target]) -> None:
    """Raise InputError if latents cannot serve a layer, naming its class, what is in the way, and a mode that works."""
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise InputError(
            f'mode "{mode}" cannot be used here: the model is split over devices by heads, which a subspace mixes; '
            'mode "fold" can, before it is split'
        )
    for target in targets:
        obstacle, instead = _obstacle(mode, target)
        if obstacle:
            kind = type(target.attention).__name__
            raise InputError(f'mode "{mode}" cannot be used here: layer {target.layer} ({kind}) {obstacle}; {instead}')
        implementation = getattr(getattr(target.attention, "config", None), "_attn_implementation", "eager")
        own_attention_function(target.attention, implementation)


def _obstacle(mode: LatentMode, target: Target) -> tuple[str | None, str]:
    attention: Any = target.attention
    config = getattr(attention, "config", None)
    dense = 'mode "fold" can'
    if getattr(attention, "sinks", None) is not None:
        return "has attention sinks", dense
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "caps its attention logits", dense
    if getattr(config, "alibi", False):
        return "biases its attention by distance (ALiBi)", dense
    kinds = getattr(config, "layer_types", None)
    kind = kinds[target.layer] if kinds and target.layer < len(kinds) else "full_attention"
    if getattr(attention, "sliding_window", None) is not None or kind != "full_attention":
        return f"attends within a window ({kind})", dense
    if mode == "latent":
        half = 'mode "latent_v" can'
        rope = getattr(config, "rope_parameters", None) or {}
        if "rope_type" not in rope:  # one set of parameters for each kind of layer
            rope = rope.get(kind) or {}
        partial = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
        if partial != 1.0:
            return f"rotates only a part of each head ({partial:g} of it)", half
        if rope.get("rope_type") in ("dynamic", "longrope"):
            return f"rotates by angles that change with the length ({rope['rope_type']})", half
    return None, ""


def install_latent(model: nn.Module, mode: LatentMode, targets: Sequence[Target]) -> Latent:
    """Install the mode, and keep it only if it gives the logits that the hook gives.

    Raises:
        InputError: the keys are made in a way that no recipe repeats, or the logits differ.
    """
    refuse_unfit(model, mode, targets)
    with frozen(model), torch.no_grad():
        expected, recipes = _reference(model, mode, targets)
        installed = Latent(mode, targets, recipes)
        try:
            try:
                found = _steps(model, DynamicCache(config=model.config))  # type: ignore[arg-type]
            except (RuntimeError, TypeError, ValueError) as error:
                raise InputError(f'mode "{mode}" cannot be used here: {error}; mode "fold" can be tried') from error
            difference = float((found - expected).norm() / expected.norm())
            if not difference <= _TOLERANCE[found.dtype]:
                other = "fold" if mode == "latent_v" else "latent_v"
                kind = type(targets[0].attention).__name__
                raise InputError(
                    f'mode "{mode}" cannot be used here: {kind} gives other logits under it than under mode "hook" '
                    f'(relative difference {difference:.1e}); try mode "{other}"'
                )
        except BaseException:
            installed.remove()
            raise
    return installed


def _reference(model: nn.Module, mode: LatentMode, targets: Sequence[Target]) -> tuple[Tensor, dict[int, KeyRecipe]]:
    """The hook's logits, and for mode "latent" every layer's recipe."""
    seen: dict[tuple[int, str], Any] = {}
    hook = Hook(targets, 0.0, 1.0)
    handles = []
    keys = [target for target in targets if target.side == "k"] if mode == "latent" else []
    for target in keys:

        def note_output(module: nn.Module, args: Any, output: Tensor, target: Target = target) -> None:
            seen.setdefault((target.layer, "projected"), target.projection.read(output))

        def note_angles(module: nn.Module, args: Any, kwargs: dict[str, Any], target: Target = target) -> None:
            seen.setdefault((target.layer, "angles"), kwargs.get("position_embeddings"))

        handles.append(target.projection.module.register_forward_hook(note_output))
        handles.append(target.attention.register_forward_pre_hook(note_angles, with_kwargs=True))
    try:
        cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
        expected = _steps(model, cache)
    finally:
        hook.remove()
        for handle in handles:
            handle.remove()
    recipes = {}
    for target in keys:
        projected = seen[target.layer, "projected"]
        cos, sin = seen[target.layer, "angles"] or (None, None)
        layer: Any = cache.layers[target.layer]
        first = layer.keys[:, :, : _STEPS[0]]
        recipe = find_recipe(target.attention, projected, cos, sin, first, _TOLERANCE[first.dtype])
        if recipe is None:
            raise InputError(
                f'mode "latent" cannot be used here: {type(target.attention).__name__} makes its keys from k_proj\'s '
                'output in a way that is not known; mode "latent_v" can be tried'
            )
        recipes[target.layer] = recipe
    return expected, recipes


def _steps(model: Any, cache: DynamicCache) -> Tensor:
    """Logits (2, tokens, vocabulary) of two sequences, one left-padded, taken in through the cache in a few steps."""
    device = input_device(model)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.arange(2 * sum(_STEPS), device=device).view(2, -1) * 7919 % vocabulary
    mask = torch.ones_like(tokens)
    mask[1, :_PADDING] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, start = [], 0
    for count in _STEPS:
        end = start + count
        out = model(
            input_ids=tokens[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        ).logits
        logits.append(out[:, -1:] if start == 0 else out)  # what stands in the padding is nobody's business
        start = end
    return torch.cat(logits, dim=1)
