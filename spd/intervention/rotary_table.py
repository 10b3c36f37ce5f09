"""Cosines and sines by position, collected from what the model's own rotary module computes as tokens come by."""

from __future__ import annotations

import torch
from torch import Tensor


class RotaryTable:
    """Mode "latent" rotates its keys anew in every step, and needs the angles of every cached position.

    Attributes:
        cos, sin: (positions, head_dim / 2); rows of positions not seen yet are NaN, so that no use of them goes unseen.
    """

    def __init__(self) -> None:
        self.cos: Tensor = torch.empty(0)
        self.sin: Tensor = torch.empty(0)
        self._last: Tensor | None = None

    def note(self, positions: Tensor, cos: Tensor, sin: Tensor, room: int) -> None:
        """Keep the angles cos, sin (B, T, D / 2) of positions (B, T); no position exceeds `room` - 1."""
        if cos is self._last:
            return  # another layer of the same step was here
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():
            room = max(room, int(positions.max()) + 1)
        if self.cos.shape[0] < room or self.cos.device != cos.device or self.cos.dtype != cos.dtype:
            self._grow(room, cos)
        where = positions.reshape(-1).long()
        self.cos[where] = cos.expand(*positions.shape, -1).flatten(0, 1)
        self.sin[where] = sin.expand(*positions.shape, -1).flatten(0, 1)

    def _grow(self, room: int, like: Tensor) -> None:
        known = self.cos.shape[0] if self.cos.device == like.device and self.cos.dtype == like.dtype else 0
        room = max(room, 2 * known, 256)
        with torch.inference_mode(False), torch.no_grad():
            # Plain tensors, which may be written inside inference mode and outside of it.
            cos, sin = (like.new_full((room, like.shape[-1]), torch.nan) for _ in range(2))
            if known:
                cos[:known], sin[:known] = self.cos, self.sin
        self.cos, self.sin = cos, sin
