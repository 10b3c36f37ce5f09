"""What can happen to a process at one of its writes."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_SOURCE = Path(__file__).parent / "interpose.c"
_ACTIONS = ("count", "kill", "tear", "full", "signal")
_PRELOADED = "SPD_TORTURE_LIBRARY"


@dataclass(frozen=True)
class Fault:
    """At the `at`-th (from 1) of some change to the run folder, whichever library makes it.

    kill: SIGKILL before it. tear: SIGKILL in the middle of it, if it is a write. full: the disk is full from there on.
    signal: `number` before it. `where` is a line of a journal: a call and a file, as in "rename words/prompts.json".
    """

    action: Literal["count", "kill", "tear", "full", "signal"] = "count"
    where: str = ""
    at: int = 1
    number: int = 0

    def __str__(self) -> str:
        name = signal.Signals(self.number).name if self.number else self.action
        return f"{name} at {self.where!r}, time {self.at}"

    def arm(self, folder: Path, journal: int = -1) -> None:
        """In this process, from now on. `journal`: a descriptor that gets a line for each write."""
        action = _ACTIONS.index(self.action)
        ctypes.CDLL(str(library())).torture_arm(
            os.fsencode(folder), self.where.encode(), ctypes.c_long(self.at), action, self.number, journal
        )


NONE = Fault()


def why_not() -> str | None:
    """Why faults cannot be armed on this machine, if so."""
    if sys.platform != "linux":
        return "faults are armed with LD_PRELOAD, on Linux"
    if shutil.which("cc") is None:
        return "faults need a C compiler, cc"
    return None


def preloaded() -> bool:
    return _PRELOADED in os.environ


def library() -> Path:
    return Path(os.environ[_PRELOADED])


def environment(folder: Path) -> dict[str, str]:
    """The environment in which a process can arm faults; the library is compiled into `folder`."""
    compiled = str(folder.resolve() / "interpose.so")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", compiled, _SOURCE, "-ldl"], check=True)
    # one thread, and none started before a fork: a forked process would wait for the threads that it has not got
    more = {"LD_PRELOAD": compiled, _PRELOADED: compiled, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | more
