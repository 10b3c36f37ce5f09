"""What a case of a benchmark is: inputs, contenders, the work they do, and the targets that their times must meet."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from spd_kernels.launch import Architecture
from spd_kernels.roofline import Work

OURS, COMPILED = "spd_kernels", "compiled"
# How a contender is called: from Python, call after call, or replayed from one CUDA graph of many calls.
Variant = Literal["calls", "graph"]

Inputs = tuple[Any, ...]
Contender = Callable[..., Any]


@dataclass(frozen=True)
class Target:
    """A number that a case has to reach.

    kind:
        "faster": at least `limit` times as fast as the contender `against`.
        "time": at most `limit` times the time of the contender `against`.
        "bandwidth": the bytes that must move, over the time, are at least this share of the measured copy bandwidth.
        "launches": at most so many kernels a call.
    """

    kind: Literal["faster", "time", "bandwidth", "launches"]
    limit: float
    against: str = ""
    variant: Variant = "calls"

    @property
    def text(self) -> str:
        graph = " in a CUDA graph" if self.variant == "graph" else ""
        match self.kind:
            case "faster":
                return f"at least {self.limit:g} times as fast as {self.against}{graph}"
            case "time":
                return f"at most {self.limit:g} times the time of {self.against}{graph}"
            case "bandwidth":
                return f"at least {100 * self.limit:g} % of the copy bandwidth{graph}"
            case "launches":
                return "one launch" if self.limit == 1 else f"at most {self.limit:g} launches"


@dataclass(frozen=True)
class Tuning:
    """The frozen configuration of a case, those worth trying beside it, and a contender made of one."""

    frozen: Any
    candidates: Sequence[Any]
    launch: Callable[[Any], Contender]


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    `contenders` take the inputs; the first is the plain formula, which others are compared with and which, given
    float64 inputs, says what is right. One is called `spd_kernels`.
    """

    operation: str
    label: str
    dtype: torch.dtype
    work: Work
    inputs: Callable[[Draw], Inputs]
    contenders: Mapping[str, Contender]
    targets: tuple[Target, ...] = ()
    decode: bool = False  # few rows: also timed in a CUDA graph, and its launches are counted
    compiled: bool = False  # torch.compile of the first contender joins
    tuning: Callable[[Architecture], Tuning] | None = None
    # Where results are not compared as they are: whose result is, what of it, and with what.
    checked: str = OURS
    view: Callable[[Any], Any] = lambda result: result
    exact: Contender | None = None

    @property
    def baseline(self) -> str:
        return next(iter(self.contenders))

    @property
    def name(self) -> str:
        return f"{self.operation}: {self.label}"


@dataclass
class Draw:
    """Random tensors on the device, another set for every seed."""

    device: torch.device
    dtype: torch.dtype
    seed: int
    bases: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def orthonormal(self, d: int, r: int) -> Tensor:
        """A (d, r) basis. Decompositions take long, so seeds that share `bases` permute the rows of the same one."""
        if (d, r) not in self.bases:
            seed = torch.Generator(self.device).manual_seed(d + r)
            self.bases[d, r] = torch.linalg.qr(torch.randn(d, r, generator=seed, device=self.device)).Q
        order = torch.randperm(d, generator=self.generator, device=self.device)
        return self.bases[d, r][order].to(self.dtype)


def to_float64(inputs: Inputs) -> Inputs:
    """The same inputs with every floating tensor in float64."""
    return tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs)


def in_turn(cases: Iterable[Case]) -> list[Case]:
    """The first case of every operation, then the second of every one, and so on: a short run has seen them all."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.operation, []).append(case)
    return [case for row in itertools.zip_longest(*groups.values()) for case in row if case is not None]
