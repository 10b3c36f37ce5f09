"""The next token of every row: greedy, or by the inverse of the cumulative distribution from the row's own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CANDIDATES = 128
"""Tokens that are looked at before a large vocabulary is sorted: most often they hold the whole nucleus."""

NO_TOKEN = -1
"""Chosen where no token can be: the largest logit of the row is not finite."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled.

    Args:
        temperature: of the softmax; 0 decodes greedily.
        top_k: how many of the most likely tokens may be sampled; None: all.
        top_p: nucleus mass, of what temperature and `top_k` leave.
        max_new_tokens: length limit.
        seed: of the random numbers.
    """

    temperature: float
    top_k: int | None
    top_p: float
    max_new_tokens: int
    seed: int

    def uniforms(self, indices: Sequence[int], device: torch.device) -> Tensor:
        """(B, max_new_tokens) in [0, 1): each prompt's are drawn from (seed, index), whatever stands beside it."""
        if self.temperature == 0:
            return torch.empty((len(indices), self.max_new_tokens), device=device)
        drawn = [np.random.default_rng([self.seed, index]).random(self.max_new_tokens) for index in indices]
        return torch.from_numpy(np.stack(drawn)).to(device)

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """(B,) tokens from logits (B, V) and uniform numbers (B,); `NO_TOKEN` in rows of NaN or infinity."""
        if self.temperature == 0:
            best = logits.argmax(dim=-1, keepdim=True)  # NaN counts as the largest
            return torch.where(logits.gather(-1, best).isfinite(), best, NO_TOKEN)[:, 0]
        scores = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[:, -1:], float("-inf"))
        shares = scores.softmax(dim=-1)
        if self.top_p < 1.0:
            shares = shares.masked_fill(shares < least_of_nucleus(shares, self.top_p), 0.0)
        cumulative = shares.cumsum(dim=-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        # below the total even where the product rounds up to it: nothing that has no share is ever chosen
        wanted = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        found = torch.searchsorted(cumulative, wanted, right=True)
        return torch.where(total > 0.0, found, NO_TOKEN)[:, 0]


def least_of_nucleus(shares: Tensor, top_p: float) -> Tensor:
    """(B, 1) the least share among the most likely tokens that together have at least `top_p`."""
    if shares.shape[1] > 8 * CANDIDATES:
        best = shares.topk(CANDIDATES).values
        if bool((best.sum(dim=-1, dtype=torch.float64) >= top_p).all()):
            return _least(best, top_p)
    if shares.device.type == "cpu":  # numpy sorts values four times as fast as torch sorts values with their places
        return _least(torch.from_numpy(np.sort(shares.numpy(), axis=1)).flip(1), top_p)
    return _least(shares.sort(dim=-1, descending=True).values, top_p)


def _least(falling: Tensor, top_p: float) -> Tensor:
    before = falling.cumsum(dim=-1, dtype=torch.float64) - falling
    return falling.masked_fill(before >= top_p, float("inf")).amin(dim=-1, keepdim=True)
