"""Asking a model where its input goes, and leaving it as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
