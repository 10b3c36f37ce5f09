"""The public accumulator of gradient rows, and the update of several at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from spd_kernels.checks import check_rows
from spd_kernels.covariance.config import CHUNK_BYTES, REDUCE_BYTES, TRIANGLE_BAND
from spd_kernels.launch import Implementation, requested, uses_triton

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


class GradientCovariance:
    """Number, mean and centred sum of squares of rows that are seen once and not kept.

    Memory is O(d^2) plus one chunk of rows, however many rows come. The sums are fp64. fp32 and fp64 rows are centred
    and multiplied in fp64, so that no direction is lost to the squared condition number; the products of 16-bit rows
    are exact in fp32 and, on a GPU, are summed there over short splits by a Triton kernel. The order and batching of
    the rows matter to rounding alone. `update` never waits for the GPU.

    Args:
        d: width of a row.
        device: where the sums live and the rows come from; None is PyTorch's default device.
        implementation: see `project`; concerns 16-bit rows alone.
    """

    def __init__(
        self, d: int, device: torch.device | str | None = None, *, implementation: Implementation | None = None
    ) -> None:
        if isinstance(d, bool) or not isinstance(d, int) or d < 1:
            raise ValueError(f"d: expected a positive int; got {d!r}")
        if implementation is not None:
            requested(implementation)
        self.d = d
        self._implementation = implementation
        # All on the device, so that a masked update on a GPU need not ask how many rows it kept.
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._mean = torch.zeros(d, dtype=torch.float64, device=device)
        # Only the upper triangle means anything; `covariance` mirrors it.
        self._scatter = torch.zeros((d, d), dtype=torch.float64, device=device)

    @property
    def device(self) -> torch.device:
        return self._scatter.device

    @property
    def count(self) -> int:
        """Number of rows so far."""
        return int(self._count)

    @torch.no_grad()
    def update(self, g: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Adds the rows of g (..., d). Rows that are False in mask (g's leading shape, bool) are not rows: nothing of
        them matters, not even NaN. Whether the others are finite is `eigh`'s question."""
        check_rows(g, mask, self.d, self.device)
        if self._has_kernel(g):
            from spd_kernels.covariance.kernel import launch_sites

            launch_sites([self._state], [g], [mask])
        else:
            self._update_reference(g, mask)

    @torch.no_grad()
    def merge(self, other: GradientCovariance) -> None:
        """Adds the rows that another accumulator of the same width has seen, on whatever device it is."""
        if not isinstance(other, GradientCovariance):
            raise TypeError(f"other: expected a GradientCovariance; got {type(other).__name__}")
        if other.d != self.d:
            raise ValueError(f"other: expected width d = {self.d}; got {other.d}")
        device = self.device
        scatter = other._scatter.to(device)
        self._merge_mean(other._count.to(device), other._mean.to(device))
        if other is self:
            self._scatter.mul_(2)
        else:
            self._scatter += scatter

    @torch.no_grad()
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Afterwards every process of the group has the rows of all of them; every one of them must call it.

        `all_reduce_many` of this one.

        Args:
            group: of `torch.distributed`; None is the default one.
        """
        all_reduce_many([self], group)

    def mean(self) -> torch.Tensor:
        """(d,) fp64; zeros before the first row."""
        return self._mean.clone()

    def covariance(self) -> torch.Tensor:
        """Centred sum of squares, (d, d) fp64: not divided by the number of rows."""
        upper = self._scatter.triu()
        return upper + upper.triu(1).mT

    def eigh(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Singular values (d,) of the centred row matrix, descending, and its right singular vectors in columns.

        The entry of largest magnitude of every vector is positive.
        """
        if self.count == 0:
            raise ValueError("eigh: expected at least one row; got none")
        covariance = self.covariance()
        if not bool(torch.isfinite(covariance).all() & torch.isfinite(self._mean).all()):
            raise ValueError(f"eigh: expected finite rows; of the {self.count} some are NaN, infinite or overflowed")
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0).clamp(min=0.0).sqrt(), vectors.flip(1)
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        return values, vectors * torch.where(largest < 0, -1.0, 1.0)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies: count (int64 scalar), mean (d,), covariance (d, d)."""
        return {"count": self._count.to(torch.int64), "mean": self.mean(), "covariance": self.covariance()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces what was accumulated by what `state_dict` returned, from whatever device."""
        expected = {"count": (), "mean": (self.d,), "covariance": (self.d, self.d)}
        if state.keys() != expected.keys():
            raise ValueError(f"state: expected keys {sorted(expected)}; got {sorted(state)}")
        tensors = {name: torch.as_tensor(state[name]) for name in expected}
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise ValueError(f"state[{name!r}]: expected shape {shape}; got {tuple(tensors[name].shape)}")
        if tensors["count"] < 0:
            raise ValueError(f"state['count']: expected at least 0; got {int(tensors['count'])}")
        self._count.copy_(tensors["count"])
        self._mean.copy_(tensors["mean"])
        self._scatter.copy_(tensors["covariance"])

    def __repr__(self) -> str:
        return f"GradientCovariance(d={self.d}, count={self.count}, device={str(self.device)!r})"

    @property
    def _state(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._count, self._mean, self._scatter

    def _has_kernel(self, g: torch.Tensor) -> bool:
        return g.dtype in _SIXTEEN_BIT and uses_triton(self._implementation, g.device, g.dtype)

    def _update_reference(self, g: torch.Tensor, mask: torch.Tensor | None) -> None:
        for rows, keep in _chunks(g, mask):
            self._update_chunk(rows, keep)

    def _update_chunk(self, rows: torch.Tensor, keep: torch.Tensor | None) -> None:
        """rows (n, d), of which keep (n,) count: centred, multiplied and merged in fp64."""
        if keep is None:
            n = torch.full_like(self._count, rows.shape[0])
            mean = rows.sum(0, dtype=torch.float64) / n
            centred = rows - mean
        else:
            n = keep.sum(dtype=torch.float64)
            mean = torch.where(keep[:, None], rows, 0).sum(0, dtype=torch.float64) / n.clamp(min=1)
            centred = torch.where(keep[:, None], rows - mean, 0)
        self._merge_mean(n, mean)
        for start in range(0, self.d, TRIANGLE_BAND):
            band = slice(start, start + TRIANGLE_BAND)
            self._scatter[band, start:].addmm_(centred[:, band].mT, centred[:, start:])

    def _merge_mean(self, n: torch.Tensor, mean: torch.Tensor) -> None:
        """Chan's update for n more rows of this mean; their own centred sum of squares is the caller's to add."""
        total = self._count + n
        share = n / total.clamp(min=1)
        delta = mean - self._mean
        scaled = delta * (self._count * share).sqrt()
        self._scatter.addr_(scaled, scaled)
        self._mean += delta * share
        self._count.copy_(total)


@torch.no_grad()
def update_many(
    accumulators: Sequence[GradientCovariance],
    gradients: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None] | None = None,
) -> None:
    """`accumulator.update(g, mask)` for each in turn: on a GPU, four 16-bit sites of one width and layout a launch.

    All arguments are checked before any accumulator changes. An accumulator may come more than once.

    Args:
        accumulators: of any widths, on any devices.
        gradients: as many, each (..., d) of its accumulator.
        masks: as many, each boolean of its gradient's leading shape or None; None is no mask anywhere.
    """
    masks = [None] * len(gradients) if masks is None else masks
    for name, given in (("gradients", gradients), ("masks", masks)):
        if len(given) != len(accumulators):
            raise ValueError(f"{name}: expected {len(accumulators)}, one for each accumulator; got {len(given)}")
    sites = list(zip(accumulators, gradients, masks, strict=True))
    for index, (accumulator, g, mask) in enumerate(sites):
        if not isinstance(accumulator, GradientCovariance):
            raise TypeError(f"accumulators[{index}]: expected a GradientCovariance; got {type(accumulator).__name__}")
        check_rows(g, mask, accumulator.d, accumulator.device, f"gradients[{index}]", f"masks[{index}]")
    launched = [accumulator._has_kernel(g) for accumulator, g, _ in sites]
    if any(launched):
        from spd_kernels.covariance.kernel import launch_sites

        chosen = [site for site, has_kernel in zip(sites, launched, strict=True) if has_kernel]
        launch_sites([a._state for a, _, _ in chosen], [g for _, g, _ in chosen], [mask for _, _, mask in chosen])
    for (accumulator, g, mask), has_kernel in zip(sites, launched, strict=True):
        if not has_kernel:
            accumulator._update_reference(g, mask)


