"""Asking a model where its input goes, and leaving it as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from spd.errors import InputError


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: to the input embeddings, which may be on another device than the last layer, or offloaded."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    offload = getattr(embeddings, "_hf_hook", None)
    return torch.device(getattr(offload, "execution_device", None) or embeddings.weight.device)


def position_limit(model: nn.Module) -> int | None:
    """How many positions the text decoder has, if its configuration says."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no trainable parameter inside the block; modes and flags as before afterwards."""
    with preserved(model):
        model.eval()
        model.requires_grad_(False)
        yield


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put every module's training mode and every parameter's `requires_grad` back when the block ends."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def checkpointed(model: nn.Module, *, training: bool) -> Iterator[None]:
    """transformers' gradient checkpointing of every layer inside the block, of a model in training mode or not.

    Its non-reentrant kind goes back through the first graph and takes only values from what it computes again, so a
    tap sees every gradient once.

    Raises:
        InputError: the model's layers do not know it, or would drop values out where nobody trains.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"gradient_checkpointing: the layers of {type(model).__name__} cannot do it")
    own: dict[str, Any] = {"gradient_checkpointing": True}
    own["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False, preserve_rng_state=training)
    if not training:
        # A layer checkpoints in training mode alone; its children stay in evaluation mode, where dropout does nothing.
        own["training"] = True
        dropping = [
            name for name, value in vars(layers[0]).items() if "dropout" in name and isinstance(value, float) and value
        ]
        if dropping:
            raise InputError(f"gradient_checkpointing: {type(layers[0]).__name__} would apply its {dropping[0]}")
    before = [{name: vars(layer)[name] for name in own if name in vars(layer)} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(own)
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name in own:
                vars(layer).pop(name, None)
            vars(layer).update(values)
