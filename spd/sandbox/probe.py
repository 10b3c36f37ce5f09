"""A program for the sandbox that tries what it should not be able to do, and prints what came of it.

Each line of output is a measure's name, 1 where it held, and a detail, with tabs between.
"""

from __future__ import annotations

import os
import time
from typing import Any


def environment(names: list[str]) -> str:
    """Raises AssertionError, as each of these functions does, where the measure does not hold."""
    assert not os.environ.keys() & names, "variables of the caller were read"
    return "hidden"


def processes(most: int) -> str:
    """What it starts it leaves behind, in sessions of their own, for the sandbox to find."""
    for started in range(most):
        try:
            if os.fork() == 0:
                os.setsid()
                time.sleep(5)
                os._exit(0)
        except OSError as error:
            return f"{started or 'none'} beside its own ({error.strerror})"
    raise AssertionError(f"{most} were started")


def others(caller: int) -> str:
    """In a namespace of their own, where the parent is number 1 and cannot be hurt, there is nobody else to signal."""
    if os.getppid() > 1:
        for pid in (caller, os.getppid()):
            try:
                os.kill(pid, 0)
            except OSError:
                continue
            raise AssertionError("another process can be sent signals")
    try:
        with open(f"/proc/{caller}/environ", "rb") as file:
            file.read()
    except OSError:
        return "no signal to another, no look into one"
    raise AssertionError("another process's environment was read")


def memory(size: int) -> str:
    try:
        bytearray(size)
    except MemoryError:
        return "allocating more fails"
    raise AssertionError(f"{size >> 20} MiB were allocated beside what Python takes")


def file_size(most: int) -> str:
    with open("long", "wb", buffering=0) as file:
        try:
            os.truncate(file.fileno(), most + 1)
        except OSError:
            return f"at most {most >> 20} MiB"
        finally:
            os.truncate(file.fileno(), 0)
    raise AssertionError(f"a file grew beyond {most >> 20} MiB")


def disk(most: int) -> str:
    space = os.statvfs(".")
    size = space.f_blocks * space.f_frsize
    assert size <= most, "the folder is on a disk that all of its files together can fill"
    return f"at most {size >> 20} MiB"


def network(tcp: int, udp: int) -> str:
    import socket

    for kind, port in ((socket.SOCK_STREAM, tcp), (socket.SOCK_DGRAM, udp)):
        try:
            with socket.socket(socket.AF_INET, kind) as client:
                client.settimeout(2)
                client.connect(("127.0.0.1", port))
                client.send(b"here")
        except OSError:
            continue
        raise AssertionError("this machine's own address was reached")
    return "none"


def writing(folder: str) -> str:
    for change in (lambda: os.mkdir(f"{folder}/new"), lambda: os.chmod(folder, 0o700), lambda: os.utime(folder)):
        try:
            change()
        except OSError:
            continue
        raise AssertionError("something outside of its folder was changed")
    return "in a temporary folder alone"


def reading(file: str, home: str) -> str:
    try:
        with open(file) as opened:
            opened.read()
    except OSError:
        pass
    else:
        raise AssertionError("a file of the caller was read")
    try:
        os.listdir(home)
    except OSError:
        return "neither a private file nor the home folder"
    raise AssertionError("the home folder was read")


def rights() -> str:
    """The last to be tried: nothing can be read afterwards where it works."""
    try:
        os.chroot(".")
    except OSError:
        return "none of root's"
    raise AssertionError("the root folder was changed")


def probe(tries: dict[str, tuple[Any, ...]]) -> None:
    """Each function by its name here, with its arguments."""
    for name, arguments in tries.items():
        try:
            print(name, 1, globals()[name.replace(" ", "_")](*arguments), sep="\t")
        except AssertionError as error:
            print(name, 0, error, sep="\t")
