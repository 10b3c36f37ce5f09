"""The specification of the gradient covariance: keep every row, work in float64."""

from __future__ import annotations

import torch


def moments_reference(g: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Number of rows, their mean (d,) and their centred sum of squares (d, d), in float64."""
    rows = kept_rows(g, mask)
    mean = rows.sum(0) / max(rows.shape[0], 1)
    centred = rows - mean
    return rows.shape[0], mean, centred.mT @ centred


def spectrum_reference(g: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values (d,) of the centred row matrix and its right singular vectors in columns (d, d), in float64."""
    rows = kept_rows(g, mask)
    d = rows.shape[1]
    centred = rows - rows.mean(0)
    _, values, vectors = torch.linalg.svd(torch.cat((centred, centred.new_zeros(d, d))), full_matrices=False)
    return values, vectors.mT


def kept_rows(g: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The rows that count, (n, d), in float64."""
    rows = g.detach().reshape(-1, g.shape[-1])
    return (rows if mask is None else rows[mask.reshape(-1)]).double()
