"""The cases of the benchmarks, one file an operation. The first ones matter most: a short run gets no further."""

from __future__ import annotations

from benchmarks.case import Case
from benchmarks.operations import covariance, latent_attention, project, rope, routed


def gpu_cases(*, only: str = "") -> list[Case]:
    """Sizes of a real model, in bf16 unless their label says otherwise."""
    found = [case for operation in (project, routed, rope, latent_attention, covariance) for case in operation.gpu()]
    return [case for case in found if only in case.name]


def small_cases(*, only: str = "") -> list[Case]:
    """A few of odd sizes, for a memory checker."""
    found = [case for operation in (project, routed, rope, latent_attention, covariance) for case in operation.small()]
    return [case for case in found if only in case.name]


def tiny_cases(*, only: str = "") -> list[Case]:
    """Those of the small ones that Triton's interpreter is quick about."""
    return [case for case in small_cases(only=only) if case.work.flops < 1e5]


def cpu_cases(*, only: str = "") -> list[Case]:
    """fp32, on the reference path: one call takes a fifth of a second at most. `only`: one operation's."""
    found = [case for operation in (project, routed, rope, latent_attention) for case in operation.cpu()]
    return [case for case in found if only in ("", case.operation)]
