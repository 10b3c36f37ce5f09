"""Commands under torchrun: every process does its share, one of them speaks."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any


@contextmanager
def together() -> Iterator[bool]:
    """Join the processes that torchrun started, if it did. Yields whether this is the one that speaks to the user.

    The others warn of one thing alone, which the first may not know: that their memory is too small.
    """
    from spd import distributed
    from spd.memory import MemoryWarning

    distributed.join()
    if not distributed.is_main():
        shown = warnings.showwarning

        def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, MemoryWarning):
                shown(message, category, *rest, **more)

        warnings.showwarning = show
    yield distributed.is_main()
    distributed.leave()  # not after an error: torchrun ends processes that wait for this one


def said_by_another(line: str) -> bool:
    """Whether another process that torchrun started has said this; if not, this one has, and is to say it.

    The agent that started them counts, so it does not matter how far a process has come.
    """
    job = os.environ
    if int(job.get("WORLD_SIZE", "1")) < 2 or job.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        from torch.distributed import TCPStore

        store = TCPStore(job["MASTER_ADDR"], int(job["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5))
        attempt = job.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"spd/said/{attempt}/{hashlib.sha256(line.encode()).hexdigest()}", 1) > 1
    except Exception:  # better said twice than never
        return False
