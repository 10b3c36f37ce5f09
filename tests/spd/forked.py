"""Jobs that so many forked processes carry out together, under gloo."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist


def meet(folder: Path, size: int, number: int) -> None:
    """Join the others, if there are any."""
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{size}", rank=number, world_size=size)


def carry_out(run: Callable[[int, int], None], sizes: Iterable[int], seconds: float) -> int:
    """`run(size, number)` in as many processes as each size says; 1 once one fails or takes too long, else 0."""
    fork = multiprocessing.get_context("fork")
    for size in sizes:
        processes = [fork.Process(target=run, args=(size, number), daemon=True) for number in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(seconds)
        if any(process.exitcode != 0 for process in processes):
            return 1
    return 0
