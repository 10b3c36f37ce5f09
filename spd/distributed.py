"""Several processes on one job: those that torchrun started, through torch.distributed.

Without them every function here is that of a single process, so that callers need not ask.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from spd.errors import InputError

# One may wait long for another's share; those that wait for a dead one are ended by torchrun.
PATIENCE = timedelta(hours=24)

T = TypeVar("T")

_apart = False
_objects: dist.ProcessGroup | None = None


def join() -> None:
    """Join the processes that torchrun started, if it did: with nccl where each has a GPU, else with gloo.

    Each takes the GPU of its number on the machine, which "cuda" means from then on.
    """
    if started() < 2 or dist.is_initialized():
        return
    global _objects
    take_gpu()
    if 0 < int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count():
        # gloo beside nccl, so that what is on the CPU can be exchanged as well. Tensors are exchanged by processes that
        # have just met, so that for them the usual patience tells a broken connection from a long share.
        dist.init_process_group("cpu:gloo,cuda:nccl")
        _objects = dist.new_group(backend="gloo", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)


def take_gpu() -> int:
    """Of the machine's GPUs take the one of this process's number, which "cuda" means from then on."""
    gpus = torch.cuda.device_count()
    own = local_rank() % max(1, gpus)
    if started() > 1 and gpus:
        torch.cuda.set_device(own)
    return own


def leave() -> None:
    global _objects
    if dist.is_initialized():
        dist.destroy_process_group()
    _objects = None


def started() -> int:
    """How many processes torchrun started, whether they have joined or not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return dist.get_rank() if _together() else 0


def size() -> int:
    return dist.get_world_size() if _together() else 1


def is_main() -> bool:
    """Whether this is the process that writes what all have made, and speaks to the user."""
    return rank() == 0


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def broadcast(value: T) -> T:
    """The main process's value, in every process."""
    if not _together():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_objects)
    return values[0]


def on_main(work: Callable[[], T]) -> T:
    """What the main process alone does: its result, or its error, in every process."""
    result: Any = None
    with failing_together():
        if is_main():
            result = work()
    return cast(T, broadcast(result))


def gather(value: T) -> list[T]:
    """Every process's value by rank, in every process."""
    if not _together():
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value, group=_objects)
    return values


def check_same(name: str, value: Any) -> None:
    """Refuse, in every process, a value that is not the same in all of them.

    Raises:
        InputError: it is not; the message names the ranks that differ from the first.
    """
    values = gather(value)
    others = [number for number, each in enumerate(values) if each != values[0]]
    if others:
        raise InputError(f"{name}: expected the same in all {len(values)} processes, got another in rank {others}")


@contextmanager
def failing_together() -> Iterator[None]:
    """An error of one process inside the block is raised by all of them at its end, so that none waits for ever.

    Every process must enter the block, and inside it none may wait for another that can fail before.

    Raises:
        InputError, OSError: another process had raised one, with its words.
        RuntimeError: another process had failed in another way.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    said: tuple[type[Exception], str] | None = None
    if isinstance(own, (InputError, OSError)):
        said = InputError if isinstance(own, InputError) else OSError, str(own)
    elif own is not None:
        said = RuntimeError, f"rank {rank()} failed with {type(own).__name__}: {own}"
    failures = [each for each in gather(said) if each is not None]
    if own is not None:
        raise own
    for kind, words in failures:
        raise kind(words)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` dealt the parameters over the processes, so that a forward pass takes all of them.

    Raises:
        InputError: the model is wrapped or dealt out in another way, in which its K and V cannot be reached.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, DistributedDataParallel):
        raise InputError("model: expected the model itself, got it wrapped in DistributedDataParallel; pass .module")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise InputError(
            "model: expected one sharded by torch.distributed.fsdp.fully_shard, got FullyShardedDataParallel, which "
            "flattens the parameters"
        )
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    if not sharded and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise InputError(
            "model: expected whole parameters, or ones sharded by torch.distributed.fsdp.fully_shard; got ones dealt "
            "out otherwise (tensor parallel)"
        )
    return sharded


@contextmanager
def apart() -> Iterator[None]:
    """Inside the block this process works as if there were no others."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def _together() -> bool:
    return not _apart and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
