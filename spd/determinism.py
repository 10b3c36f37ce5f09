"""The same bytes, whatever the machine's other settings are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside the block: how a sum is split over threads shows in its last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def why_not_deterministic(model: nn.Module) -> str:
    """Why the same bytes cannot be promised of this model; "" if they can."""
    kinds = {(parameter.device.type, parameter.dtype) for parameter in model.parameters()}
    devices = sorted({device for device, _ in kinds} - {"cpu"})
    dtypes = sorted({str(dtype).removeprefix("torch.") for _, dtype in kinds} - {"float32", "float64"})
    return ", ".join([*(f"on {each}" for each in devices), *(f"in {each}" for each in dtypes)])


def warn_if_not_deterministic(model: nn.Module, caller: str) -> None:
    """Say in one line that the same bytes cannot be promised, where that is so."""
    if why := why_not_deterministic(model):
        warnings.warn(
            f"{caller}: deterministic: the same bytes are promised on the CPU in float32 alone; the model is {why}",
            stacklevel=3,
        )
