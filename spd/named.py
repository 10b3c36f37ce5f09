"""What layers and ranks may be called, known without a model or torch, so that a bad name is refused at once."""

from __future__ import annotations

from spd.errors import InputError

NAMED_LAYERS = ("paper", "middle", "last", "all")


def check_rank(rank: object) -> None:
    """Raise InputError unless `rank` is "half", "full", "energy:p" with 0 < p <= 1, or a positive integer."""
    if rank in ("half", "full") or (isinstance(rank, int) and not isinstance(rank, bool) and rank > 0):
        return
    if isinstance(rank, str) and rank.startswith("energy:"):
        try:
            if 0.0 < float(rank.removeprefix("energy:")) <= 1.0:
                return
        except ValueError:
            pass
    raise InputError(f'rank: expected "half", "full", "energy:p" with 0 < p <= 1, or a positive integer, got {rank!r}')
