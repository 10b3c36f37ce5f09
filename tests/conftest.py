"""Settings that must be there before any test file imports Triton or transformers, which read them once."""

import os

import torch

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are decorated for the interpreter or for a device once and for all
