"""The public routed projection, and the bank that it takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spd_kernels.launch import Implementation, needs_operator
from spd_kernels.routed.checks import check_bases, check_routed
from spd_kernels.routed.op import project_routed_op, project_rows


def project_routed(
    x: torch.Tensor,
    bank: torch.Tensor,
    index: torch.Tensor,
    *,
    a: float = 0.0,
    b: float = 1.0,
    rows: torch.Tensor | None = None,
    ranks: torch.Tensor | None = None,
    implementation: Implementation | None = None,
) -> torch.Tensor:
    """`project` of each sequence by the subspace that its index names; index -1 leaves a sequence as it is.

        y_b = a * x_b + b * (x_b @ bank[s]) @ bank[s].T,   s = index[b];   y_b = x_b where s = -1

    One launch on a GPU, which neither sorts nor waits for the indices: it can be captured in a CUDA graph, and replayed
    after index, rows or ranks were overwritten. Gradients to x and to bank; double backward works.

    On the CPU an index out of range is a ValueError. A GPU would have to be waited for: there the rows concerned come
    back as NaN, no other row is affected, and nothing outside the bank is read. fp64 runs the reference, which waits.

    Args:
        x: (B, ..., d), such as (B, T, d), any strides, fp32, fp16 or bf16; fp64 on the reference path. May be empty.
            With `rows`: packed rows (..., d), such as (N, d).
        bank: (S, d, r), S subspaces with 1 <= r <= d, of x's dtype and on its device. See `stack_subspaces`.
        index: (B,) int32 or int64, -1 to S - 1.
        rows: int32 or int64 of x's leading shape: the sequence of each row, 0 to B - 1. Rows of one sequence should
            mostly be neighbours: a tile of rows takes as many passes as it has subspaces.
        ranks: (S,) int32 or int64, 0 to r (a GPU clamps): subspace s has only its first ranks[s] columns. What stands
            behind them does not count, as long as it is finite, and takes no time. None: all columns count.
        implementation: as in `project`.
    """
    check_routed(x, bank, index, rows, ranks)
    run = project_routed_op if needs_operator(x, bank) else project_rows
    return run(x, bank, index, rows, ranks, float(a), float(b), implementation)


def stack_subspaces(bases: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """bank (S, d, r) and ranks (S,) int32 of bases (d, r_s) with 0 <= r_s <= d, padded with zero columns.

    r is the largest r_s, rounded up to a multiple of 16 where d allows, so that every row of the bank can be read in
    pieces of 16 bytes. Gradients flow back to the bases.
    """
    check_bases(bases)
    d = bases[0].shape[0]
    widest = max(1, *(u.shape[1] for u in bases))
    r = min(-(-widest // 16) * 16, d)
    bank = torch.stack([torch.nn.functional.pad(u, (0, r - u.shape[1])) for u in bases])
    return bank, torch.tensor([u.shape[1] for u in bases], dtype=torch.int32, device=bank.device)
