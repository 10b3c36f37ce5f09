"""Cosines and sines by position, collected from what the model's own rotary module computes as tokens come by."""

from __future__ import annotations

import torch
from torch import Tensor


class RotaryTable:
    """Mode "latent" rotates its keys anew in every step, and needs the angles of every cached position.

    One table serves the layers that are rotated alike, on one device and in one dtype.

    Args:
        limit: how many positions the model has, if known. On a GPU the table then has them all from the start, for
            finding the largest position that came by would mean waiting for it.

    Attributes:
        cos, sin: (positions, head_dim / 2); rows of positions not seen yet are NaN, so that no use of them goes unseen.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.cos: Tensor = torch.empty(0)
        self.sin: Tensor = torch.empty(0)
        self._limit = limit or 0
        self._last: Tensor | None = None

    def note(self, positions: Tensor, cos: Tensor, sin: Tensor, room: int, source: Tensor) -> None:
        """Keep the angles cos, sin (B, T, D / 2) of positions (B, T); negative ones are padding.

        Args:
            room: how many positions there can be, as far as the cache knows.
            source: what cos was taken of: the same tensor for every layer of one step.
        """
        if not torch.compiler.is_compiling():
            if source is self._last:
                return
            self._last = source
            known = int(positions.max()) + 1 if positions.device.type == "cpu" else self._limit
            room = max(room, known)
        if self.cos.shape[0] <= room:
            self._grow(room, cos)
        spare = self.cos.shape[0] - 1  # the last row takes what nobody asks for
        where = torch.where(positions < 0, spare, positions).reshape(-1).long()
        self.cos[where] = cos.expand(*positions.shape, -1).flatten(0, 1)
        self.sin[where] = sin.expand(*positions.shape, -1).flatten(0, 1)

    def _grow(self, room: int, like: Tensor) -> None:
        known = max(self.cos.shape[0] - 1, 0)
        room = max(room, 2 * known, 256)
        with torch.inference_mode(False), torch.no_grad():
            # Plain tensors, which may be written inside inference mode and outside of it.
            cos, sin = (
                torch.full((room + 1, like.shape[-1]), torch.nan, dtype=like.dtype, device=like.device)
                for _ in range(2)
            )
            if known:
                cos[:known], sin[:known] = self.cos[:known], self.sin[:known]
        self.cos, self.sin = cos, sin
