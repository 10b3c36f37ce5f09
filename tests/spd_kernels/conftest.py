"""Where kernels run: on the GPU when there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """The device that the kernels run on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _default_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's environment does not decide what the tests run."""
    monkeypatch.delenv("SPD_KERNELS_IMPLEMENTATION", raising=False)
