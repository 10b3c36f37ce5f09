"""What a process gives up before it runs code that nobody has read, layer by layer.

A layer that the system refuses is left out, with the reason kept; the others still hold. From the most to the least
widely available:

    limits      rlimits: address space, time, file size, open files, core dumps
    reaping     Linux: descendants that were orphaned come back to the supervisor, which kills them
    seccomp     Linux: no new process, no socket, no signal to others (seccomp.py); needs no rights
    landlock    Linux 5.13: reads only what Python needs, writes only in its folder; needs no rights
    user        as root: no capabilities, and a user of its own if Python can be read by others
    namespaces  processes, network and IPC of its own; as root or where users may
    mounts      in a namespace too: everything is read-only but its folder, a small file system in memory
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import select
import struct
import sys
import time

from spd.sandbox import seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

FILE_SIZE = 16 << 20
"""Bytes to which a file can grow."""
DISK = 64 << 20
"""Bytes of the folder, where it is a file system of its own."""
FILES = 4096
"""Files in it."""
OPEN_FILES = 64
PROCESSES = 64
"""Processes and threads, where they can be counted for this program alone."""
READABLE = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store", "/gnu/store"),
    *("/usr/share/zoneinfo", "/etc/localtime", "/etc/ld.so.cache", "/etc/ssl/openssl.cnf"),
    *("/dev/random", "/dev/urandom", "/dev/zero"),
)
"""What Python may need beside its own folders."""
SIGKILL = 9

_LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """A function of Linux's C library. OSError where it is missing or returns -1."""
    function = getattr(_LIBC, name, None) if sys.platform == "linux" else None
    if function is None:
        raise OSError(errno.ENOSYS, f"no {name} on {sys.platform}")
    function.restype = ctypes.c_long if name == "syscall" else ctypes.c_int
    result: int = function(*(ctypes.c_long(each) if isinstance(each, int) else each for each in arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def prctl(option: int, value: int) -> None:
    call("prctl", option, value, 0, 0, 0)


def before_fork(folder: str, without: list[str]) -> tuple[dict[str, str], int | None]:
    """The supervisor's part.

    Returns:
        For each layer why it does not hold ("" where it does), and the user that the program is to become, if any.
    """
    user, group = os.getuid(), os.getgid()
    layers = {"reaping": attempt(adopt_orphans), "namespaces": layer("namespaces", without, own_namespaces)}
    layers["mounts"] = layers["namespaces"] or attempt(own_mounts, folder, user, group)
    if "user" in without or os.geteuid() != 0:
        return layers, None
    other = unused_user(folder)
    if other:
        os.chown(folder, other, other)
    return layers, other


def after_fork(job: dict[str, Any], user: int | None, layers: dict[str, str]) -> dict[str, str]:
    """The program's part, in its own process: the other layers and why they do not hold."""
    alone = user is not None or (os.getuid() != 0 and not layers["namespaces"])
    without = job["without"]
    found = {"limits": limits(job["timeout"], job["memory"], alone), "user": layer("user", without, drop_rights, user)}
    attempt(die_with_parent)  # after the change of user, which resets it
    attempt(prctl, 38, 1)  # PR_SET_NO_NEW_PRIVS, which the next two require
    found["landlock"] = layer("landlock", without, landlock, job["folder"])
    found["seccomp"] = layer("seccomp", without, seccomp.install)
    return found


def layer(name: str, without: list[str], step: Callable[..., None], *arguments: Any) -> str:
    return "switched off" if name in without else attempt(step, *arguments)


def attempt(step: Callable[..., object], *arguments: Any) -> str:
    """Do it, and say why the system refuses, or ""."""
    try:
        step(*arguments)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def limits(timeout: float, memory: int, alone: bool) -> str:
    """rlimits, none above what this process came with. `alone`: the kernel counts this program's processes alone."""
    seconds = int(timeout) + 2
    wanted = {
        "RLIMIT_AS": memory,
        "RLIMIT_CPU": seconds,
        "RLIMIT_FSIZE": FILE_SIZE,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_CORE": 0,
    }
    if alone:
        wanted["RLIMIT_NPROC"] = PROCESSES
    refused = []
    for name, value in wanted.items():
        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(which, (value, value))
        except (OSError, ValueError):
            refused.append(name)
    return ", ".join(refused)


def own_namespaces() -> None:
    """Processes (for forks from here on), network, IPC and mounts of its own, within a user namespace where it must."""
    processes, network, ipc, mounts, users = 0x20000000, 0x40000000, 0x08000000, 0x00020000, 0x10000000
    try:
        call("unshare", processes | network | ipc | mounts)
    except OSError:
        call("unshare", processes | network | ipc | mounts | users)


def become_first() -> None:
    """Go on as the first process of the new namespace: it has no way out, and all in it end when this one ends."""
    parent, held = os.pipe()
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        os._exit(0)
    os.close(held)
    die_with_parent()
    if select.select([parent], [], [], 0)[0]:  # it had gone before
        os._exit(1)
    os.close(parent)


def die_with_parent() -> None:
    prctl(1, SIGKILL)  # PR_SET_PDEATHSIG


def own_mounts(folder: str, user: int, group: int) -> None:
    """A small file system in memory as `folder`, nothing at /proc; all others become read-only where the kernel can."""
    with open("/proc/self/uid_map") as file:
        known = bool(file.read().strip())
    if not known:  # a new user namespace: the user has to be known to a file system made in it
        maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for name, content in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)
    call("mount", b"none", b"/", None, 0x4000 | 0x40000, None)  # MS_REC | MS_PRIVATE: no mount is seen outside
    options = f"size={DISK},nr_inodes={FILES},mode=0700".encode()
    empty = 2 | 4 | 8  # no set-uid, no devices, no programs
    call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", empty, options)
    attempt(call, "mount", b"tmpfs", b"/proc", b"tmpfs", empty, options)
    read_only, writable = struct.pack("4Q", 1, 0, 0, 0), struct.pack("4Q", 0, 1, 0, 0)
    if not attempt(call, "syscall", 442, -1, b"/", 0x8000, read_only, 32):  # mount_setattr, with all below; Linux 5.12
        call("syscall", 442, -1, os.fsencode(folder), 0, writable, 32)


def unused_user(folder: str) -> int | None:
    """A user id for this run alone, if that user can read Python and reach the folder; this process is root."""
    needed = (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))
    for first in (1 << 30, 1 << 15):  # the second for containers that know 65536 users
        user = first + os.getpid() % 30000
        try:
            os.setgroups([])
            os.setegid(user)
            os.seteuid(user)
        except OSError:
            os.setegid(os.getgid())
            continue
        try:
            os.stat(folder)
            for each in needed:
                os.listdir(each)
            return user
        except OSError:
            return None
        finally:
            os.seteuid(0)
            os.setegid(os.getgid())
    return None


