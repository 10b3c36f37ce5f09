"""Which implementation runs, and facts about the device, asked for only when a kernel needs them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Literal, cast, get_args

import torch

Implementation = Literal["auto", "triton", "reference"]
Architecture = Literal["sm_80", "sm_90", "sm_100", "gfx942"]
ENVIRONMENT = "SPD_KERNELS_IMPLEMENTATION"
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_CHOICES = get_args(Implementation)
# Few programs, so that the interpreter also walks the loops of kernels whose programs take several tiles.
_INTERPRETED_PROCESSORS = 2


def requested(implementation: str | None) -> Implementation:
    """The argument, else the environment variable, else auto."""
    source = "implementation"
    if implementation is None:
        implementation = os.environ.get(ENVIRONMENT, "auto")
        source = f"environment variable {ENVIRONMENT}"
    if implementation not in _CHOICES:
        raise ValueError(f"{source}: expected one of {', '.join(_CHOICES)}; got {implementation!r}")
    return cast(Implementation, implementation)


def uses_triton(implementation: str | None, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel serves this call; raises where it was asked for by name and cannot."""
    choice = requested(implementation)
    if choice == "reference":
        return False
    if choice == "auto":
        return device.type == "cuda" and dtype in KERNEL_DTYPES
    if dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"implementation='triton' takes float32, float16 or bfloat16; got {dtype} (the reference takes it)"
        )
    if device.type != "cuda" and not _interpreting():
        raise ValueError(
            f"implementation='triton' needs a GPU tensor; got one on {device} "
            "(on the CPU it runs only in Triton's interpreter: set TRITON_INTERPRET=1 before the first kernel runs)"
        )
    return True


def _interpreting() -> bool:
    """Whether the kernels were, or will be, decorated for the interpreter."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("implementation='triton' needs the triton package, which is not installed")
    from spd_kernels import tiles

    return tiles.INTERPRETING


def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a device."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return _cuda_processors(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cuda_processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def architecture(device: torch.device) -> Architecture:
    """The table of launch configurations that serves a device; the interpreter walks those of sm_90.

    Consumer GPUs (sm_86, sm_89, sm_120) have 99 KiB of shared memory a block, within which the table of sm_80 keeps.
    """
    if device.type != "cuda":
        return "sm_90"
    return _cuda_architecture(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cuda_architecture(index: int) -> Architecture:
    if torch.version.hip is not None:
        return "gfx942"
    served: dict[int, Architecture] = {9: "sm_90", 10: "sm_100", 11: "sm_100"}
    return served.get(torch.cuda.get_device_capability(index)[0], "sm_80")


def guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes the tensors' device current, where it is not: Triton launches on the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def float32_precision() -> str:
    """What tl.dot does with fp32 operands: IEEE fp32 unless the user allowed TF32 in PyTorch."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def precision(dtype: torch.dtype) -> str:
    """What tl.dot is told: it looks at it for fp32 operands alone, and asking PyTorch takes more than a microsecond."""
    return float32_precision() if dtype is torch.float32 else "ieee"


def needs_operator(*tensors: torch.Tensor) -> bool:
    """Whether PyTorch must see an operator and not a bare launch: something records, traces or transforms the call
    (autograd, torch.compile, forward AD, functorch, a dispatch mode, a tensor subclass)."""
    return (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and any([t.requires_grad for t in tensors]))
        or any([type(t) is not torch.Tensor and type(t) is not torch.nn.Parameter for t in tensors])
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def flatten_rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """x (..., d) as rows: the tensor to address, the rows of the inner axis, outer and inner strides.

    Every layout whose leading axes merge into at most two is addressed in place; any other is copied.
    """
    if x.numel() == 0:
        return x, 1, 0, 0
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 2:
        return flatten_rows(x.contiguous())
    if not axes:
        return x, 1, 0, 0
    if len(axes) == 1:
        return x, axes[0][0], 0, axes[0][1]
    return x, axes[1][0], axes[0][1], axes[1][1]
