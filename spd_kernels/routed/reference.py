"""The specification of the routed projection: plain PyTorch, any device, float64-capable."""

from __future__ import annotations

import torch

from spd_kernels.project.reference import project_reference


def project_routed_reference(
    x: torch.Tensor,
    bank: torch.Tensor,
    index: torch.Tensor,
    a: float = 0.0,
    b: float = 1.0,
    rows: torch.Tensor | None = None,
    ranks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The projection of each sequence (of each row, where `rows` names its sequence) by the subspace of its index.

    Index -1 leaves x as it is; any other index outside the bank, and a row of no sequence, give NaN. It selects the
    rows of each subspace, and so waits for a GPU to tell them.
    """
    n_subspaces, _, r = bank.shape
    subspace = index if rows is None else _subspace_of_rows(index, rows)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for s in subspace.unique().tolist():
        chosen = subspace == s
        if s == -1:
            y[chosen] = x[chosen]
        elif 0 <= s < n_subspaces:
            u = bank[s] if ranks is None else bank[s, :, : min(max(int(ranks[s]), 0), r)]
            y[chosen] = project_reference(x[chosen], u, a, b)
        else:
            y[chosen] = torch.nan
    return y


def _subspace_of_rows(index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """index[rows], and -2 for a row of no sequence."""
    if index.numel() == 0:
        return torch.full_like(rows, -2)
    known = (rows >= 0) & (rows < index.numel())
    return torch.where(known, index[rows.clamp(0, index.numel() - 1)], -2)
