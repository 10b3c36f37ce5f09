"""Hypothesis strategies: tensors of every memory layout that PyTorch can make, and the sizes worth trying."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import torch

from spd_kernels.testing import normal

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = st.sampled_from(DTYPES)
# Few examples each: every new combination of constants is another pass of the interpreter over the kernel.
EXAMPLES = 20


@st.composite
def strided(
    draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype, device: str, *, expanded: bool = True
) -> torch.Tensor:
    """Standard normal numbers of a shape, laid out anyhow: axes permuted in memory, cut out of something larger with
    a step, starting anywhere, and with axes of stride 0 where `expanded` allows several elements to be one."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    starts = [draw(st.sampled_from([0, 0, 1, 5])) for _ in shape]
    shared = [expanded and draw(st.sampled_from([False, False, False, True])) for _ in shape]
    sizes = [
        (1 if same else size) * step + start
        for size, step, start, same in zip(shape, steps, starts, shared, strict=True)
    ]
    seed = draw(st.integers(0, 2**16))
    memory = normal(*(sizes[axis] for axis in order), seed=seed, dtype=dtype, device=device)
    x = memory.permute([order.index(axis) for axis in range(len(shape))])
    for axis, (start, step, size, same) in enumerate(zip(starts, steps, shape, shared, strict=True)):
        x = x.narrow(axis, start, x.shape[axis] - start)
        x = x[(slice(None),) * axis + (slice(None, None, step),)].narrow(axis, 0, 1 if same else size)
    x = x.expand(*shape)
    assert x.shape == tuple(shape)
    return x


def sizes(most: int) -> st.SearchStrategy[int]:
    """1 to most, with a liking for the sizes at which blocks end."""
    edges = [n for n in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129) if n <= most]
    return st.one_of(st.sampled_from(edges), st.integers(1, most))