@torch.no_grad()
def all_reduce_many(accumulators: Sequence[GradientCovariance], group: dist.ProcessGroup | None = None) -> None:
    """`accumulator.all_reduce(group)` for each, in few collectives; every process must bring as many, in one order.

    One collective of all counts and means, then the d x d fp64 sums, as many at once as REDUCE_BYTES hold, on the
    accumulators' one device and without waiting for a GPU. Every accumulator must have one width in all processes; on
    the CPU one more collective finds out before anything is changed, on a GPU finding out would mean waiting.

    Args:
        accumulators: of any widths, on one device.
        group: of `torch.distributed`; None is the default one.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("all_reduce: expected torch.distributed to be initialised (init_process_group)")
    if dist.get_rank(group) < 0:
        raise ValueError("group: expected a group that this process belongs to")
    if not accumulators:
        return
    devices = {accumulator.device for accumulator in accumulators}
    if len(devices) > 1:
        raise ValueError(f"accumulators: expected one device; got {', '.join(sorted(map(str, devices)))}")
    if accumulators[0].device.type == "cpu":
        own = torch.tensor([accumulator.d for accumulator in accumulators])
        widths = torch.stack((own, -own))
        dist.all_reduce(widths, dist.ReduceOp.MAX, group)
        for d, most, negative in zip(own.tolist(), *widths.tolist(), strict=True):
            if most != -negative:
                raise ValueError(f"all_reduce: expected one width d; got {-negative} to {most}, here {d}")
    # The means of all first: about them, the scatters add up. Chan's formula for any number of parts.
    totals = torch.cat([part for a in accumulators for part in (a._mean * a._count, a._count[None])])
    dist.all_reduce(totals, dist.ReduceOp.SUM, group)
    for accumulator, total in zip(accumulators, totals.split([a.d + 1 for a in accumulators]), strict=True):
        mean = total[:-1] / total[-1].clamp(min=1)
        scaled = (accumulator._mean - mean) * accumulator._count.sqrt()
        accumulator._scatter.addr_(scaled, scaled)
        accumulator._mean.copy_(mean)
        accumulator._count.copy_(total[-1])
    for scatters in _together([accumulator._scatter for accumulator in accumulators]):
        if len(scatters) == 1:
            dist.all_reduce(scatters[0], dist.ReduceOp.SUM, group)
            continue
        flat = torch.cat([scatter.flatten() for scatter in scatters])
        dist.all_reduce(flat, dist.ReduceOp.SUM, group)
        for scatter, reduced in zip(scatters, flat.split([each.numel() for each in scatters]), strict=True):
            scatter.copy_(reduced.view_as(scatter))


def _together(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors in order, so many at a time that a copy of them takes at most REDUCE_BYTES, or one."""
    part: list[torch.Tensor] = []
    for tensor in tensors:
        if part and sum(each.nbytes for each in [*part, tensor]) > REDUCE_BYTES:
            yield part
            part = []
        part.append(tensor)
    yield part


def _chunks(g: torch.Tensor, mask: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The rows of g (n, d), a bounded number at a time, each with the mask of those to keep or None."""
    d = g.shape[-1]
    rows = g.detach().reshape(-1, d)
    keep = None if mask is None else mask.reshape(-1)
    step = max(1, CHUNK_BYTES // (8 * d))
    for start in range(0, rows.shape[0], step):
        chunk = rows[start : start + step]
        if keep is None:
            yield chunk, None
        elif g.device.type == "cpu":
            chunk = chunk[keep[start : start + step]]
            if chunk.shape[0]:
                yield chunk, None
        else:
            # Gathering would have to wait for the number of rows kept.
            yield chunk, keep[start : start + step]
