"""What one call of `latent_attention`, or dense attention over the same tokens, must move and multiply."""

from __future__ import annotations

from spd_kernels.roofline import Work


def latent_attention_work(
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    rank_k: int | None,
    rank_v: int | None,
    itemsize: int,
    queries: int = 1,
) -> Work:
    """A rank of None is a dense side, kept as heads; (None, None) is ordinary attention.

    The angles count for nothing: they need not be read for every token.
    """
    d = kv_heads * head_dim
    rows = batch * heads * queries
    numbers = 2 * rows * head_dim  # q and the output
    products = 0
    for rank in (rank_k, rank_v):
        numbers += batch * tokens * (d if rank is None else rank) + (0 if rank is None else d * rank)
    # Keys are expanded token by token; of values only their weighted sum is.
    products += rows * tokens * head_dim + (0 if rank_k is None else batch * tokens * d * rank_k)
    products += rows * tokens * (head_dim if rank_v is None else rank_v)
    products += 0 if rank_v is None else rows * head_dim * rank_v
    return Work(numbers * itemsize, 2 * products)
