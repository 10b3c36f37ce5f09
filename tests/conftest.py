"""Settings that must be there before any test file imports Triton or transformers, which read them once."""

import os
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch


def _release(package: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, version(package).split(".")[:2]))
    except PackageNotFoundError:  # Triton, where there is none
        return ()


os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are decorated for the interpreter or for a device once and for all
    if _release("triton") == (3, 6) and _release("numpy") >= (2, 4):
        raise pytest.UsageError("the interpreter of Triton 3.6 needs numpy < 2.4: pip install 'numpy<2.4'")
