"""Wrong arguments: each error names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from spd_kernels import GradientCovariance, project, project_kv


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("x", "u", "error", "message"),
    [
        (zeros(2, 4), zeros(3, 2), ValueError, r"u: expected shape \(4, r\), since x is \(2, 4\); got \(3, 2\)"),
        (zeros(2, 4), zeros(4), ValueError, r"u: expected shape \(4, r\).*got \(4,\)"),
        (zeros(2, 4), zeros(1, 4, 2), ValueError, r"u: expected shape \(4, r\).*got \(1, 4, 2\)"),
        (zeros(2, 4), zeros(4, 5), ValueError, r"u: expected 1 <= r <= d = 4 columns; got r = 5"),
        (zeros(2, 4), zeros(4, 0), ValueError, r"u: expected 1 <= r <= d = 4 columns; got r = 0"),
        (zeros(), zeros(4, 2), ValueError, r"x: expected shape \(\.\.\., d\); got a scalar"),
        (zeros(2, 4), zeros(4, 2, dtype=torch.float64), TypeError, r"u: expected dtype torch.float32.*float64"),
        (zeros(2, 4, dtype=torch.int64), zeros(4, 2), TypeError, r"x: expected float32.*got torch.int64"),
        (zeros(2, 4, dtype=torch.int64), zeros(4, 2, dtype=torch.int64), TypeError, r"x: .*got torch.int64"),
        (zeros(2, 4), zeros(4, 2, device="meta"), ValueError, r"u: expected device cpu as x has; got meta"),
    ],
)
def test_project(x: torch.Tensor, u: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        project(x, u)


@pytest.mark.parametrize(
    ("v", "error", "message"),
    [
        (zeros(3, 4), ValueError, r"v: expected shape \(2, 4\) as k has; got \(3, 4\)"),
        (zeros(2, 4, dtype=torch.float64), TypeError, r"v: expected dtype torch.float32 as k has; got torch.float64"),
        (zeros(2, 4, device="meta"), ValueError, r"v: expected device cpu as k has; got meta"),
    ],
)
def test_pair(v: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        project_kv(zeros(2, 4), v, zeros(4, 2), zeros(4, 2))


def test_pair_names_the_basis() -> None:
    with pytest.raises(ValueError, match=r"u_k: expected shape \(4, r\), since k is \(2, 4\); got \(3, 2\)"):
        project_kv(zeros(2, 4), zeros(2, 4), zeros(3, 2), zeros(4, 2))
    with pytest.raises(ValueError, match=r"u_v: expected 1 <= r <= d = 4 columns; got r = 6"):
        project_kv(zeros(2, 4), zeros(2, 4), zeros(4, 2), zeros(4, 6))


@pytest.mark.parametrize(
    ("g", "mask", "error", "message"),
    [
        (zeros(2, 3), None, ValueError, r"g: expected shape \(\.\.\., 4\); got \(2, 3\)"),
        (zeros(), None, ValueError, r"g: expected shape \(\.\.\., 4\); got \(\)"),
        (zeros(2, 4, dtype=torch.int32), None, TypeError, r"g: expected float32.*got torch.int32"),
        (zeros(2, 4, device="meta"), None, ValueError, r"g: expected device cpu as the accumulator has; got meta"),
        (zeros(2, 4), zeros(2), TypeError, r"mask: expected dtype torch.bool; got torch.float32"),
        (zeros(2, 4), zeros(2, 4, dtype=torch.bool), ValueError, r"mask: expected shape \(2,\).*got \(2, 4\)"),
        (zeros(2, 4), zeros(2, dtype=torch.bool, device="meta"), ValueError, r"mask: expected device cpu.*got meta"),
    ],
)
def test_update(g: torch.Tensor, mask: torch.Tensor | None, error: type[Exception], message: str) -> None:
    accumulator = GradientCovariance(4)
    with pytest.raises(error, match=message):
        accumulator.update(g, mask)
    assert accumulator.count == 0


@pytest.mark.parametrize("d", [0, -3, 2.0, True, None])
def test_width(d: object) -> None:
    with pytest.raises(ValueError, match=r"d: expected a positive int"):
        GradientCovariance(d)  # type: ignore[arg-type]


def test_merge() -> None:
    with pytest.raises(ValueError, match=r"other: expected width d = 4; got 5"):
        GradientCovariance(4).merge(GradientCovariance(5))
    with pytest.raises(TypeError, match=r"other: expected a GradientCovariance; got int"):
        GradientCovariance(4).merge(3)  # type: ignore[arg-type]


def test_state() -> None:
    state = GradientCovariance(4).state_dict()
    with pytest.raises(ValueError, match=r"state\['mean'\]: expected shape \(5,\); got \(4,\)"):
        GradientCovariance(5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"state: expected keys \['count', 'covariance', 'mean'\]; got \['count'\]"):
        GradientCovariance(4).load_state_dict({"count": 3})
    with pytest.raises(ValueError, match=r"state\['count'\]: expected at least 0; got -1"):
        GradientCovariance(4).load_state_dict(state | {"count": torch.tensor(-1)})
