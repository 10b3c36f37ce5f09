"""Where kernels run: on the GPU when there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    # Before anything imports Triton: kernels are decorated for the interpreter or for a device once and for all.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> str:
    """The device that the kernels run on."""
    return "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def _default_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's environment does not decide what the tests run."""
    monkeypatch.delenv("SPD_KERNELS_IMPLEMENTATION", raising=False)
