"""The tap: forward untouched, gradient unchanged, rows collected."""

from __future__ import annotations

import pytest
import torch

from spd_kernels import GradientCovariance, tap
from spd_kernels.covariance.reference import moments_reference
from spd_kernels.tap.reference import tap_reference
from spd_kernels.testing import normal


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def update(self, g: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        self.seen.append((g, mask))


@pytest.mark.parametrize("function", [tap, tap_reference])
def test_the_gradient_is_seen_and_passed_on(function, device: str) -> None:  # type: ignore[no-untyped-def]
    x = normal(2, 3, 4, seed=1, device=device).requires_grad_()
    weight, mask = normal(2, 3, 4, seed=2, device=device), torch.ones(2, 3, dtype=torch.bool, device=device)
    recorder = Recorder()
    y = function(x, recorder, mask)
    assert torch.equal(y, x) and recorder.seen == []
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    ((g, seen_mask),) = recorder.seen
    assert torch.equal(g, weight) and not g.requires_grad and seen_mask is mask


def test_values_are_shared(device: str) -> None:
    x = normal(3, 4, seed=3, device=device).requires_grad_()
    assert tap(x, Recorder()).data_ptr() == x.data_ptr()


def test_where_no_gradient_flows_x_comes_back(device: str) -> None:
    x = normal(3, 4, seed=4, device=device)
    assert tap(x, Recorder()) is x
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        assert tap(leaf, Recorder()) is leaf


def test_upstream_gradients_are_those_without_the_tap(device: str) -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(3)]).to(device)
    x = normal(5, 6, seed=5, device=device)

    def gradients(tapped: bool) -> tuple[torch.Tensor, ...]:
        h = x
        for layer in layers:
            h = layer(h).tanh()
            h = tap(h, GradientCovariance(6, device=device)) if tapped else h
        return torch.autograd.grad(h.square().sum(), list(layers.parameters()))

    for with_tap, without in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(with_tap, without)


def test_a_covariance_collects_unmasked_rows(device: str) -> None:
    x = normal(4, 5, 3, seed=6, device=device).requires_grad_()
    weight, mask = normal(4, 5, 3, seed=7, device=device), normal(4, 5, seed=8, device=device) > 0
    accumulator = GradientCovariance(3, device=device)
    (tap(x, accumulator, mask) * weight).sum().backward()
    count, mean, covariance = moments_reference(weight, mask)
    assert accumulator.count == count
    torch.testing.assert_close(accumulator.mean(), mean)
    torch.testing.assert_close(accumulator.covariance(), covariance)


def test_every_backward_counts_and_an_unused_output_does_not(device: str) -> None:
    x = normal(2, 3, seed=9, device=device).requires_grad_()
    accumulator = GradientCovariance(3, device=device)
    loss = tap(x, accumulator).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert accumulator.count == 4
    tap(x, accumulator)
    x.sum().backward()
    assert accumulator.count == 4
