"""What the sandbox holds on this machine, found out by trying, and said aloud."""

from __future__ import annotations

import functools
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from spd.sandbox import confinement, run

PROBE_MEMORY = 256 << 20
MANY_PROCESSES = 128
"""Where so many start, nothing limits them."""
MEASURES = {  # what each means, and the layers of spd/sandbox/confinement.py that can hold it
    "environment": ("the caller's environment is hidden", ()),
    "others": ("other processes are out of reach", ("seccomp", "namespaces", "landlock")),
    "processes": ("processes are limited", ("seccomp", "user", "namespaces")),
    "left behind": ("no process outlives its verdict", ("seccomp", "namespaces", "reaping")),
    "memory": ("memory is limited", ("limits",)),
    "file size": ("the size of a file is limited", ("limits",)),
    "disk": ("disk space is limited", ("mounts",)),
    "network": ("there is no network", ("seccomp", "namespaces")),
    "writing": ("nothing is changed outside a temporary folder", ("landlock", "seccomp", "mounts")),
    "reading": ("the user's files cannot be read", ("landlock",)),
    "rights": ("root has no rights", ("user",)),
}


@dataclass(frozen=True)
class Measure:
    """One thing that the sandbox is to enforce, whether it does so here, and how or why not."""

    name: str
    enforced: bool
    detail: str


def enforcement() -> list[Measure]:
    """Every measure, tried once in this process by a program that breaks out where it can.

    Raises:
        RuntimeError: not even a harmless program runs.
    """
    return list(_tried(run.switched_off))


def describe() -> str:
    """What generated code can and cannot do on this machine, in a few lines for the user."""
    measures = enforcement()
    held = [MEASURES[each.name][0] for each in measures if each.enforced]
    missing = [f"{MEASURES[each.name][0]}: {each.detail}" for each in measures if not each.enforced]
    lines = [f"Generated code runs in a sandbox: a time limit; {'; '.join(held)}."]
    if missing:
        lines += ["NOT enforced on this machine:", *(f"  - {line}" for line in missing)]
    lines.append("It keeps accidents in, not an attacker: the real boundary is a container or a virtual machine.")
    return "\n".join(lines)


@functools.cache
def _tried(switched_off: frozenset[str]) -> tuple[Measure, ...]:
    """`switched_off` is what `run.supervised` leaves out; it is an argument for the cache alone."""
    source = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")
    with (
        tempfile.TemporaryDirectory(prefix="spd-outside-") as outside,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        udp.bind(("127.0.0.1", 0))
        private = Path(outside) / "private"
        private.write_text("seen")
        private.chmod(0o600)
        Path(outside).chmod(0o777)  # as open as /tmp
        tries = {
            "environment": (sorted(os.environ.keys() - run.VISIBLE),),
            "others": (os.getpid(),),
            "processes": (MANY_PROCESSES,),
            "memory": (PROBE_MEMORY,),
            "file size": (confinement.FILE_SIZE,),
            "disk": (confinement.DISK,),
            "network": (tcp.getsockname()[1], udp.getsockname()[1]),
            "writing": (outside,),
            "reading": (str(private), os.path.expanduser("~")),
            "rights": (),
        }
        report = run.supervised(source, f"probe({tries!r})", timeout=20.0, memory=PROBE_MEMORY)
    if not report["passed"]:
        raise RuntimeError(f"the sandbox cannot run Python on this machine: {report['reason']}")
    layers: dict[str, str] = report["layers"]
    found = dict(line.split("\t", 1) for line in report["output"].decode().splitlines())
    orphans = layers["reaping"] and layers["namespaces"]
    found["left behind"] = "0\torphans may live on" if orphans else "1\tall that descends from it is found and killed"
    measures = []
    for name, (_, holders) in MEASURES.items():
        held, _, detail = found[name].partition("\t")
        refused = [f"{layer}: {layers[layer]}" for layer in holders if layers[layer]]
        if held != "1" and refused:
            detail += f" ({'; '.join(refused)})"
        measures.append(Measure(name, held == "1", detail))
    return tuple(measures)