def drop_rights(user: int | None) -> None:
    """Become the user, if there is one, and keep no capability."""
    if user is not None:
        os.setgid(user)
        os.setuid(user)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))  # version 3, this thread
    call("capset", header, ctypes.create_string_buffer(24))


def landlock(folder: str) -> None:
    """From here on read only Python and the system's libraries, write only in `folder`, execute nothing.

    Landlock does not cover what needs no opening (stat, chmod and the like): seccomp refuses the changes among those.
    """
    create_rules, add_rule, restrict_self = 444, 445, 446
    abi = call("syscall", create_rules, None, 0, 1)
    execute, write, read, list_folder = 1, 2, 4, 8
    make_devices = 1 << 6 | 1 << 11
    handled = (1 << (13, 14, 15, 15, 16)[min(abi, 5) - 1]) - 1  # all that this kernel knows
    inside = handled & ~execute & ~make_devices
    network = 3 if abi >= 4 else 0  # TCP: neither bind nor connect
    scope = 3 if abi >= 6 else 0  # abstract sockets and signals of other processes
    words = 1 + (abi >= 4) + (abi >= 6)
    attributes = struct.pack("QQQ", handled, network, scope)[: 8 * words]
    rules = call("syscall", create_rules, attributes, len(attributes), 0)
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    readable = {sys.prefix, sys.base_prefix, *READABLE, *libraries} - {"", "/"}
    rights = dict.fromkeys(readable, read | list_folder) | {os.devnull: read | write, folder: inside}
    for path, right in rights.items():
        try:
            beneath = os.open(path, os.O_PATH)
        except OSError:
            continue
        if not os.path.isdir(path):
            right &= ~list_folder  # which a file cannot have
        call("syscall", add_rule, rules, 1, struct.pack("=Qi", right, beneath), 0)
        os.close(beneath)
    call("syscall", restrict_self, rules, 0)
    os.close(rules)


def adopt_orphans() -> None:
    """PR_SET_CHILD_SUBREAPER: whose parent has gone becomes a child of this process, in whatever session it is."""
    prctl(36, 1)


def kill_all(program: int, patience: float) -> tuple[int | None, bool]:
    """Kill the program's process, its session and all that descends from it.

    Args:
        program: process id; a leader of its session.
        patience: seconds that it has to end by itself.

    Returns:
        The program's exit status, None if it had to be killed, and whether all children of this process are gone.
    """
    deadline = time.monotonic() + patience
    ended, status = os.waitpid(program, os.WNOHANG)
    while not ended and time.monotonic() < deadline:
        time.sleep(0.001)
        ended, status = os.waitpid(program, os.WNOHANG)
    if not ended:
        os.kill(program, SIGKILL)
        os.waitpid(program, 0)
    attempt(os.killpg, program, SIGKILL)  # where others of its session live on
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        try:
            reaped, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status if ended else None, True
        if not reaped:
            for each in [-1] if os.getpid() == 1 else children():  # -1 is all others in a namespace, to its first
                attempt(os.kill, each, SIGKILL)
    return status if ended else None, False


def children() -> Iterator[int]:
    """Processes whose parent is this one."""
    me = str(os.getpid()).encode()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                if file.read().rpartition(b")")[2].split()[1] == me:
                    yield int(name)
        except OSError:
            continue
