"""Batches that fit: halved where memory runs out, with a word to the user."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from spd.errors import InputError

T = TypeVar("T")
R = TypeVar("R")

_FULL = ("out of memory", "can't allocate memory", "std::bad_alloc", "_STATUS_ALLOC_FAILED")


class MemoryWarning(UserWarning):
    """Work goes on in smaller batches: what one process of several may have to say alone."""


class FittingBatches:
    """Works through batches of at most `size` items; one that does not fit in memory is halved, and so are all later.

    Args:
        size: how many items at first.
        caller: who speaks to the user.
        unit: what the items are, in the plural.
        fixed: refuse a batch that does not fit: in smaller ones sums would be rounded otherwise.
    """

    def __init__(self, size: int, *, caller: str, unit: str, fixed: bool = False) -> None:
        self.size = size
        self.caller = caller
        self.unit = unit
        self.fixed = fixed

    def run(self, batch: Sequence[T], work: Callable[[Sequence[T]], R]) -> Iterator[R]:
        """`work(part)` of each part of the batch, in order. After a failure `work` is called again with less.

        Raises:
            InputError: not even one item fits, or a batch does not and the size is fixed.
        """
        rest = batch
        while rest:
            part, rest = rest[: self.size], rest[self.size :]
            result = self._attempt(part, work)
            while result is None:
                part, rest = part[: self.size], [*part[self.size :], *rest]
                result = self._attempt(part, work)
            yield result[0]

    def _attempt(self, part: Sequence[T], work: Callable[[Sequence[T]], R]) -> tuple[R] | None:
        """None, and a smaller `size`, where memory ran out."""
        try:
            return (work(part),)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
        # here the failed attempt's frames, and the tensors that they held, are gone
        if len(part) == 1:
            raise InputError(f"{self.caller}: not even one of the {self.unit} fits in memory ({reason})")
        if self.fixed:
            raise InputError(
                f"{self.caller}: deterministic: {len(part)} {self.unit} at a time do not fit in memory, and fewer "
                f"would give other bytes ({reason})"
            )
        self.size = len(part) // 2
        import torch

        from spd.distributed import rank, size

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        where = f"rank {rank()}: " if size() > 1 else ""
        warnings.warn(
            f"{where}{self.caller}: {len(part)} {self.unit} at a time do not fit in memory; going on with {self.size}",
            MemoryWarning,
            stacklevel=4,
        )
        return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's or the machine's memory is full."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _FULL)
